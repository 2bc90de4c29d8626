"""OpenAI's Responses: what items become, what answers become, and the contract with its own client."""

import json
from typing import Any, Literal

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from tests.server.conftest import LocalServer, Server
from tests.server.written import Given, Spelled, collected

from hanok.server.chat import conversation_of
from hanok.server.errors import ServerError
from hanok.server.openai_models import ChatRequest
from hanok.server.responses_input import chat_request
from hanok.server.responses_models import ResponseBody, ResponsesRequest
from hanok.server.routes.responses import ResponseWriter

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
FIND: Any = {"type": "function", "name": "find", "parameters": {"type": "object"}, "strict": True}
ASKED = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Where?"}]}


def asked(**body: Any) -> ChatRequest:
    return chat_request(ResponsesRequest.model_validate({"input": "hi"} | body))


def messages(*items: Any, **body: Any) -> list[dict[str, Any]]:
    return asked(input=list(items), **body).messages


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"a": 1}'}
    output = {"type": "function_call_output", "call_id": "c1", "output": "42"}
    spoken = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
    }
    thought = {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    found = messages(
        {"role": "developer", "content": "Be short."},
        ASKED,
        thought,
        spoken,
        call,
        {**call, "call_id": "c2"},
        output,
        {**output, "call_id": "c2", "output": [{"type": "input_text", "text": "43"}]},
        {"role": "assistant", "content": "It is 42."},
        instructions="Be kind.",
    )
    function = {"name": "find", "arguments": '{"a": 1}'}
    assert found == [
        {"role": "system", "content": "Be kind.\n\nBe short."},
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": function},
                {"id": "c2", "type": "function", "function": function},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "tool", "tool_call_id": "c2", "content": "43"},
        {"role": "assistant", "content": "It is 42."},
    ]
    # A model that thinks for others alone, and turns that follow one another.
    assert messages(
        ASKED, {"type": "reasoning", "summary": [], "encrypted_content": "x"}, call
    ) == [
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
    ]
    assert [m["content"] for m in messages(spoken, spoken)] == ["Let me see."] * 2


