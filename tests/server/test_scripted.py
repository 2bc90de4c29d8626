"""What a model's own words become on the wire: calls, what looks like calls, stops, bytes, spaces.

The model is scripted, so each test says what is generated and what a client has to get of it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import jsonschema
import pytest
from tests.server.conftest import LocalServer
from tests.server.scripted import END, byte_level, metaspace, scripted_server

Asked = dict[str, Any]
ADA = '{"name": "Ada", "age": 36}'
ANSWERS = {
    "who?": [ADA],
    "which call?": ['<tool_call>{"name": "unheard_of", "arguments": {}}', "</tool_call>"],
    "marked?": ["[TOOL_CALLS]", ' [{"name": "find", "arguments": {"city": "A"}}]'],
    "numbers?": ['{"name": "find", "arguments": {"n": 1e999, "m": 1.50}}'],
    "no number?": ['{"name": "find", "arguments": {"n": NaN}}'],
    "more?": ['{"name": "find", "arguments": ', '{"city": "C", ', '"more": 1}}'],
    "say?": ["Hi", "<|im_end|>", "<|im_start|>", "more"],
    "bytes?": ["Ã", "©"],  # C3 and A9, as byte-level vocabularies spell them: together é
    "letters?": ["a", "b", "c"],
}
SPECIAL = ("[TOOL_CALLS]", "<|im_end|>", "<|im_start|>")
FIND: Any = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def scripted() -> Iterator[LocalServer]:
    with scripted_server(ANSWERS, special=SPECIAL) as found:
        yield found


@pytest.fixture
def wire(scripted: LocalServer) -> Iterator[httpx.Client]:
    with scripted.client() as found:
        yield found


def chat(wire: httpx.Client, text: str, **asked: Any) -> dict[str, Any]:
    """The message of a chat, whole and put together from its stream, which have to agree."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 80,
    } | asked
    answer = wire.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    whole = said(choice["message"]) | {"finish_reason": choice["finish_reason"]}
    streamed: dict[str, Any] = {"content": "", "tool_calls": []}
    for chunk in chunks(wire, "/v1/chat/completions", body):
        (choice,) = chunk["choices"]
        streamed["content"] += choice["delta"].get("content") or ""
        for delta in choice["delta"].get("tool_calls") or []:
            if "name" in delta["function"]:
                streamed["tool_calls"].append(
                    {"function": {"name": delta["function"]["name"], "arguments": ""}}
                )
            call = streamed["tool_calls"][delta["index"]]["function"]
            call["arguments"] += delta["function"].get("arguments", "")
        streamed["finish_reason"] = choice["finish_reason"]
    assert said(streamed) | {"finish_reason": streamed["finish_reason"]} == whole
    return whole


