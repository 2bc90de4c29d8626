"""Anthropic's Messages: what blocks become, what answers become, and the contract on the wire."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic_core import from_json
from tests.server.conftest import (
    TIMEOUT_S,
    LocalServer,
    Server,
    local_server,
    start_server,
    stop,
    wait_until_ready,
)
from tests.server.written import Given, Spelled, collected

from hanok.engine.model import Model
from hanok.server.chat import conversation_of
from hanok.server.errors import ServerError
from hanok.server.messages_input import chat_request
from hanok.server.messages_models import CountTokensRequest, MessageBody, MessagesRequest
from hanok.server.openai_models import ChatRequest
from hanok.server.routes.messages import MessageWriter

HI = {"role": "user", "content": "hi"}
SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["Seoul", "Bonn"]}},
    "required": ["place"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "description": "The weather.", "input_schema": SCHEMA}


def asked(**body: Any) -> ChatRequest:
    given = {"max_tokens": 9, "messages": [HI]} | body
    return chat_request(MessagesRequest.model_validate(given))


def messages(*turns: Any, **body: Any) -> list[dict[str, Any]]:
    return asked(messages=list(turns), **body).messages


def test_blocks_become_messages() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    found = messages(
        {"role": "user", "content": [{"type": "text", "text": "a", **cached}]},
        {"role": "user", "content": "b"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"place": "Bonn"}},
                {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"},
                {
                    "type": "tool_result",
                    "tool_use_id": "c2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "place"}],
                },
                {"type": "tool_result", "tool_use_id": "c3"},
                {"type": "text", "text": "And?"},
            ],
        },
        {"role": "assistant", "content": "It is"},
        system=[
            {"type": "text", "text": "Be short.", **cached},
            {"type": "text", "text": "Be kind."},
        ],
    )

    def call(name: str, arguments: Any) -> dict[str, Any]:
        function = {"name": "weather", "arguments": arguments}
        return {"id": name, "type": "function", "function": function}

    assert found == [
        {"role": "system", "content": "Be short.\n\nBe kind."},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [call("c1", {"place": "Bonn"}), call("c2", {})],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: no\nplace"},
        {"role": "tool", "tool_call_id": "c3", "content": ""},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "It is"},
    ]


def test_fields_become_those_of_a_chat_request() -> None:
    found = asked(
        tools=[WEATHER],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["x"],
        temperature=0.5,
        top_k=3,
        seed=7,
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": "u"},
    )
    function = {"name": "weather", "description": "The weather.", "parameters": SCHEMA}
    assert found.tools == [{"type": "function", "function": function}]
    assert (found.tool_choice, found.parallel_tool_calls) == ("required", False)
    assert (found.stop, found.temperature, found.top_k, found.seed) == (["x"], 0.5, 3, 7)
    assert found.chat_template_kwargs == {"enable_thinking": True, "reasoning_effort": "low"}
    assert asked(thinking={"type": "disabled"}).chat_template_kwargs == {"enable_thinking": False}
    assert asked().chat_template_kwargs == {}
    named = asked(tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"})
    assert named.tool_choice == {"type": "function", "function": {"name": "weather"}}
    described = asked(output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert described.response_format == {"type": "json_schema", "json_schema": {"schema": SCHEMA}}


def test_an_answer_that_was_begun_goes_on() -> None:
    tokenizer: Any = Spelled()
    for last, goes_on in ((HI, False), ({"role": "assistant", "content": "It is"}, True)):
        conversation_of(tokenizer, asked(messages=[HI, last]))
        assert tokenizer.options["continue_final_message"] is goes_on
        assert tokenizer.options["add_generation_prompt"] is not goes_on


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (user({"type": "image", "source": {}}), "messages.0 has a block of type 'image'"),
        (user({"type": "document", "source": {}}), "a block of type 'document'"),
        (user({"type": "tool_use", "id": "a", "name": "b"}), "a block of type 'tool_use'"),
        (user({"type": "text", "text": 5}), "whose `text` is not a string"),
        (user(5), "messages.0.content must be a string or a list of blocks"),
        (user({"type": "tool_result"}), "without a `tool_use_id`"),
        (
            user({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}),
            "a block of type 'image'",
        ),
        (assistant({"type": "server_tool_use"}), "a block of type 'server_tool_use'"),
        (assistant({"type": "tool_use", "id": "a"}), "whose `name` is not a string"),
        (assistant({"type": "tool_use", "id": "a", "name": "b", "input": [1]}), "is not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role must be user"),
        ({"messages": [{"role": "user"}]}, "messages.0.content must be"),
        ({"system": [{"type": "image"}]}, "system has a block of type 'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0 is of type"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema must be"),
        ({"tools": [{"input_schema": {}}]}, "tools.0.name must be"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "`tool_choice.name` is missing"),
        ({"mcp_servers": [{"url": "x"}]}, "`mcp_servers` is not supported"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "made shorter"),
        ({"n": 2}, "`n` is not a field of /v1/messages"),
    ],
)
def test_what_is_not_there_is_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(ServerError, match=words):
        asked(**body)


def test_to_count_what_makes_no_prompt_is_of_no_account() -> None:
    body = {"messages": [HI], "tools": [WEATHER], "max_tokens": 9, "stream": True, "temperature": 5}
    found = chat_request(CountTokensRequest.model_validate(body))
    assert (found.max_tokens, found.stream) == (None, False)
    assert found.tools == asked(**body | {"temperature": 1}).tools


def written(
    pieces: list[str], reason: str = "eos_token", stop: str = "", **body: Any
) -> tuple[Any, list[Any]]:
    """An answer whole, and its events in a stream."""
    request = MessagesRequest.model_validate({"max_tokens": 9, "messages": [HI]} | body)
    tokenizer: Any = Spelled()
    ticket: Any = Given(pieces, reason, stop)

    def writer() -> MessageWriter:
        return MessageWriter(
            id="msg_1",
            model="m",
            max_tokens=request.max_tokens,
            reads=conversation_of(tokenizer, chat_request(request)).reads,
            ticket=ticket,
        )

    whole = writer().whole(ticket.events)
    assert MessageBody.model_validate(whole).model_dump() == whole
    return whole, list(collected(writer().stream()))


def put_together(events: list[Any]) -> dict[str, Any]:
    """The message that a client has of a stream."""
    message: dict[str, Any] = {}
    text = ""
    for event in events:
        match event["type"]:
            case "message_start":
                message = json.loads(json.dumps(event["message"]))
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(json.loads(json.dumps(event["content_block"])))
                text = ""
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        text += delta["partial_json"]
                        block["input"] = from_json(text, allow_partial=True)
            case "message_delta":
                message |= event["delta"]
                message["usage"] = event["usage"]
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{**block, "id": ""} for block in message["content"]]
    return {**message, "content": blocks}


PIECES = [
    "<think>",
    "Hm. ",
    "Yes.",
    "</think>",
    "It ",
    "is. ",
    "<tool_call>",
    '{"name": "weather", "arguments": {"place',
    '": "Bo',
    'nn", "a": 1}}',
    "</tool_call>",
]


def test_an_answer_is_what_its_events_put_together() -> None:
    whole, events = written(PIECES, tools=[WEATHER])
    thinking, text, call = whole["content"]
    assert thinking == {"type": "thinking", "thinking": "Hm. Yes.", "signature": ""}
    assert text == {"type": "text", "text": "It is."}
    assert (call["name"], call["input"]) == ("weather", {"place": "Bonn", "a": 1})
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("tool_use", None)
    assert whole["usage"] == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": len(PIECES),
        "output_tokens_details": {"thinking_tokens": 3},
    }
    assert without_ids(put_together(events)) == without_ids(whole)
    delta, end = "content_block_delta", "content_block_stop"
    assert [event["type"] for event in events] == [
        "message_start",
        *("content_block_start", delta, delta, delta, end),  # the last delta is the signature
        *("content_block_start", delta, delta, end),
        *("content_block_start", delta, delta, delta, end),
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    ("num_pieces", "reason", "options", "stopped", "found"),
    [
        (6, "eos_token", {}, ("end_turn", None), None),
        (6, "stop_sequence", {}, ("stop_sequence", "END"), None),
        (6, "length", {"max_tokens": 6}, ("max_tokens", None), None),
        (6, "length", {"max_tokens": 7}, ("model_context_window_exceeded", None), None),
        # Of a call that was cut off, what is certain.
        (8, "length", {"max_tokens": 8}, ("max_tokens", None), {}),
        (9, "length", {"max_tokens": 9}, ("max_tokens", None), {}),
    ],
)
def test_why_an_answer_ends(
    num_pieces: int, reason: str, options: Any, stopped: Any, found: Any
) -> None:
    whole, events = written(PIECES[:num_pieces], reason, "END", tools=[WEATHER], **options)
    assert (whole["stop_reason"], whole["stop_sequence"]) == stopped
    assert without_ids(put_together(events)) == without_ids(whole)
    if found is not None:
        assert whole["content"][-1]["input"] == found


def test_a_call_that_is_not_json_does_not_wait_for_an_answer() -> None:
    pieces = ["<tool_call>", '{"name": "weather", "arguments": {"place": "Bonn", ', "oh no!"]
    whole, events = written(pieces, tools=[WEATHER])
    assert [block["type"] for block in whole["content"]] == ["text"]
    told = put_together(events)
    assert whole["stop_reason"] == told["stop_reason"] == "end_turn"
    assert told["content"][0]["input"] == {"place": "Bonn"}


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream; each has its type for a name."""
    found = []
    for part in response.text.split("\n\n"):
        lines = part.split("\n")
        if lines[0].startswith("event: "):
            found.append(json.loads(lines[1].removeprefix("data: ")))
            assert found[-1]["type"] == lines[0].removeprefix("event: ")
    return found


