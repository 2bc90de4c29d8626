"""The shapes of TGI's own recorded answers, held against those of a live server to the same requests.

A shape is a type, a value, a tuple of shapes that all may be, a list of which every item has the one
shape, or an object of which no key may be missing or be beside. `Differs` is where hanok's answers are
others on purpose; docs/serve.md says why.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import openai
import pytest
from tests.server.conftest import Server

Shape = Any
Side = Literal["tgi", "hanok"]


class Absent:
    """The value of a key that is not there."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = Absent()
MAYBE = (None, ABSENT)  # clients with typed answers read both as the same


@dataclass(frozen=True)
class Differs:
    tgi: Shape
    hanok: Shape


def differences(value: Any, shape: Shape, side: Side, place: str = "answer") -> list[str]:
    """What of a value is not as its shape says."""
    match shape:
        case Differs():
            return differences(value, getattr(shape, side), side, place)
        case tuple():
            found = [differences(value, item, side, place) for item in shape]
            return min(found, key=len) if all(found) else []
        case dict() if isinstance(value, dict):
            keys = [*shape, *(key for key in value if key not in shape)]
            return [
                line
                for key in keys
                for line in differences(
                    value.get(key, ABSENT), shape.get(key, ABSENT), side, f"{place}.{key}"
                )
            ]
        case [item] if isinstance(value, list):
            return [
                line
                for number, one in enumerate(value)
                for line in differences(one, item, side, f"{place}.{number}")
            ]
        case type():
            fits = type(value) is shape
        case _:
            fits = type(value) is type(shape) and value == shape
    return [] if fits else [f"{place} is {value!r:.80}, not {shape!r:.80}"]


# /generate and its kin.
TOKEN = {
    "id": int,
    "text": str,
    "logprob": Differs(tgi=(float, None), hanok=float),  # no number: hanok fails the request
    "special": bool,
}
PREFILL = {"id": int, "text": str, "logprob": (float, None)}
REASON = ("length", "eos_token", "stop_sequence")


def sequence(*, seed: Shape, prefill: Shape, top: Shape = MAYBE) -> dict[str, Shape]:
    return {
        "finish_reason": REASON,
        "generated_tokens": int,
        "seed": seed,
        "prefill": prefill,
        "tokens": [TOKEN],
        "top_tokens": top,
    }


def generated(*, best_of: Shape = MAYBE, **options: Shape) -> dict[str, Shape]:
    details = sequence(**options) | {"best_of_sequences": best_of}
    return {"generated_text": str, "details": details}


def event(*, text: Shape, details: Shape, top: Shape = MAYBE) -> dict[str, Shape]:
    return {
        "index": int,
        "token": TOKEN,
        "top_tokens": top,
        "generated_text": text,
        "details": details,
    }


TEXT = {"generated_text": str}
GREEDY = generated(seed=None, prefill=[])
SAMPLED = generated(seed=int, prefill=[])
GREEDY_PREFILL = generated(seed=None, prefill=[PREFILL])
SAMPLED_PREFILL = generated(seed=int, prefill=[PREFILL])
TOP = generated(seed=None, prefill=[], top=[[TOKEN]])
OTHERS = sequence(seed=int, prefill=[]) | {"generated_text": str}
BEST_OF = generated(seed=int, prefill=[], best_of=[OTHERS])
STREAM_DETAILS = {
    "finish_reason": REASON,
    "generated_tokens": int,
    "seed": (int, None),
    "input_length": int,
}