def said(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return {
        "content": message["content"] or "",
        "calls": [(call["name"], call["arguments"]) for call in calls],
    }


def chunks(wire: httpx.Client, path: str, body: Asked) -> list[Any]:
    with wire.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data:").strip() for line in answer.iter_lines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# What is a call, and what is not


@pytest.mark.parametrize("described", [None, {"type": "json_object"}])
def test_an_answer_with_a_name_is_no_call(wire: httpx.Client, described: Any) -> None:
    asked = {} if described is None else {"response_format": described}
    found = chat(wire, "who?", tools=[FIND, TIME], **asked)
    assert found == {"content": ADA, "calls": [], "finish_reason": "stop"}


def test_a_function_that_nobody_offers_is_not_called(wire: httpx.Client) -> None:
    found = chat(wire, "which call?", tools=[FIND])
    assert (found["calls"], found["finish_reason"]) == ([], "stop")
    assert "unheard_of" in found["content"]


def test_a_marker_that_is_a_special_token_is_read(wire: httpx.Client) -> None:
    found = chat(wire, "marked?", tools=[FIND])
    assert found == {
        "content": "",
        "calls": [("find", '{"city": "A"}')],
        "finish_reason": "tool_calls",
    }
    assert "[TOOL_CALLS]" not in chat(wire, "marked?")["content"]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("pieces", "calls"),
    [
        (
            ["<tool_call>", '{"name": "find", "arguments": {"city": "D"}}', "</tool_call>"],
            [("find", '{"city": "D"}')],
        ),
        (
            ["[TOOL_CALLS]", "find", "[ARGS]", '{"city": "E"}'],
            [("find", '{"city": "E"}')],
        ),
        (
            [
                "[TOOL_CALLS]",
                '[{"name": "find", "arguments": {"city": "F"}}, ',
                '{"name": "time", "arguments": {}}]',
            ],
            [("find", '{"city": "F"}'), ("time", "{}")],
        ),
        (
            ["<|python_tag|>", '{"name": "find", "parameters": {"city": "G"}}'],
            [("find", '{"city": "G"}')],
        ),
    ],
)
def test_markers_are_read_special_or_not(
    pieces: list[str], calls: list[tuple[str, str]], special: bool
) -> None:
    markers = [piece for piece in pieces if piece[0] in "<[" and "{" not in piece]
    special_tokens = markers if special else ()
    with (
        scripted_server({"call?": pieces}, special=special_tokens) as server,
        server.client() as wire,
    ):
        found = chat(wire, "call?", tools=[FIND, TIME])
    assert found == {"content": "", "calls": calls, "finish_reason": "tool_calls"}


def test_arguments_are_json_as_it_was_written(wire: httpx.Client) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    (call,) = chat(wire, "numbers?", tools=[FIND])["calls"]
    assert call == ("find", '{"n": 1e999, "m": 1.50}')
    body = {
        "messages": [{"role": "user", "content": "no number?"}],
        "tools": [FIND],
        "temperature": 0,
    }
    message = wire.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    for call in message.get("tool_calls") or []:
        json.loads(call["function"]["arguments"], parse_constant=refuse)


# Calls that are demanded


KIND = {"enum": ["aisle", "window"]}
SEAT = {"type": "object", "properties": {"kind": {"$ref": "#/$defs/Kind"}}, "required": ["kind"]}
SCHEMAS = {
    "$defs": SEAT | {"$defs": {"Kind": KIND}},
    "definitions": {
        "properties": {"kind": {"$ref": "#/definitions/Kind"}},
        "required": ["kind"],
        "definitions": {"Kind": KIND},
    },
    "nested": {
        "type": "object",
        "properties": {
            "seats": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Seat"}}
        },
        "required": ["seats"],
        "$defs": {"Seat": SEAT, "Kind": KIND},
    },
    "recursive": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    },
    "no type": {"properties": {"city": {"type": "string"}}, "required": ["city"]},
    "empty": {},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_demanded_arguments_are_what_their_schema_says(wire: httpx.Client, name: str) -> None:
    schema: Any = SCHEMAS[name]
    tools = [{"type": "function", "function": {"name": "book", "parameters": schema}}, TIME]
    for choice in ("required", {"type": "function", "function": {"name": "book"}}):
        found = chat(wire, "x", tools=tools, tool_choice=choice)
        ((called, arguments),) = found["calls"]
        assert (called, found["finish_reason"]) == ("book", "tool_calls")
        jsonschema.validate(json.loads(arguments), {"type": "object"} | schema)