ASKED: Any = {
    "model": "bundled",
    "messages": [{"role": "user", "content": "Tell me of a dog."}],
    "max_tokens": 12,
    "temperature": 0,
}


def test_whole_answers_streams_and_counts(client: httpx.Client) -> None:
    whole = client.post("/v1/messages", json=ASKED)
    assert whole.headers["request-id"] == whole.headers["x-request-id"]
    message = whole.json()
    (block,) = message["content"]
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", 12)
    streamed = put_together(events_of(client.post("/v1/messages", json={**ASKED, "stream": True})))
    assert streamed["content"] == message["content"]
    chat = client.post("/v1/chat/completions", json=ASKED).json()
    assert chat["choices"][0]["message"]["content"] == block["text"]
    counted = client.post(
        "/v1/messages/count_tokens", json={name: ASKED[name] for name in ("model", "messages")}
    ).json()
    assert counted == client.post("/v1/messages/count_tokens", json=ASKED).json()
    for route, body in (
        ("/v1/messages", ASKED),
        ("/v1/responses", {"input": "Tell me of a dog.", "max_output_tokens": 12}),
    ):
        explained = client.post("/explain", json={"route": route, "body": body}).json()
        assert len(explained["prompts"][0]["token_ids"]) == counted["input_tokens"]
        assert explained["parameters"]["max_new_tokens"] == {"value": 12, "origin": "request"}
    assert counted == {"input_tokens": chat["usage"]["prompt_tokens"]}
    used = streamed["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == counted["input_tokens"]
    # The text that the answer stopped at is told; so is the end of the context.
    stop_text = block["text"].split()[3]
    stopped = client.post(
        "/v1/messages", json={**ASKED, "stop_sequences": ["x!", stop_text]}
    ).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop_text)
    assert block["text"].startswith(stopped["content"][0]["text"] + stop_text)
    prompt = [{"role": "user", "content": "dog " * 990}]
    full = client.post("/v1/messages", json={**ASKED, "messages": prompt, "max_tokens": 50_000})
    assert full.json()["stop_reason"] in ("end_turn", "model_context_window_exceeded")
    begun = [*ASKED["messages"], {"role": "assistant", "content": block["text"][:9]}]
    rest = client.post("/v1/messages", json={**ASKED, "messages": begun}).json()["content"][0]
    assert (block["text"][:9] + rest["text"]).startswith(block["text"])