# OpenAI's routes.
USAGE = {
    "prompt_tokens": int,
    "completion_tokens": int,
    "total_tokens": int,
    # Those of TGI's answers that OpenAI's client recorded have its empty fields.
    "prompt_tokens_details": Differs(tgi=MAYBE, hanok={"cached_tokens": int}),
    "completion_tokens_details": Differs(
        tgi=MAYBE,
        hanok={"accepted_prediction_tokens": int, "rejected_prediction_tokens": int},
    ),
}
FINAL_REASON = Differs(tgi=("stop", "length", "stop_sequence"), hanok=("stop", "length"))
TOOL_REASON = Differs(tgi="stop", hanok="tool_calls")
CALL = {
    "id": str,
    "type": "function",
    "function": {"name": str, "arguments": str, "description": MAYBE},
}
TOP_LOGPROB = {"token": str, "logprob": float, "bytes": Differs(tgi=ABSENT, hanok=[int])}
LOGPROBS = {"content": [TOP_LOGPROB | {"top_logprobs": [TOP_LOGPROB]}]}


def head(kind: str, choices: Shape, usage: Shape) -> dict[str, Shape]:
    return {
        "id": str,
        "object": kind,
        "created": int,
        "model": str,
        "system_fingerprint": str,
        "service_tier": Differs(tgi=MAYBE, hanok=ABSENT),  # the client's
        "choices": choices,
        "usage": usage,
    }


def chat(message: Shape, reason: Shape, logprobs: Shape = None) -> dict[str, Shape]:
    choice = {
        "index": int,
        "message": {"role": "assistant", "name": MAYBE} | message,
        "logprobs": logprobs,
        "finish_reason": reason,
        "usage": MAYBE,
    }
    return head("chat.completion", [choice], USAGE)


def chat_chunk(delta: Shape, reason: Shape) -> dict[str, Shape]:
    clients = {key: Differs(tgi=MAYBE, hanok=ABSENT) for key in ("function_call", "refusal")}
    choice = {
        "index": int,
        # OpenAI's client joins what a delta repeats: once is enough.
        "delta": {"role": Differs(tgi="assistant", hanok=("assistant", ABSENT))} | clients | delta,
        "logprobs": None,
        "finish_reason": reason,
    }
    return head("chat.completion.chunk", [choice], None)


def completion(reason: Shape, usage: Shape) -> dict[str, Shape]:
    choice = {"index": int, "text": str, "logprobs": None, "finish_reason": reason}
    return head("text_completion", [choice], usage)


CHAT = chat({"content": str, "tool_calls": MAYBE}, FINAL_REASON)
CHAT_LOGPROBS = chat({"content": str, "tool_calls": MAYBE}, FINAL_REASON, LOGPROBS)
CHAT_CALL = chat({"content": None, "tool_calls": [CALL]}, TOOL_REASON)
DELTA = {"content": str, "tool_calls": MAYBE}
CHAT_CHUNK = chat_chunk(DELTA, None)
CHAT_LAST = chat_chunk(DELTA, FINAL_REASON)
CHAT_USAGE = head("chat.completion.chunk", [], USAGE)
CALL_DELTA = {
    "index": int,
    "id": str,
    "type": "function",
    "function": {"name": Differs(tgi=(str, None), hanok=str), "arguments": str},
}
CALL_CHUNK = chat_chunk({"content": MAYBE, "tool_calls": [CALL_DELTA]}, None)
MORE_DELTA = {
    "index": 0,
    "id": Differs(tgi=str, hanok=ABSENT),
    "type": Differs(tgi="function", hanok=ABSENT),
    "function": {"name": Differs(tgi=(str, None), hanok=ABSENT), "arguments": str},
}
"""More of a call's arguments; what came with its beginning is not said again, as OpenAI does it."""
MORE_CHUNK = chat_chunk({"content": MAYBE, "tool_calls": [MORE_DELTA]}, None)
CALL_LAST = chat_chunk({"content": MAYBE, "tool_calls": MAYBE}, TOOL_REASON)
COMPLETION = completion(FINAL_REASON, USAGE)
COMPLETION_CHUNK = completion(Differs(tgi="", hanok=None), None)
COMPLETION_LAST = completion(FINAL_REASON, USAGE)