@pytest.mark.parametrize("parameters", [{}, {"properties": {"a": {"type": "integer"}}}])
def test_demanded_arguments_are_an_object(parameters: Any) -> None:
    """What the model would rather write is a number."""
    answers = {"call?": ['{"name": "f", "arguments": ', "7}"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with scripted_server(answers) as server, server.client() as wire:
        found = chat(wire, "call?", tools=tools, tool_choice="required")
    assert isinstance(json.loads(found["calls"][0][1]), dict)


def test_demanded_arguments_are_closed(wire: httpx.Client) -> None:
    """A property that is not declared cannot be written, where nothing is said of further ones."""
    found = chat(wire, "more?", tools=[FIND], tool_choice="required")
    assert set(json.loads(found["calls"][0][1])) == {"city"}


# Conversations as templates want them


CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
BARE = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}
EACH = "{% for m in messages %}{% if m.tool_calls %}"
REST = "{% else %}{{ m.role }} says {{ m.content }};{% endif %}{% endfor %}"
TEMPLATES = {
    "null": (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
        "calls {{ m.tool_calls[0].function.name }};" + REST,
        BARE,
        "calls f;",
    ),
    "text": (
        EACH
        + "{% for c in m.tool_calls %}{{ c.function.name + ' ' + c.function.arguments }};{% endfor %}"
        + REST,
        CALL,
        'f {"a": 1};',
    ),
    "object": (
        EACH
        + "{% for k, v in m.tool_calls[0].function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
        "{{ m.tool_calls[0].function.name }};" + REST,
        CALL,
        "a=1;f;",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_stands_in_the_prompt_as_its_template_writes_it(name: str) -> None:
    template, call, written = TEMPLATES[name]
    result = {"role": "tool", "tool_call_id": "call00001", "content": "42"}
    with scripted_server({}, template=template) as server, server.client() as wire:
        for content in ({"content": None}, {"content": ""}, {}):
            messages = [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": [call], **content},
                result,
            ]
            found = wire.post("/chat_tokenize", json={"messages": messages}).json()
            assert found["templated_text"] == f"user says hi;{written}tool says 42;"


def test_no_calls_are_as_if_they_were_not_there() -> None:
    template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls|length != 1 %}"
        "{{ raise_exception('only single tool-calls at once') }}{% endif %}" + REST
    )
    spoken = {"role": "assistant", "content": "ho", "tool_calls": [], "function_call": None}
    with scripted_server({}, template=template) as server, server.client() as wire:
        messages = [{"role": "user", "content": "hi"}, spoken, {"role": "user", "content": "hm"}]
        found = wire.post("/chat_tokenize", json={"messages": messages}).json()
    assert found["templated_text"] == "user says hi;assistant says ho;user says hm;"


# Stops and ids


@pytest.mark.parametrize(
    "stop", ["<|im_end|>", ["never", "<|im_end|>"], ["<|im_end|><|im_start|>"]]
)
def test_special_tokens_are_stop_texts(wire: httpx.Client, stop: Any) -> None:
    found = chat(wire, "say?", stop=stop)
    assert (found["content"], found["finish_reason"]) == ("Hi", "stop")
    body = {"prompt": "say?", "temperature": 0, "stop": stop, "max_tokens": 9}
    choice = wire.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "stop")
    stops = [stop] if isinstance(stop, str) else stop
    parameters = {"stop": stops, "max_new_tokens": 9, "details": True}
    found = wire.post("/generate", json={"inputs": "say?", "parameters": parameters}).json()
    assert found["details"]["finish_reason"] == "stop_sequence"
    assert "more" not in found["generated_text"]


def test_many_stop_texts_are_taken(wire: httpx.Client) -> None:
    stops = [f"never{number}" for number in range(14)] + ["b"]
    assert chat(wire, "letters?", stop=stops)["content"] == "a"


def test_ids_beyond_the_vocabulary(wire: httpx.Client) -> None:
    """A request's are refused before anything is computed; a file's are as if they were not there."""
    for asked in (
        {"logit_bias": {"999999": 1}},
        {"stop_token_ids": [99999]},
        {"stop_token_ids": [99999], "min_tokens": 2},
    ):
        for stream in (False, True):
            body = {"prompt": "letters?", "max_tokens": 4, "stream": stream, **asked}
            assert wire.post("/v1/completions", json=body).status_code == 422
    ends = byte_level().get_vocab_size()
    for wrong in (128009, -1):
        eos = {"eos_token_id": [ends, wrong]}
        with scripted_server({"letters?": ["a", "b"]}, **eos) as server, server.client() as other:
            assert server.service.needed_tokenizer.token_to_id(END) == ends
            assert chat(other, "letters?", min_tokens=2)["content"] == "ab"


