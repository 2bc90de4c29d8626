"""Conversations over the wire: what a written answer becomes, and what of a history is taken."""

import json
from typing import Any

import openai
import pytest
from tests.server.written import Given, Spelled, collected

from hanok.errors import RequestError
from hanok.server.answer import Reads
from hanok.server.chat import TOOL_PROMPT, Conversation, conversation_of
from hanok.server.errors import ServerError
from hanok.server.openai_models import ChatRequest
from hanok.server.routes.chat import ChatWriter

TOOLS: Any = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


def talk(ending: str = "", **body: Any) -> Conversation:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}]} | body)
    return conversation_of(Spelled(ending), request)  # type: ignore[arg-type]


def shown(*messages: Any) -> Any:
    return json.loads(talk(messages=list(messages)).text)[0]


def test_what_is_read_of_an_answer() -> None:
    assert talk().reads == Reads()
    assert set(talk(tools=TOOLS).reads.functions) == {"find"}
    assert not talk(tools=TOOLS, parallel_tool_calls=False).reads.allows_several
    assert talk("<think>\n").reads.opening == "<think>"
    assert talk("<think>\n\n</think>\n\n").reads.opening == ""
    assert talk("<think>\n", separate_reasoning=False).reads == Reads(
        reasoning=False, opening="<think>"
    )
    forced = talk("<think>\n", tools=TOOLS, tool_choice="required").reads
    assert (forced.is_forced, forced.reasoning) == (True, False)
    # What a grammar has written is what was asked for.
    described = {"type": "json_object"}
    assert talk("<think>", tools=TOOLS, response_format=described).reads == Reads(reasoning=False)


def test_special_tokens_that_are_read_are_spelled_out() -> None:
    assert talk().spelled_token_ids == (8,)
    assert talk(tools=TOOLS).spelled_token_ids == (5, 8)
    assert talk(separate_reasoning=False).spelled_token_ids == ()
    assert talk(separate_reasoning=False, tools=TOOLS).spelled_token_ids == (5,)


def test_a_history_is_read_in_the_forms_that_clients_send() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    sent = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert shown(sent) == [sent]
    assert shown({"role": "assistant", "content": "x", "tool_calls": []}) == [
        {"role": "assistant", "content": "x"}
    ]
    older = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": "{}"},
    }
    asked, answered = shown(older, {"role": "function", "name": "f", "content": "42"})
    assert asked["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert (answered["role"], answered["tool_call_id"]) == ("tool", asked["tool_calls"][0]["id"])
    parts = [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert shown({"role": "assistant", "content": parts})[0]["content"] == "ab"


def test_tools_are_told_by_the_template_or_in_the_last_message() -> None:
    class Without(Spelled):
        """Knows no tools."""

        def render_chat(self, messages: Any, **options: Any) -> str:
            return super().render_chat(messages, **options | {"tools": None})

    class Needs(Spelled):
        """Cannot do without them."""

        def render_chat(self, messages: Any, **options: Any) -> str:
            if options["tools"] is None:
                raise RequestError("no tools")
            return super().render_chat(messages, **options)

    request = ChatRequest(messages=[{"role": "user", "content": "hi"}], tools=TOOLS)
    for tokenizer, content in (
        (Spelled(), "hi"),
        (Needs(), "hi"),
        (Without(), f"hi\n---\n{json.dumps(TOOLS)}\n{TOOL_PROMPT}"),
    ):
        text = conversation_of(tokenizer, request).text  # type: ignore[arg-type]
        assert json.loads(text)[0] == [{"role": "user", "content": content}]


def deep(levels: int) -> str:
    return '{"a": ' + "[" * levels + "]" * levels + "}"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"tool_calls": 5}, "tool_calls must be a list"),
        ({"tool_calls": True}, "tool_calls must be a list"),
        ({"tool_calls": {"a": 1}}, "tool_calls must be a list"),
        ({"tool_calls": [5]}, "without a function's name"),
        ({"function_call": 5}, "without a function's name"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": deep(900)}}]}, "deeper than 64"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": deep(99999)}}]}, "many arrays"),
        ({"content": [{"type": "image_url"}]}, "image modality is not supported"),
        ({"content": [{"type": "text", "text": 5}]}, "a part without a text"),
        ({"content": 5}, "a string or a list of parts"),
    ],
)
def test_a_message_that_is_not_one_is_refused(message: Any, words: str) -> None:
    with pytest.raises(ServerError, match=words) as caught:
        shown({"role": "assistant", "content": None} | message)
    assert caught.value.status == 422