PROMPT = "Once upon a time"
SAMPLING = {
    "do_sample": True,
    "max_new_tokens": 10,
    "repetition_penalty": 1.2,
    "return_full_text": True,
    "stop": ["test"],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 10,
    "truncate": 5,
    "typical_p": 0.9,
    "watermark": True,
    "seed": 0,
}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}, "legs": {"enum": [3, 4]}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Seoul", "Bonn"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}


def text(**parameters: Any) -> dict[str, Any]:
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": 10} | parameters}


def talk(**options: Any) -> dict[str, Any]:
    return {
        "model": "tgi",
        "messages": [{"role": "user", "content": "Tell me of a dog."}],
        "max_tokens": 10,
        "seed": 0,
    } | options


def prompts(prompt: Any, **options: Any) -> dict[str, Any]:
    return {"model": "tgi", "prompt": prompt, "max_tokens": 10, "seed": 0} | options


WHOLE: list[tuple[str, str, dict[str, Any], Shape]] = [
    ("text alone", "/generate", text(), TEXT),
    ("no parameters", "/generate", {"inputs": PROMPT}, TEXT),
    ("details", "/generate", text(details=True), GREEDY),
    ("sampled", "/generate", text(**SAMPLING, details=True), SAMPLED),
    ("prefill", "/generate", text(decoder_input_details=True), GREEDY_PREFILL),
    (
        "prefill, sampled",
        "/generate",
        text(**SAMPLING, decoder_input_details=True),
        SAMPLED_PREFILL,
    ),
    ("top tokens", "/generate", text(details=True, top_n_tokens=3), TOP),
    ("best of", "/generate", text(details=True, do_sample=True, best_of=2), BEST_OF),
    (
        "regex",
        "/generate",
        text(details=True, grammar={"type": "regex", "value": "[0-9]{3}"}),
        GREEDY,
    ),
    (
        "json",
        "/generate",
        text(max_new_tokens=60, details=True, grammar={"type": "json", "value": SCHEMA}),
        GREEDY,
    ),
    ("root", "/", text(), [TEXT]),
    ("root, details", "/", text(details=True), [GREEDY]),
    ("sagemaker", "/invocations", text(details=True), [GREEDY]),
    ("chat", "/v1/chat/completions", talk(), CHAT),
    ("chat, greedy", "/v1/chat/completions", talk(temperature=0), CHAT),
    (
        "chat, logprobs",
        "/v1/chat/completions",
        talk(logprobs=True, top_logprobs=2),
        CHAT_LOGPROBS,
    ),
    (
        "chat, continued",
        "/v1/chat/completions",
        talk(messages=[*talk()["messages"], {"role": "assistant", "content": "Once"}]),
        CHAT,
    ),
    (
        "chat, json",
        "/v1/chat/completions",
        talk(max_tokens=60, response_format={"type": "json", "value": SCHEMA}),
        CHAT,
    ),
    (
        "chat, json_object",
        "/v1/chat/completions",
        talk(max_tokens=60, response_format={"type": "json_object", "value": SCHEMA}),
        CHAT,
    ),
    (
        "chat, json_schema",
        "/v1/chat/completions",
        talk(
            max_tokens=60,
            response_format={"type": "json_schema", "value": {"name": "pet", "schema": SCHEMA}},
        ),
        CHAT,
    ),
    (
        "chat, a tool",
        "/v1/chat/completions",
        talk(max_tokens=60, tools=[WEATHER], tool_choice="weather"),
        CHAT_CALL,
    ),
    (
        "chat, a named tool",
        "/v1/chat/completions",
        talk(max_tokens=60, tools=[WEATHER], tool_choice=NAMED),
        CHAT_CALL,
    ),
    (
        "chat, tools required",
        "/v1/chat/completions",
        talk(max_tokens=60, tools=[WEATHER], tool_choice="required"),
        CHAT_CALL,
    ),
    (
        "chat, no tool",
        "/v1/chat/completions",
        talk(tools=[WEATHER], tool_choice="none"),
        CHAT,
    ),
    ("chat, tools at will", "/v1/chat/completions", talk(tools=[WEATHER]), CHAT),
    ("completion", "/v1/completions", prompts(PROMPT), COMPLETION),
    ("completions", "/v1/completions", prompts([PROMPT, "The dog", "Tom"]), COMPLETION),
]