def test_bytes_of_parts_of_a_character(wire: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "bytes?"}], "temperature": 0, "max_tokens": 2}
    asked = body | {"logprobs": True, "top_logprobs": 1}
    choice = wire.post("/v1/chat/completions", json=asked).json()["choices"][0]
    assert choice["message"]["content"] == "é"
    content = choice["logprobs"]["content"]
    assert [item["bytes"] for item in content] == [[0xC3], [0xA9]]
    assert [item["top_logprobs"][0]["bytes"] for item in content] == [[0xC3], [0xA9]]


# Spaces of SentencePiece's vocabularies


@pytest.fixture(scope="module")
def spaced() -> Iterator[LocalServer]:
    words = ["▁a", "▁big", ",▁small"]
    with scripted_server({"life is": words, "is it": ["ter"]}, tokenizer=metaspace(words)) as found:
        yield found


def test_the_space_behind_the_prompt_is_kept(spaced: LocalServer) -> None:
    prompt, text = "The meaning of life is", " a big, small"
    with spaced.client() as wire:
        body: Asked = {"prompt": prompt, "temperature": 0, "max_tokens": 9}
        for echo in (False, True):
            found = wire.post("/v1/completions", json=body | {"echo": echo}).json()
            assert found["choices"][0]["text"] == prompt * echo + text
        streamed = chunks(wire, "/v1/completions", body)
        assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text
        for whole in (False, True):
            parameters = {"return_full_text": whole, "max_new_tokens": 9}
            found = wire.post("/generate", json={"inputs": prompt, "parameters": parameters}).json()
            assert found["generated_text"] == prompt * whole + text
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": prompt}]
        found = wire.post(
            "/v1/chat/completions", json={"messages": messages, "temperature": 0}
        ).json()
        assert found["choices"][0]["message"]["content"] == text
        for stop, left in ((" a big", ""), ("big,", " a ")):
            found = wire.post("/v1/completions", json=body | {"stop": stop}).json()
            assert found["choices"][0]["text"] == left


# Several answers, and bodies that are none


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_answers_to_one_seed_differ_and_come_again(client: httpx.Client, route: str) -> None:
    body: Asked = {"n": 3, "seed": 7, "temperature": 1, "max_tokens": 12}
    body |= {"prompt": "Once", "messages": [{"role": "user", "content": "Once"}]}

    def texts(**asked: Any) -> list[str]:
        choices = client.post(f"/v1/{route}", json=body | asked).json()["choices"]
        return [choice.get("text") or choice["message"]["content"] for choice in choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first
    assert texts(n=2) == first[:2]
    assert texts(seed=8) != first


DEEP = "[" * 900 + "]" * 900
HALF = "\\ud83d"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", '{"messages":[{"role":"assistant","tool_calls":5}]}'),
        ("/v1/chat/completions", '{"messages":[{"role":"assistant","tool_calls":true}]}'),
        ("/v1/chat/completions", f'{{"messages":[{{"role":"{HALF}","content":"x"}}]}}'),
        (
            "/v1/chat/completions",
            f'{{"messages":[{{"role":"user","content":[{{"type":"{HALF}"}}]}}]}}',
        ),
        (
            "/v1/chat/completions",
            '{"messages":[{"role":"user","content":"x"}],"tools":[{"function":{"name":"f"}}],'
            f'"tool_choice":{{"type":"function","function":{{"name":"{HALF}"}}}}}}',
        ),
        ("/vertex", '{"instances":[{"messages":5}]}'),
        (
            "/v1/chat/completions",
            '{"messages":[{"role":"assistant","tool_calls":[{"function":'
            f'{{"name":"f","arguments":"{DEEP}"}}}}]}}]}}',
        ),
    ],
)
def test_bodies_that_are_wrong_are_refused_in_json(
    wire: httpx.Client, path: str, body: str
) -> None:
    found = wire.post(path, content=body, headers={"content-type": "application/json"})
    assert found.status_code in (400, 404, 422), found.text
    assert found.json()["error"]