def written(pieces: list[str], reason: str = "eos_token", **body: Any) -> tuple[Any, list[Any]]:
    """The message of an answer whole, and its choices in a stream."""
    ticket = Given(pieces, reason)

    def writer() -> ChatWriter:
        request = ChatRequest.model_validate({"messages": [{"role": "user"}]} | body)
        return ChatWriter(body=request, talk=talk(**body), tokenizer=None, ticket=ticket)  # type: ignore[arg-type]

    stream = writer().stream(0)
    return writer().whole(0, ticket.events), list(collected(stream))


def test_a_call_is_whole_in_an_answer_and_in_pieces_in_a_stream() -> None:
    pieces = [
        "Well. ",
        "<tool_call>",
        '{"name": "fi',
        'nd", "arguments": {"a',
        '": 1}}',
        "\n</tool_call>",
    ]
    whole, chunks = written(pieces, tools=TOOLS)
    (call,) = whole["message"]["tool_calls"]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("Well.", "tool_calls")
    assert call["function"] == {"name": "find", "arguments": '{"a": 1}'}
    deltas = [chunk["delta"] for chunk in chunks]
    calls = [item for delta in deltas for item in delta.get("tool_calls", ())]
    assert [item["function"].get("name") for item in calls] == ["find", None, None]
    assert [item["function"]["arguments"] for item in calls] == ["", '{"a', '": 1}']
    assert "".join(delta.get("content", "") for delta in deltas) == "Well."
    assert [chunk["finish_reason"] for chunk in chunks][-2:] == [None, "tool_calls"]


def test_a_demanded_call_that_is_cut_off_is_half_a_call() -> None:
    pieces = ['{"name": "find", "arguments": {"a', '": "b']
    whole, chunks = written(pieces, "length", tools=TOOLS, tool_choice="required")
    assert whole["finish_reason"] == chunks[-1]["finish_reason"] == "length"
    assert whole["message"]["content"] is None
    assert whole["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "b'


def test_reasoning_has_a_field_of_its_own() -> None:
    pieces = ["<think>", "Hm. ", "Yes.", "</think>", "\n\n", "It is."]
    whole, chunks = written(pieces)
    assert whole["message"] == {
        "role": "assistant",
        "content": "It is.",
        "reasoning_content": "Hm. Yes.",
    }
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm. Yes."
    assert "".join(delta.get("content", "") for delta in deltas) == "It is."
    kept, _ = written(pieces, separate_reasoning=False)
    assert kept["message"]["content"] == "".join(pieces)


def test_tokens_of_reasoning_are_counted() -> None:
    pieces = ["<think>", "Hm. ", "Yes.", "</think>", "\n\n", "It is."]
    ticket = Given(pieces, "eos_token")
    writer = ChatWriter(
        body=ChatRequest(messages=[{"role": "user"}]),
        talk=talk(),
        tokenizer=None,  # type: ignore[arg-type]
        ticket=ticket,  # type: ignore[arg-type]
    )
    writer.whole(0, ticket.events)
    assert writer.num_reasoning_tokens == 3


def test_nested_models_are_filled(sdk: openai.OpenAI) -> None:
    """What instructor and pydantic-ai send: references, where the call is demanded."""
    parameters = {
        "type": "object",
        "properties": {"seat": {"$ref": "#/$defs/Seat"}},
        "required": ["seat"],
        "additionalProperties": False,  # which a small model would go on writing
        "$defs": {
            "Seat": {
                "type": "object",
                "properties": {"kind": {"$ref": "#/$defs/Kind"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
            "Kind": {"enum": ["aisle", "window"]},
        },
    }
    found = sdk.chat.completions.create(
        model="bundled",
        messages=[{"role": "user", "content": "Where?"}],
        tools=[{"type": "function", "function": {"name": "sit", "parameters": parameters}}],
        tool_choice="required",
        max_tokens=80,
    )
    (call,) = found.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert json.loads(call.function.arguments)["seat"]["kind"] in ("aisle", "window")