STREAMS: list[tuple[str, str, dict[str, Any], list[Shape]]] = [
    (
        "stream",
        "/generate_stream",
        text(),
        [event(text=None, details=None), event(text=str, details=None)],
    ),
    (
        "stream, details",
        "/generate_stream",
        text(details=True),
        [event(text=None, details=None), event(text=str, details=STREAM_DETAILS)],
    ),
    (
        "stream, top tokens",
        "/",
        text(top_n_tokens=2) | {"stream": True},
        [
            event(text=None, details=None, top=[TOKEN]),
            event(text=str, details=None, top=[TOKEN]),
        ],
    ),
    ("chat", "/v1/chat/completions", talk(stream=True), [CHAT_CHUNK, CHAT_LAST]),
    (
        "chat, usage",
        "/v1/chat/completions",
        talk(stream=True, stream_options={"include_usage": True}),
        [CHAT_CHUNK, CHAT_LAST, CHAT_USAGE],
    ),
    (
        "chat, no usage",
        "/v1/chat/completions",
        talk(stream=True, stream_options={"include_usage": False}),
        [CHAT_CHUNK, CHAT_LAST],
    ),
    (
        "chat, json",
        "/v1/chat/completions",
        talk(stream=True, max_tokens=60, response_format={"type": "json", "value": SCHEMA}),
        [CHAT_CHUNK, CHAT_LAST],
    ),
    (
        "chat, a tool",
        "/v1/chat/completions",
        talk(stream=True, max_tokens=60, tools=[WEATHER], tool_choice=NAMED),
        [(CHAT_CHUNK, CALL_CHUNK, MORE_CHUNK), CALL_LAST],
    ),
    (
        "chat, no tool",
        "/v1/chat/completions",
        talk(stream=True, tools=[WEATHER], tool_choice="none"),
        [CHAT_CHUNK, CHAT_LAST],
    ),
    (
        "completion",
        "/v1/completions",
        prompts(PROMPT, stream=True),
        [COMPLETION_CHUNK, COMPLETION_LAST],
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "shape"), [row[1:] for row in WHOLE], ids=[row[0] for row in WHOLE]
)
def test_an_answer_has_tgis_shape(
    client: httpx.Client, path: str, body: dict[str, Any], shape: Shape
) -> None:
    found = client.post(path, json=body)
    assert found.status_code == 200, found.text
    assert differences(found.json(), shape, "hanok") == []


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    if path.startswith("/v1/"):
        assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("path", "body", "shapes"), [row[1:] for row in STREAMS], ids=[row[0] for row in STREAMS]
)
def test_a_stream_has_tgis_shape(
    client: httpx.Client, path: str, body: dict[str, Any], shapes: list[Shape]
) -> None:
    """The last shapes are those of the last events, the first that of all before."""
    found = events(client, path, body)
    first, *last = shapes
    assert len(found) > len(last)
    expected = [first] * (len(found) - len(last)) + last
    for value, shape in zip(found, expected, strict=True):
        assert differences(value, shape, "hanok") == []


