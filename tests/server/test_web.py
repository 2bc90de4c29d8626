"""Bodies read within limits, and answers written: every JSON value, every route, nothing but JSON."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.server.conftest import LocalServer, local_server

from hanok.engine.model import Model
from hanok.server import web
from hanok.server.app import all_routes
from hanok.server.errors import ServerError, is_anthropic
from hanok.server.options import ServerOptions
from hanok.server.web import AT_ONCE, MOST_CONTAINERS, dumps, dumps_in_parts, parse_json

OPTIONS = ServerOptions(model_id="a")


def json_values(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=12,
    )


UNICODE_VALUES = json_values(st.text(max_size=9))
JSON_VALUES = json_values(st.text(st.characters(), max_size=9))
"""With halves of surrogate pairs."""


@given(UNICODE_VALUES)
def test_a_body_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    for is_ascii in (True, False):
        text = json.dumps(value, ensure_ascii=is_ascii, indent=1)
        if "Infinity" in text:
            with pytest.raises(ServerError, match="not JSON"):
                parse_json(text.encode(), OPTIONS)
            continue
        assert parse_json(text.encode(), OPTIONS) == json.loads(text)
        assert parse_json(b"\xef\xbb\xbf" + text.encode(), OPTIONS) == json.loads(text)


def test_half_a_surrogate_pair_is_refused_wherever_it_stands() -> None:
    for text in (r'"\ud800"', r'{"\udfff": 1}', r'[["\ud800\ud800"]]', r'"\udc00\ud800"'):
        with pytest.raises(ServerError, match="not JSON") as caught:
            parse_json(text.encode(), OPTIONS)
        assert caught.value.status == 400
    assert parse_json(rb'"\ud83d\ude00"', OPTIONS) == "\U0001f600"


@pytest.mark.parametrize("unit", ["[]", "{}", '{"a":[]}'])
@pytest.mark.parametrize("wrap", ["[%s]", '{"a":[%s]}'])
def test_lists_and_objects_are_counted_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch, unit: str, wrap: str
) -> None:
    most = 100
    monkeypatch.setattr(web, "MOST_CONTAINERS", most)
    outer, inner = wrap.count("[") + wrap.count("{"), unit.count("[") + unit.count("{")
    room = (most - outer) // inner
    right = wrap % ",".join([unit] * room)
    # Brackets in texts are none, nor are quotes that a text holds.
    noisy = right.replace(unit, unit + r',"[[{{\"[\\",""', 20)
    if noisy.startswith("["):
        assert len(parse_json(noisy.encode(), OPTIONS)) == room + 40
    parse_json(right.encode(), OPTIONS)
    wrong = wrap % ",".join([unit] * (room + 1))
    monkeypatch.setattr(web, "from_json", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ServerError, match="more than 100 lists and objects") as caught:
        parse_json(wrong.encode(), OPTIONS)
    assert caught.value.status == 413


@settings(max_examples=50)
@given(JSON_VALUES, st.integers(0, 12), st.integers(1, 8))
def test_depth_is_counted_in_levels(value: Any, extra: int, levels: int) -> None:
    def depth(item: Any) -> int:
        if isinstance(item, dict):
            item = list(item.values())
        return 1 + max(map(depth, item), default=0) if isinstance(item, list) else 0

    for _ in range(extra):
        value = [1, {"a": value}] if extra % 2 else [value]
    assert web._is_deeper(value, levels) is (depth(value) > levels)


@given(JSON_VALUES)
@example(["\ud800", math.inf, {"a": math.nan, "\udfff": "é"}])
def test_every_value_is_written_as_json_in_utf_8(value: Any) -> None:
    text = dumps(value).encode().decode()

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(one) for key, one in item.items()}
        if isinstance(item, list):
            return [finite(one) for one in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    assert json.loads(text, parse_constant=pytest.fail) == finite(value)
    assert json.loads("".join(dumps_in_parts(value))) == finite(value)


@settings(max_examples=30)
@given(JSON_VALUES, st.integers(0, 3 * AT_ONCE))
def test_parts_join_to_the_whole_and_are_small(value: Any, count: int) -> None:
    words = ["abc"] * count
    whole = {"a": [value, words, [None, *({"x": 1.5, "y": words[:50]} for _ in range(200))]]}
    parts = list(dumps_in_parts({"b": whole, "c": words}))
    assert "".join(parts) == dumps({"b": whole, "c": words})
    assert max(map(len, parts)) < 20 * AT_ONCE + len(dumps(value))


@pytest.fixture(scope="module")
def fuzzed(local_model: Model) -> Iterator[LocalServer]:
    with local_server(local_model, max_total_tokens=256) as found:  # answers are short
        yield found


MESSAGE = {"role": "user", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SOUND: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            MESSAGE,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "b"}]},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        ],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {"5": 1},
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 1,
    },
    "/v1/completions": {
        "prompt": ["a", "b"],
        "echo": True,
        "logprobs": 1,
        "stop_token_ids": [1],
        "max_tokens": 1,
    },
    "/generate": {
        "inputs": "a",
        "parameters": {
            "max_new_tokens": 1,
            "details": True,
            "stop": ["x"],
            "grammar": {"type": "json", "value": {"type": "object", "properties": {}}},
        },
    },
    "/vertex": {
        "instances": [
            {"inputs": "a", "parameters": {"max_new_tokens": 1, "seed": 1}},
            {"messages": [MESSAGE], "parameters": {"max_new_tokens": 1}},
        ]
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "x", "text": "b"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "c"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "include": ["message.output_text.logprobs"],
        "metadata": {"a": "b"},
        "max_output_tokens": 1,
    },
    "/v1/messages": {
        "system": [{"type": "text", "text": "a"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "b", "signature": ""},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "c"}],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "context_management": {"edits": [{"keep": "all"}]},
        "stop_sequences": ["x"],
        "max_tokens": 1,
    },
}
OF_OTHERS = {
    "/": "/generate",
    "/generate_stream": "/generate",
    "/tokenize": "/generate",
    "/chat_tokenize": "/v1/chat/completions",
    "/invocations": "/v1/chat/completions",
    "/v1/messages/count_tokens": "/v1/messages",
    "/v1/responses/input_tokens": "/v1/responses",
}
POSTS = sorted({route.path for route in all_routes() if route.method == "POST"})
HOSTILE = st.sampled_from(
    [
        5,
        True,
        None,
        -1,
        2**63,
        10**30,
        1e308,
        "",
        "\ud800",
        "a\x00\x1b[2J\n",
        "[" * 900 + "]" * 900,
        "[" * 99999,
        [],
        [[]],
        [5, "a", None],
        {},
        {"type": "\ud800"},
        {"a": {"b": [{}]}},
        {"$ref": "#"},
    ]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where the parts of a JSON value are."""
    yield path
    inner = list(value.items() if isinstance(value, dict) else ())
    inner += enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a JSON value with another part."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def bodies(draw: st.DrawFn, path: str) -> Any:
    """Sound bodies of a route with one or two parts that are something else."""
    name = OF_OTHERS.get(path, path)
    if path == "/explain":
        name = draw(st.sampled_from(list(SOUND)[:3]))
    value: Any = SOUND.get(name, {"model": "bundled", "input": "a", "tokens": [5], "prompt": "a"})
    if path == "/explain":
        value = {"route": name, "body": value}
    fields = {
        name
        for route in all_routes()
        if route.path == path and route.body is not None
        for name in route.body.model_fields
    }
    for _ in range(draw(st.integers(1, 2))):
        new = draw(HOSTILE | JSON_VALUES)
        if fields and draw(st.integers(0, 3)) == 0 and isinstance(value, dict):
            value = value | {draw(st.sampled_from(sorted(fields))): new}
        else:
            value = replaced(value, draw(st.sampled_from(list(places(value)))), new)
    return value


