"""What rows mean: the formats of training data as people have them, each read into one of three records.

| format | a row |
|---|---|
| `messages` | `messages` (or `conversations`) of `role` and `content`, perhaps `tools` |
| `sharegpt` | `conversations` of `from` and `value`, perhaps `system`, `tools` |
| `alpaca` | `instruction`, perhaps `input`, `output`; perhaps `system`, `history` |
| `prompt-completion` | `prompt` and `completion`: two texts, or two lists of messages |
| `text` | `text` |

The format is detected from the names of the columns in the first rows. Where several fit, or where the
rows are pairs or judgements for another kind of training, it is refused with the candidates.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hanok.errors import DataError

Message = dict[str, Any]
SHOWN_ROWS = 20
"""The first rows of a file, from which its format is detected."""
PREFERENCE, UNPAIRED = "preference pairs", "answers judged one by one"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
_LISTS = ("messages", "conversations", "conversation")


class BadRowError(Exception):
    """A row that is not what its format says; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages as the chat template reads them, and which of them are learnt."""

    messages: list[Message]
    learnt: list[bool]
    """For each message; only answers of the assistant may be."""
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, object] = field(default_factory=dict)
    """What the row gives the template besides (`chat_template_kwargs`)."""
    left_out: tuple[str, ...] = ()
    """Why, for each turn of the row that is in no message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt as plain text, and how it goes on; what goes on is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text, of which every token is learnt; or a part of one."""

    text: str
    begins: bool = True
    ends: bool = True


Record = Conversation | Completion | Text


def detect(file: Path, rows: Sequence[Any]) -> str:
    """Return the format of a file's first rows; DataError with the candidates unless there is one."""
    found: dict[str, None] = {}
    for row in rows:
        if isinstance(row, Text):
            return "text"
        if isinstance(row, Mapping):
            found |= dict.fromkeys(_candidates(row))
    if len(found) == 1 and next(iter(found)) in FORMATS:
        return next(iter(found))
    columns = sorted({str(name) for row in rows if isinstance(row, Mapping) for name in row})
    seen = f"its columns are {', '.join(columns)}" if columns else "its rows are not objects"
    known = ", ".join(FORMATS)
    if not found:
        raise DataError(
            f"{file}: no known format; {seen}. Formats: {known}. Say which columns to read, for "
            f"example {file.name}:instruction=question,output=answer."
        )
    other = [name for name in found if name not in FORMATS]
    what = (
        f"these rows are {other[0]}, which are learnt in another way than texts"
        if other
        else f"several formats fit: {', '.join(found)}"
    )
    fitting = next((name for name in found if name in FORMATS), "messages")
    raise DataError(
        f"{file}: {what}; {seen}. If they are to be read as one of these formats, name it: "
        f"{file.name}:format={fitting}."
    )


def _candidates(row: Mapping[str, Any]) -> list[str]:
    found = []
    for name in _LISTS:
        turns = row.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            if "from" in turns[0]:
                found.append("sharegpt")
            elif "role" in turns[0]:
                found.append("messages")
    if {"instruction", "output"} <= row.keys():
        found.append("alpaca")
    if {"prompt", "completion"} <= row.keys():
        found.append("prompt-completion")
    if isinstance(row.get("text"), str):
        found.append("text")
    if {"chosen", "rejected"} <= row.keys():
        found.append(PREFERENCE)
    if isinstance(row.get("label"), bool) and found:
        found.append(UNPAIRED)
    return found


def to_record(row: Any, format_name: str) -> Record:
    """Return what a row of a format says; BadRowError with the reason if it says something else."""
    if isinstance(row, Text):
        return row
    if not isinstance(row, Mapping):
        raise BadRowError(f"the row is {_kind(row)}, not an object")
    return FORMATS[format_name](row)


def _messages(row: Mapping[str, Any]) -> Record:
    return _conversation(_turns(row), row)


def _sharegpt(row: Mapping[str, Any]) -> Record:
    messages: list[Message] = []
    for number, turn in enumerate(_turns(row)):
        if not isinstance(turn, Mapping):
            raise BadRowError(f"turn {number} is {_kind(turn)}, not an object")
        role, value = _role(turn.get("from"), number), turn.get("value")
        if not isinstance(value, str):
            raise BadRowError(f"the value of turn {number} is {_kind(value)}, not text")
        rest = {name: turn[name] for name in (*_WEIGHTS, "name") if name in turn}
        if role == "function_call":
            messages.append({"role": "assistant", "tool_calls": _calls(value, number), **rest})
        else:
            messages.append({"role": role, "content": value, **rest})
    system = row.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    # Some exported conversations begin with an answer to nothing.
    begin = int(bool(messages) and messages[0]["role"] == "system")
    after = next(
        (i for i in range(begin, len(messages)) if not _answers(messages[i])), len(messages)
    )
    kept = [*messages[:begin], *messages[after:]]
    return _conversation(kept, row, left_out=("it answers nothing",) * (after - begin))