def test_fields_become_those_of_a_chat_request() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found = asked(
        tools=[FIND],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [FIND]},
        max_output_tokens=7,
        text={"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}},
        reasoning={"effort": "none", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        store=True,
        top_k=3,
        seed=5,
    )
    function = {"name": "find", "parameters": {"type": "object"}}
    assert found.tools == [{"type": "function", "function": function}]
    assert found.max_completion_tokens == 7
    assert found.response_format == {"type": "json_schema", "json_schema": {"schema": schema}}
    assert found.chat_template_kwargs == {"reasoning_effort": "none", "enable_thinking": False}
    assert (found.top_k, found.seed, found.logprobs) == (3, 5, False)
    assert asked(include=["message.output_text.logprobs"]).logprobs
    # The input is answered, also where it ends with the assistant's words.
    last = asked(input=[ASKED, {"role": "assistant", "content": "It is"}])
    tokenizer: Any = Spelled()
    conversation_of(tokenizer, last)
    assert not tokenizer.options["continue_final_message"]
    assert tokenizer.options["add_generation_prompt"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"previous_response_id": "resp_1"}, "`previous_response_id` .* nothing is stored"),
        ({"conversation": {"id": "c"}}, "`conversation` .* nothing is stored"),
        ({"background": True}, "`background` is not supported"),
        ({"prompt": {"id": "p"}}, "no prompts are stored"),
        (
            {"include": ["file_search_call.results"]},
            "`include` asks for 'file_search_call.results'",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0 is of type 'web_search'"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools.0.name must be a string"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format.schema` is missing",
        ),
        ({"n": 2}, "`n` is not a field of /v1/responses"),
        ({"input": []}, "`input` cannot be empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0 refers to a stored item"),
        ({"input": [{"type": "computer_call"}]}, "input.0 is of type 'computer_call'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role must be user"),
        ({"input": [{"role": ["user"]}]}, "input.0.role must be user"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.arguments must be a string"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id must be"),
        ({"input": [{"type": "reasoning", "content": [5]}]}, "$"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "image modality is not supported",
        ),
    ],
)
def test_what_is_not_there_is_refused(body: dict[str, Any], words: str) -> None:
    if words == "$":
        assert asked(**body, instructions="x").messages[1:] == []
        return
    with pytest.raises(ServerError, match=words) as caught:
        asked(**body)
    assert caught.value.status == 422


def written(pieces: list[str], reason: str = "eos_token", **body: Any) -> tuple[Any, list[Any]]:
    """An answer whole, and its events in a stream, each of which openai's types know."""
    request = ResponsesRequest.model_validate({"input": "hi"} | body)
    tokenizer: Any = Spelled()
    ticket: Any = Given(pieces, reason)

    def writer() -> ResponseWriter:
        return ResponseWriter(
            id="1",
            model="m",
            created_at=0,
            body=request,
            reads=conversation_of(tokenizer, chat_request(request)).reads,
            tokenizer=tokenizer,
            ticket=ticket,
        )

    events = list(collected(writer().stream()))
    for number, event in enumerate(events):
        EVENT.validate_python(json.loads(json.dumps(event)))
        assert event["sequence_number"] == number
    whole = writer().whole(ticket.events)
    Response.model_validate(whole)
    assert ResponseBody.model_validate(whole).model_dump() == whole
    return whole, events


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: item[key] for key in item if key not in ("id", "call_id")} for item in items]


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a client has when it reads the deltas alone."""
    items: list[dict[str, Any]] = []
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(items)
                items.append(json.loads(json.dumps(event["item"])))
            case "content_part.added":
                items[-1]["content"].append(json.loads(json.dumps(event["part"])))
            case "output_text.delta":
                items[-1]["content"][event["content_index"]]["text"] += event["delta"]
                items[-1]["content"][event["content_index"]]["logprobs"] += event["logprobs"]
            case "reasoning_text.delta":
                items[-1]["content"][event["content_index"]]["text"] += event["delta"]
            case "function_call_arguments.delta":
                items[-1]["arguments"] += event["delta"]
            case "output_item.done":
                items[-1]["status"] = event["item"]["status"]
                assert items[-1] == event["item"]
    return items


PIECES = [
    "<think>",
    "Hm. ",
    "",
    "Yes.",
    "</think>",
    "\n\n",
    "It ",
    "is. ",
    "<tool_call>",
    '{"name": "find", "arguments": {"a',
    '": 1}}',
    "</tool_call>",
]


def test_an_answer_is_what_its_events_put_together() -> None:
    whole, events = written(PIECES, tools=[FIND])
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    reasoning, message, call = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm. Yes."}]
    assert message["content"][0]["text"] == "It is."
    assert (call["name"], call["arguments"]) == ("find", '{"a": 1}')
    assert {item["status"] for item in whole["output"]} == {whole["status"]} == {"completed"}
    assert whole["usage"] == {
        "input_tokens": 2,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": len(PIECES),
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 2 + len(PIECES),
    }
    assert (whole["store"], whole["previous_response_id"]) == (False, None)

    last = events[-1]["response"]
    assert without_ids(put_together(events)) == without_ids(whole["output"])
    assert without_ids(last["output"]) == without_ids(whole["output"])
    assert {**last, "output": []} == {**whole, "output": []}
    text = ["content_part.added", "output_text.delta", "output_text.delta", "output_text.done"]
    assert names(events) == [
        "created",
        "in_progress",
        "output_item.added",
        *(name.replace("output_text", "reasoning_text") for name in text),
        "content_part.done",
        "output_item.done",
        "output_item.added",
        *text,
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_an_answer_that_is_cut_off_is_incomplete_and_so_is_its_last_item() -> None:
    for pieces, statuses in (
        (PIECES[:-2], ["completed", "completed", "incomplete"]),
        (PIECES[:7], ["completed", "incomplete"]),
        (PIECES[:2], ["incomplete"]),
    ):
        whole, events = written(pieces, "length", tools=[FIND])
        assert [item["status"] for item in whole["output"]] == statuses
        assert whole["status"] == "incomplete"
        assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
        assert names(events)[-1] == "incomplete"
        assert without_ids(put_together(events)) == without_ids(whole["output"])


def test_log_probabilities_are_of_the_tokens_that_wrote_the_text() -> None:
    whole, events = written(PIECES, tools=[FIND], top_logprobs=1)
    reasoning, message, _ = whole["output"]
    assert "logprobs" not in reasoning["content"][0]
    assert len(message["content"][0]["logprobs"]) == 2
    assert without_ids(put_together(events)) == without_ids(whole["output"])


def test_who_writes_nothing_says_nothing() -> None:
    whole, events = written([""])
    assert [part["text"] for part in whole["output"][0]["content"]] == [""]
    assert names(events)[2:] == [
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


class Seat(BaseModel):
    kind: Literal["aisle", "window"]


class Trip(BaseModel):
    seat: Seat
    is_return: bool


WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather at a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"enum": ["Seoul", "Bonn"]}},
        "required": ["place"],
        "additionalProperties": False,
    },
    "strict": True,
}


def test_the_client_reads_whole_answers_and_streams(sdk: openai.OpenAI) -> None:
    options: Any = {
        "model": "bundled",
        "input": "Tell me of a dog.",
        "max_output_tokens": 12,
        "temperature": 0,
    }
    whole = sdk.responses.create(**options, metadata={"a": "b"}, store=True)
    Response.model_validate(whole.model_dump(mode="json"))
    assert whole.output_text
    assert (whole.status, whole.metadata, whole.model_extra) == (
        "incomplete",
        {"a": "b"},
        {"store": False},
    )
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    events = list(sdk.responses.create(**options, stream=True, top_logprobs=2))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(delta.delta for delta in deltas) == whole.output_text
    told = [item for delta in deltas for item in delta.logprobs]
    assert "".join(item.token for item in told) == whole.output_text
    assert all(len(item.top_logprobs or ()) == 2 for item in told)
    with sdk.responses.stream(**options) as stream:
        snapshots = [
            event.snapshot for event in stream if event.type == "response.output_text.delta"
        ]
    assert snapshots[-1] == whole.output_text
    count = sdk.responses.input_tokens.count(model="bundled", input="Tell me of a dog.")
    assert count.input_tokens == whole.usage.input_tokens
    chat = sdk.chat.completions.create(
        model="bundled",
        messages=[{"role": "user", "content": "Tell me of a dog."}],
        max_tokens=12,
        temperature=0,
    )
    assert chat.choices[0].message.content == whole.output_text


def test_models_are_filled(sdk: openai.OpenAI) -> None:
    options: Any = {
        "model": "bundled",
        "input": "Where?",
        "max_output_tokens": 200,
        "temperature": 0,
    }
    parsed = sdk.responses.parse(**options, text_format=Trip)
    assert isinstance(parsed.output_parsed, Trip)
    with sdk.responses.stream(**options, text_format=Trip) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_a_function_is_called_and_its_answer_taken(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "bundled", "tools": [WEATHER], "max_output_tokens": 80}
    question: Any = {"role": "user", "content": "How is the weather?"}
    for choice in ("required", {"type": "function", "name": "weather"}):
        first = sdk.responses.create(**options, input=[question], tool_choice=choice)
        (call,) = first.output
        assert call.type == "function_call"
        assert json.loads(call.arguments)["place"] in ("Seoul", "Bonn")
        answered = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        second = sdk.responses.create(
            **options,
            input=[question, call.model_dump(exclude_none=True), answered],
            tool_choice="none",
        )
        assert second.output_text
    with sdk.responses.stream(**options, input=[question], tool_choice="required") as stream:
        stream.until_done()
        (call,) = stream.get_final_response().output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["place"] in ("Seoul", "Bonn")


def test_errors_have_openais_shape(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"tokens \(\d+ in the input") as caught:
        sdk.responses.create(model="bundled", input="dog " * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        sdk.responses.create(model="other", input="dog")
    with pytest.raises(openai.UnprocessableEntityError, match="nothing is stored here"):
        sdk.responses.create(model="bundled", input="dog", previous_response_id="resp_1")
    for call in (
        sdk.responses.retrieve,
        sdk.responses.delete,
        sdk.responses.cancel,
        sdk.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError, match="'resp_1': answers are not stored here"):
            call("resp_1")


def test_a_stream_that_fails_says_so(local: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(batch: Any) -> Any:
        raise RuntimeError("a broken kernel")

    monkeypatch.setattr(local.engine._runner, "_hidden_states", faulty)
    with openai.OpenAI(base_url=f"{local.url}/v1", api_key="k", max_retries=0) as sdk:
        events = list(sdk.responses.create(model="bundled", input="dog", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.failed",
    ]
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error is not None
    assert "a broken kernel" in events[-1].response.error.message


def test_langchain(server: Server) -> None:
    options: Any = {"base_url": f"{server.url}/v1", "api_key": "k", "max_retries": 0}
    chat = ChatOpenAI(
        model="bundled", use_responses_api=True, max_tokens=80, temperature=0, **options
    )
    whole = chat.invoke("Tell me of a dog.")
    assert "".join(str(chunk.text) for chunk in chat.stream("Tell me of a dog.")) == whole.text
    schema = {"title": "weather", **WEATHER["parameters"]}
    called = chat.bind_tools([schema], tool_choice="any").invoke("How is it?")
    assert called.tool_calls[0]["args"]["place"] in ("Seoul", "Bonn")
    filled = chat.with_structured_output(schema, method="json_schema").invoke("How is it?")
    assert isinstance(filled, dict)
    assert filled["place"] in ("Seoul", "Bonn")
