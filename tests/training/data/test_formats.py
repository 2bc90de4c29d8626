"""Formats: each row becomes the conversation it stands for; what is not clear is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from hanok.errors import DataError
from hanok.training.data.formats import (
    BadRowError,
    Completion,
    Conversation,
    Text,
    detect,
    to_record,
)

FILE = Path("rows.jsonl")
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"name": "weather", "arguments": {"city": "Seoul"}}
CALLED = [{"type": "function", "function": CALL}]


def shared(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in turns], **more}


ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": shared(("human", "Hi"), ("gpt", "Hello")),
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt-completion": {"prompt": "Hi", "completion": "Hello"},
    "text": {"text": "Hi. Hello."},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_detected_by_its_columns(name: str) -> None:
    assert detect(FILE, [ROWS[name], {**ROWS[name], "id": 3}, "not an object"]) == name


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b", "text": "ab"}],
            "several formats fit: prompt-completion, text",
        ),
        ([ROWS["alpaca"], ROWS["text"]], "several formats fit: alpaca, text"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "these rows are preference pairs"),
        ([{**ROWS["messages"], "label": True}], "these rows are answers judged one by one"),
        ([{"question": "a", "answer": "b"}], "no known format; its columns are answer, question"),
        ([[1, 2]], "no known format; its rows are not objects"),
        ([], "no known format"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_candidates(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        detect(FILE, rows)
    assert message in str(raised.value)
    assert "rows.jsonl:" in str(raised.value)


def test_the_same_conversation_in_every_format() -> None:
    expected = Conversation(messages=[USER, ANSWER], learnt=[False, True])
    for name in ("messages", "sharegpt", "alpaca"):
        assert to_record(ROWS[name], name) == expected
    assert to_record({"conversations": [USER, ANSWER]}, "messages") == expected
    listed = {"prompt": [USER], "completion": [ANSWER]}
    assert to_record(listed, "prompt-completion") == expected
    assert to_record(ROWS["text"], "text") == Text(text="Hi. Hello.")
    assert to_record(ROWS["prompt-completion"], "prompt-completion") == Completion(
        prompt="Hi", completion="Hello"
    )


def conversation(row: dict[str, Any], name: str) -> Conversation:
    found = to_record(row, name)
    assert isinstance(found, Conversation)
    return found


def test_alpaca_has_input_system_and_history() -> None:
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    assert conversation(row, "alpaca").messages == [
        {"role": "system", "content": "Be brief."},
        USER,
        ANSWER,
        {"role": "user", "content": "Add.\n1 2"},
        {"role": "assistant", "content": "3"},
    ]


def test_sharegpt_has_calls_and_their_results() -> None:
    tools = json.dumps([{"name": "weather", "parameters": {}}])
    row = shared(
        ("human", "Rain?"),
        ("function_call", json.dumps(CALL)),
        ("observation", "sunny"),
        ("gpt", "No."),
        tools=tools,
        system="Be kind.",
    )
    found = conversation(row, "sharegpt")
    assert found.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": CALLED},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "No."},
    ]
    assert found.learnt == [False, False, True, False, True]
    assert found.tools == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_turns_that_answer_nothing_are_left_out_and_said() -> None:
    row = shared(
        ("system", "S"), ("gpt", "Lost"), ("human", "Hi"), ("gpt", "Hello"), ("human", "?")
    )
    found = conversation(row, "sharegpt")
    assert [m["content"] for m in found.messages] == ["S", "Hi", "Hello"]
    assert found.left_out == ("it answers nothing", "it follows the last answer")


def test_messages_keep_reasoning_and_calls_and_join_parts() -> None:
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "H"}, {"type": "text", "value": "i"}],
        },
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL]), "train": 0},
        {"role": "function", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "No.", "reasoning_content": "Sun.", "loss_weight": 1.0},
    ]
    found = conversation({"messages": turns, "chat_template_kwargs": {"a": 1}}, "messages")
    assert found.messages == [
        USER,
        {"role": "assistant", "content": None, "tool_calls": CALLED},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "No.", "reasoning_content": "Sun."},
    ]
    assert found.learnt == [False, False, False, True]
    assert found.variables == {"a": 1}


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ("text", "text", "the row is text, not an object"),
        ({"text": ""}, "text", "text is empty"),
        ({"text": 3}, "text", "text is a number, not text"),
        ({"messages": []}, "messages", "messages or conversations are empty, not a list of turns"),
        ({"messages": [USER]}, "messages", "there is no answer of the assistant to learn"),
        ({"messages": [{**USER, "role": "robot"}]}, "messages", "the role of message 0 is 'robot'"),
        ({"messages": ["hi"]}, "messages", "message 0 is text, not an object"),
        (
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            "messages",
            "1 is an answer without content",
        ),
        (
            {"messages": [{**USER, "content": 3}]},
            "messages",
            "the content of message 0 is a number",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image"}]}]},
            "messages",
            "part that is not text",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages", "weight of message 1 is 0.5"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{}]}]},
            "messages",
            "call of message 1 has no name",
        ),
        ({**ROWS["messages"], "tools": "{"}, "messages", "tools cannot be read as JSON"),
        ({**ROWS["messages"], "tools": [1]}, "messages", "tools is not a list of objects"),
        (
            shared(("human", "a"), ("function_call", "{")),
            "sharegpt",
            "calls of message 1 cannot be",
        ),
        (shared(("gpt", "alone")), "sharegpt", "there is no answer"),
        (
            {"conversations": [{"from": "human", "value": None}]},
            "sharegpt",
            "value of turn 0 is absent",
        ),
        ({"instruction": "a"}, "alpaca", "output is absent, not text"),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            "alpaca",
            "history is not a list",
        ),
        (
            {"prompt": "a", "completion": ["b"]},
            "prompt-completion",
            "and completion a list",
        ),
        ({"prompt": "a", "completion": ""}, "prompt-completion", "completion is empty"),
    ],
)
def test_a_bad_row_has_a_reason(row: Any, name: str, reason: str) -> None:
    with pytest.raises(BadRowError) as raised:
        to_record(row, name)
    assert reason in str(raised.value)