def test_a_tool_is_called_and_its_result_taken(client: httpx.Client) -> None:
    options = {**ASKED, "tools": [WEATHER], "max_tokens": 80}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        for is_stream in (False, True):
            response = client.post(
                "/v1/messages", json={**options, "tool_choice": choice, "stream": is_stream}
            )
            found = put_together(events_of(response)) if is_stream else response.json()
            assert found["stop_reason"] == "tool_use"
            (call,) = found["content"]
            assert call["input"]["place"] in ("Seoul", "Bonn")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}
    history = [
        *ASKED["messages"],
        {"role": "assistant", "content": found["content"]},
        {"role": "user", "content": [result]},
    ]
    answer = client.post("/v1/messages", json={**options, "messages": history}).json()
    assert answer["content"]
    described = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    text = client.post("/v1/messages", json={**ASKED, **described, "max_tokens": 80}).json()
    assert json.loads(text["content"][0]["text"])["place"] in ("Seoul", "Bonn")


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"model": "other"}, 404, "not_found_error", "'other' does not exist"),
        (user({"type": "image"}), 400, "invalid_request_error", "'image'"),
        ({"timeout": 1e-9}, 504, "timeout_error", "within"),
    ],
)
def test_errors_have_anthropics_shape(
    client: httpx.Client, body: Any, status: int, kind: str, words: str
) -> None:
    found = client.post("/v1/messages", json=ASKED | body)
    assert found.status_code == status
    assert found.json()["type"] == "error"
    assert found.json()["error"]["type"] == kind
    assert words in found.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_told_in_anthropics_words(client: httpx.Client) -> None:
    history = [{"role": "user", "content": "dog " * 5000}]
    count = client.post("/v1/messages/count_tokens", json={"messages": history}).json()
    found = client.post("/v1/messages", json=ASKED | {"messages": history})
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"
    told = re.fullmatch(
        r"prompt is too long: (\d+) tokens > 1023 maximum( \(there may be more\))?",
        found.json()["error"]["message"],
    )
    assert told is not None
    assert 1023 < int(told[1]) <= count["input_tokens"]
    assert told[2] or int(told[1]) == count["input_tokens"]