@pytest.mark.parametrize("path", POSTS)
def test_whatever_is_posted_the_answer_is_json_and_no_fault(fuzzed: LocalServer, path: str) -> None:
    with fuzzed.client() as client:

        @settings(max_examples=40, suppress_health_check=list(HealthCheck))
        @given(bodies(path))
        def check(body: Any) -> None:
            check_answer(client, path, body)

        check()


def check_answer(client: httpx.Client, path: str, body: Any) -> None:
    """Post a body: the answer is a JSON value, an event stream, or a refusal."""
    data = json.dumps(body).encode()
    found = client.post(path, content=data, headers={"content-type": "application/json"})
    assert found.status_code < 500, (body, found.text)
    kind = found.headers["content-type"]
    text = found.content.decode()  # strictly
    if kind.startswith("text/event-stream"):
        assert found.status_code == 200
        lines = [line for line in text.split("\n") if line and not line.startswith("event: ")]
        events = [line.removeprefix("data: ") for line in lines]
        values = [json.loads(event) for event in events if event not in ("[DONE]", ":")]
        assert all("error" not in value for value in values)
        return
    assert kind == "application/json"
    value = json.loads(text, parse_constant=pytest.fail)
    if found.status_code != 200:
        assert value["error"]
        assert value["type"] == "error" if is_anthropic(path) else value["error_type"]