def test_streams_of_several_prompts_end_each_with_its_usage(client: httpx.Client) -> None:
    found = events(client, "/v1/completions", prompts([PROMPT, "The dog", "Tom"], stream=True))
    last = {chunk["choices"][0]["index"]: number for number, chunk in enumerate(found)}
    assert sorted(last) == [0, 1, 2]
    for number, chunk in enumerate(found):
        shape = COMPLETION_LAST if number in last.values() else COMPLETION_CHUNK
        assert differences(chunk, shape, "hanok") == []
    whole = client.post("/v1/completions", json=prompts([PROMPT, "The dog", "Tom"])).json()
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        each = [found[number]["usage"][name] for number in last.values()]
        assert sum(each) == whole["usage"][name]


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/generate", text(details=True, **SAMPLING), SAMPLED),
        ("/v1/chat/completions", talk(temperature=0), CHAT),
    ],
    ids=["generate", "chat"],
)
def test_the_same_request_at_the_same_time_gets_the_same_answer(
    client: httpx.Client, path: str, body: dict[str, Any], shape: Shape
) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: client.post(path, json=body).json(), range(4)))
    assert differences(found, [shape], "hanok") == []
    answers = [one.get("generated_text", one.get("choices")) for one in found]
    assert answers == [answers[0]] * 4


INFO = {
    "model_id": str,
    "model_sha": (str, None),
    "model_pipeline_tag": (str, None),
    "max_concurrent_requests": int,
    "max_best_of": int,
    "max_stop_sequences": int,
    "max_input_tokens": int,
    "max_total_tokens": int,
    "validation_workers": int,
    "max_client_batch_size": int,
    "router": "text-generation-router",
    "version": str,
    "sha": (str, None),
    "docker_label": (str, None),
}
SIMPLE_TOKEN = {"id": int, "text": str, "start": int, "stop": int}
MODEL = {
    "id": str,
    "object": "model",
    "created": int,
    "owned_by": str,
    "max_model_len": Differs(tgi=ABSENT, hanok=int),
}


def test_what_tgi_tells_beside_generating(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert differences({key: info[key] for key in INFO}, INFO, "hanok") == []
    assert info["max_input_length"] == info["max_input_tokens"]  # TGI 1.x
    models = client.get("/v1/models").json()
    assert differences(models, {"object": "list", "data": [MODEL]}, "hanok") == []
    tokens = client.post("/tokenize", json=text()).json()
    assert tokens
    assert differences(tokens, [SIMPLE_TOKEN], "hanok") == []
    told = client.post("/chat_tokenize", json=talk()).json()
    shape = {"tokenize_response": [SIMPLE_TOKEN], "templated_text": str}
    assert differences(told, shape, "hanok") == []


def test_openais_client_joins_a_stream_to_the_message(server: Server) -> None:
    """Why the role is said once: what is repeated it would join."""
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
    options: Any = {key: value for key, value in talk().items() if key != "seed"}
    whole = sdk.chat.completions.create(**options, temperature=0)
    with sdk.chat.completions.stream(**options, temperature=0) as stream:
        for _ in stream:
            pass
        message = stream.current_completion_snapshot.choices[0].message
    assert message.role == "assistant"
    assert message.content == whole.choices[0].message.content


A_TOKEN = {"id": 1, "text": "a", "logprob": -1.0, "special": False}
BROKEN: list[tuple[Any, Shape, str]] = [
    (A_TOKEN | {"id": "1"}, TOKEN, "answer.id is '1', not <class 'int'>"),
    (A_TOKEN | {"id": True}, TOKEN, "answer.id is True, not <class 'int'>"),
    (A_TOKEN | {"more": 1}, TOKEN, "answer.more is 1, not nothing"),
    ({"generated_text": None}, TEXT, "answer.generated_text is None, not <class 'str'>"),
    ({}, TEXT, "answer.generated_text is nothing, not <class 'str'>"),
    ([A_TOKEN, 1], [TOKEN], "answer.1 is 1, not {"),
    ([A_TOKEN], [], "not []"),
    (A_TOKEN | {"logprob": None}, TOKEN, "answer.logprob is None"),
    ("tool", REASON, "answer is 'tool', not"),
]


@pytest.mark.parametrize(("value", "shape", "words"), BROKEN)
def test_what_does_not_fit_is_noticed(value: Any, shape: Shape, words: str) -> None:
    found = differences(value, shape, "hanok")
    assert len(found) == 1
    assert words in found[0]