@pytest.fixture(scope="module")
def guarded() -> Any:
    found = start_server("--api-key", "Secret", "--max-concurrent-requests", "1")
    try:
        wait_until_ready(found)
        yield found
    finally:
        stop(found)


def test_the_key_comes_in_either_header_and_no_room_is_told(guarded: Server) -> None:
    with guarded.client() as client:
        for headers, status in (
            ({}, 401),
            ({"x-api-key": "secret"}, 401),
            ({"authorization": "Secret"}, 401),
            ({"x-api-key": "Secret"}, 200),
            ({"authorization": "Bearer Secret"}, 200),
            ({"x-api-key": "Secret", "authorization": "Bearer other"}, 200),
        ):
            found = client.post("/v1/messages", json=ASKED, headers=headers)
            assert found.status_code == status, headers
            if status == 401:
                assert found.json()["error"]["type"] == "authentication_error"
        key = {"x-api-key": "Secret"}
        assert client.post("/v1/chat/completions", json=ASKED, headers=key).status_code == 401
        long = {**ASKED, "max_tokens": 200, "ignore_eos": True}
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(lambda _: client.post("/v1/messages", json=long, headers=key), range(4))
            )
        assert {answer.status_code for answer in answers} == {200, 529}
        found = next(answer for answer in answers if answer.status_code == 529)
        assert found.json()["error"]["type"] == "overloaded_error"
        assert int(found.headers["retry-after"]) >= 1


def test_a_stream_that_fails_says_so(local: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(batch: Any) -> Any:
        raise RuntimeError("a broken kernel")

    with local.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(local.engine._runner, "_hidden_states", faulty)
            found = events_of(client.post("/v1/messages", json={**ASKED, "stream": True}))
        assert found[-1]["error"]["type"] == "api_error"
        assert "a broken kernel" in found[-1]["error"]["message"]


def test_a_stream_that_waits_pings(local_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pinged = threading.Event()
    with local_server(local_model, keep_alive_s=0.01) as local, local.client() as client:
        forward = local.engine._runner._hidden_states

        def waiting(batch: Any) -> Any:
            assert pinged.wait(TIMEOUT_S)
            return forward(batch)

        monkeypatch.setattr(local.engine._runner, "_hidden_states", waiting)
        with client.stream("POST", "/v1/messages", json={**ASKED, "stream": True}) as response:
            lines = response.iter_lines()
            assert [next(lines), json.loads(next(lines).removeprefix("data: "))] == [
                "event: ping",
                {"type": "ping"},
            ]
            pinged.set()
            assert "event: message_stop" in list(lines)