FORMERLY_FAULTS: list[tuple[str, Any]] = [
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": 5}]}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": True}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]}),
    (
        "/v1/chat/completions",
        {"messages": [MESSAGE], "tools": [{"function": {"name": "f"}}], "tool_choice": "\ud800"},
    ),
    ("/vertex", {"instances": [{"messages": 5}]}),
    ("/vertex", {"instances": [{"messages": [5]}]}),
    ("/vertex", {"instances": [{"messages": []}]}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[" * 900 + "]" * 900}}],
                }
            ]
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), FORMERLY_FAULTS)
def test_what_is_wrong_is_told_with_its_place(fuzzed: LocalServer, path: str, body: Any) -> None:
    data, kind = json.dumps(body).encode(), {"content-type": "application/json"}
    with fuzzed.client() as client:
        found = client.post(path, content=data, headers=kind)
    assert found.status_code in (400, 422)
    assert found.json()["error_type"] == "validation"


BIG: list[tuple[str, str, int]] = [
    ("/v1/completions", '{"prompt":[' + '1,"a",' * 300 + "[]]}", 422),
    ("/v1/completions", '{"prompt":[' + "[]," * (MOST_CONTAINERS + 1) + "[]]}", 413),
    ("/v1/completions", '{"prompt":[' + "-1," * 9000 + "1]}", 422),
    ("/v1/completions", '{"prompt":{}}', 422),
    ("/v1/completions", '{"prompt":"a","stop_token_ids":[' + "1," * 1000 + "1]}", 422),
    ("/v1/completions", '{"prompt":"a","stop":[' + '"a",' * 64 + '"a"]}', 422),
    ("/v1/completions", '{"prompt":"a","max_tokens":1,"stop":[' + '"x",' * 63 + '"x"]}', 200),
    ("/v1/completions", '{"prompt":"a","stop":["' + "a" * 1001 + '"]}', 422),
    ("/v1/completions", '{"prompt":"a","model":"' + "a" * 1001 + '"}', 422),
    (
        "/v1/completions",
        json.dumps({"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(10_001)), "b")}),
        422,
    ),
    ("/v1/chat/completions", '{"messages":[' + '{"role":5},' * 10_000 + "{}]}", 422),
    ("/v1/chat/completions", '{"messages":[{}],"tools":[' + "{}," * 1000 + "{}]}", 422),
    ("/generate", '{"inputs":"a","parameters":{"stop":["a","b","c","d","e"]}}', 422),
    ("/vertex", '{"instances":[' + "{}," * 10_000 + "{}]}", 422),
]


@pytest.mark.parametrize(("path", "text", "status"), BIG)
def test_what_is_too_much_is_refused(
    fuzzed: LocalServer, path: str, text: str, status: int
) -> None:
    with fuzzed.client() as client:
        found = client.post(path, content=text, headers={"content-type": "application/json"})
    assert found.status_code == status, found.text
    assert len(found.text) < 3000


def test_an_answer_does_not_repeat_a_long_request(fuzzed: LocalServer) -> None:
    role = "r" * 500_000
    with fuzzed.client() as client:
        found = client.post(
            "/v1/chat/completions", json={"messages": [{"role": role, "content": "a"}]}
        )
    assert found.status_code == 422
    assert len(found.content) < 5000
    assert "characters)" in found.json()["error"]["message"]


def test_a_text_that_cannot_fit_is_not_tokenized(
    fuzzed: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = fuzzed.service.needed_tokenizer
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    text = "once upon a time " * 20_000
    chat = {"messages": [{"role": "user", "content": text}]}
    with fuzzed.client() as client:
        for path, body in [
            ("/generate", {"inputs": text}),
            ("/v1/completions", {"prompt": text}),
            ("/v1/chat/completions", chat),
            ("/explain", {"route": "/v1/chat/completions", "body": chat}),
            ("/explain", {"route": "/v1/completions", "body": {"prompt": ["a" * 9, text][1:]}}),
            ("/vertex", {"instances": [{"inputs": text}]}),
        ]:
            found = client.post(path, json=body)
            assert found.status_code in (400, 422)
            assert "or more" in found.text
    monkeypatch.undo()
    with fuzzed.client() as client:  # what is cut off at the front may be of any length
        parameters = {"truncate": 5, "max_new_tokens": 1}
        body = {"inputs": text, "parameters": parameters}
        assert client.post("/generate", json=body).status_code == 200


def test_the_scheme_of_a_key_has_no_case_and_the_key_has(local_model: Model) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    with local_server(local_model, api_key="Secret") as server, server.client() as client:
        for header, status in {
            "Bearer Secret": 200,
            "bearer Secret": 200,
            "BEARER  Secret": 200,
            "Bearer secret": 401,
            "Bearer": 401,
            "Basic Secret": 401,
            "Secret": 401,
            "": 401,
        }.items():
            found = client.post("/generate", json=body, headers={"authorization": header})
            assert found.status_code == status, header


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (None, 415),
        ("", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
    ],
)
def test_a_body_says_that_it_is_json(fuzzed: LocalServer, kind: str | None, status: int) -> None:
    headers = {} if kind is None else {"content-type": kind}
    with fuzzed.client() as client:
        found = client.post("/tokenize", content=b'{"inputs": "a"}', headers=headers)
    assert found.status_code == status
    if status == 415:
        assert "Content-Type: application/json" in found.json()["error"]


@pytest.mark.parametrize(("encoding", "status"), [("identity", 200), ("gzip", 415), ("br", 415)])
@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_a_body_that_is_encoded_is_told_so(
    fuzzed: LocalServer, encoding: str, status: int, path: str
) -> None:
    body = (
        {"inputs": "a"} if path == "/tokenize" else {"messages": [{"role": "user", "content": "a"}]}
    )
    with fuzzed.client() as client:
        found = client.post(path, json=body, headers={"content-encoding": encoding})
    assert found.status_code == status
    assert status == 200 or "Content-Encoding" in str(found.json()["error"])


def lists_and_tables(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the lists and tables that a model's schema is made of."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict") and isinstance(schema["type"], str):
            yield schema
        for item in schema.values():
            yield from lists_and_tables(item)
    elif isinstance(schema, list | tuple):
        for item in schema:
            yield from lists_and_tables(item)


@pytest.mark.parametrize("path", POSTS)
def test_no_list_of_a_body_is_looked_at_beyond_its_first_fault(path: str) -> None:
    """Each fault is reported, and a body has room for a million."""
    for route in all_routes():
        if (route.method, route.path) != ("POST", path) or route.body is None:
            continue
        for schema in lists_and_tables(route.body.__pydantic_core_schema__):
            if schema["type"] == "list":
                assert schema.get("fail_fast"), schema
            elif schema.get("values_schema", {"type": "any"})["type"] != "any":
                assert schema.get("max_length"), schema