def _answers(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _alpaca(row: Mapping[str, Any]) -> Record:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise BadRowError(f"input is {_kind(given)}, not text")
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _string(row, "system")})
    for pair in row.get("history") or ():
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BadRowError("history is not a list of pairs of a question and an answer")
        messages += _exchange(*pair)
    messages += _exchange(f"{instruction}\n{given}" if given else instruction, output)
    return _conversation(messages, row)


def _prompt_completion(row: Mapping[str, Any]) -> Record:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise BadRowError("completion is empty")
        return Completion(prompt=prompt, completion=completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        given = [{**_message(turn, i), "weight": 0} for i, turn in enumerate(prompt)]
        return _conversation([*given, *completion], row)
    raise BadRowError(
        f"prompt is {_kind(prompt)} and completion {_kind(completion)}; both must be text, or both "
        "lists of messages"
    )


def _text(row: Mapping[str, Any]) -> Record:
    text = _string(row, "text")
    if not text:
        raise BadRowError("text is empty")
    return Text(text=text)


FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text,
}
_WEIGHTS = ("weight", "loss_weight", "train")
"""The names under which a message says whether it is learnt."""


def _conversation(
    turns: Sequence[Any], row: Mapping[str, Any], left_out: tuple[str, ...] = ()
) -> Conversation:
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    learnt = [
        _answers(message) and _is_learnt(message, number) for number, message in enumerate(messages)
    ]
    if True not in learnt:
        raise BadRowError("there is no answer of the assistant to learn")
    # After the last answer nothing is learnt, and some templates write an answer that is not the
    # last message differently.
    end = len(learnt) - learnt[::-1].index(True)
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise BadRowError(f"chat_template_kwargs is {_kind(variables)}, not an object")
    return Conversation(
        messages=[
            {name: value for name, value in message.items() if name not in _WEIGHTS}
            for message in messages[:end]
        ],
        learnt=learnt[:end],
        tools=_tools(row.get("tools")),
        variables=variables,
        left_out=(*left_out, *("it follows the last answer",) * (len(messages) - end)),
    )


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"message {number} is {_kind(turn)}, not an object")
    role, content = _role(turn.get("role"), number), turn.get("content")
    message = {**turn, "role": role}
    if isinstance(content, list):
        message["content"] = _parts(content, number)
    elif content is not None and not isinstance(content, str):
        raise BadRowError(f"the content of message {number} is {_kind(content)}, not text")
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        message["tool_calls"] = _calls(calls, number)
    elif calls is not None:
        message["tool_calls"] = [_call(call, number) for call in calls]
    if not content and not message.get("tool_calls"):
        if role != "assistant":
            message["content"] = content or ""
        elif not any(message.get(name) for name in ("reasoning_content", "reasoning", "thinking")):
            raise BadRowError(f"message {number} is an answer without content")
    return message


def _parts(content: list[Any], number: int) -> str:
    """Return the text of a list of parts. Some files have it under `value`."""
    texts = []
    for part in content:
        text = part if isinstance(part, str) else None
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise BadRowError(f"message {number} has a part that is not text")
        texts.append(text)
    return "".join(texts)


def _is_learnt(message: Message, number: int) -> bool:
    for name in _WEIGHTS:
        if name in message and message[name] is not None:
            if message[name] not in (0, 1):
                raise BadRowError(
                    f"{name} of message {number} is {message[name]!r}; only 0 and 1 are known"
                )
            return bool(message[name])
    return True


def _role(given: Any, number: int) -> str:
    role = _ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise BadRowError(f"the role of message {number} is {given!r}, which is not known")
    return role


def _calls(text: str, number: int) -> list[dict[str, Any]]:
    found = _json(text, f"the tool calls of message {number}")
    return [_call(call, number) for call in (found if isinstance(found, list) else [found])]


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRowError(f"a tool call of message {number} has no name")
    kept = {name: call[name] for name in ("id",) if name in call}
    arguments = function.get("arguments", function.get("parameters", {}))
    return {
        **kept,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _tools(given: Any) -> list[dict[str, Any]] | None:
    found = _json(given, "tools") if isinstance(given, str) and given.strip() else given
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise BadRowError("tools is not a list of objects")
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in found
    ]


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{what} cannot be read as JSON: {error}") from None


def _turns(row: Mapping[str, Any]) -> list[Any]:
    turns = next((row[name] for name in _LISTS if name in row), None)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"its {' or '.join(_LISTS[:2])} are {_kind(turns)}, not a list of turns")
    return turns


def _exchange(question: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {_kind(value)}, not text")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "absent", bool: "a bool"}
    if isinstance(value, list) and not value:
        return "empty"
    return names.get(type(value), "a number")
