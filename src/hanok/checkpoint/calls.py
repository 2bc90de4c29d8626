"""The tool calls of a conversation, in the form that its chat template writes out.

Published templates expect different forms of a call: content null, empty or absent; arguments as an
object or as JSON text; one call per message or several; ids of nine characters. Given another form, a
template fails or silently leaves the call out of the prompt. So the forms of `forms_of` are rendered in
order with markers in them, and the first is taken in which the template writes the name and the
arguments of every call, and the content that came with them. If no form keeps the content, one that
writes the calls without it is taken. A template without tool calls gets them as content, as
`spelled_calls` writes them.

Cost: two renderings for a template that takes the first form, three where content is null and the word
None occurs. The number of forms is bounded, whatever the conversation.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hanok.errors import RequestError

Message = dict[str, Any]
Render = Callable[[list[Message]], str]
Content = Literal["null", "empty", "absent"]

SHORT_ID_LENGTH = 9
"""Mistral's templates refuse calls whose ids have another length."""

_LOST, _MISSPELLED, _SPELLED, _ALONE, _WRITTEN = range(5)
"""What became of the calls, higher is better: `spelled`, they are content; `alone`, they are written,
but the content that came with them is not."""


@dataclass(frozen=True, slots=True)
class Form:
    """A conversation with its calls in one form."""

    messages: list[Message]
    spelled: frozenset[int] = frozenset()
    """Indices of messages whose content holds their calls, for a template without tool calls."""


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether a message of the conversation calls tools."""
    return any(message.get("tool_calls") for message in messages)


def form_of(messages: list[Message], render: Render) -> list[Message]:
    """Return a conversation in the first form in which the template writes all of its calls.

    Raises RequestError if there is none; if the template refuses every form, its error for the first.
    """
    best, found = _LOST, messages
    refusal: RequestError | None = None
    for form in forms_of(messages):
        try:
            quality = _quality(form, render)
        except RequestError as error:
            refusal = refusal or error
            continue
        if quality == _WRITTEN:
            return form.messages
        if quality > best:
            best, found = quality, form.messages
    if best > _LOST:
        return found
    raise refusal or RequestError(
        "the chat template leaves tool calls of this conversation out, in whatever form they are given; "
        "pass another template, or write the calls into the content of their messages"
    )


def forms_of(messages: list[Message]) -> Iterator[Form]:
    """Yield the forms of a conversation that has calls, those that most templates want first."""
    spellings = [form for form in (_with_objects(messages), _with_texts(messages)) if form]
    spellings += [_parted(form) for form in spellings if _has_content(form)]
    spellings += [_one_by_one(form) for form in spellings if _has_several(form)]
    spellings += [_with_short_ids(form) for form in spellings if _has_long_ids(form)]
    for form in spellings:
        for content in ("null", "empty", "absent"):
            yield Form(_with_empty_content(form, content))
    yield _as_content(messages)
    yield _merged(_as_content(_without_tool_role(messages)))


def spelled_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Return calls as JSON objects of a name and arguments, one a line."""
    lines = []
    for call in calls:
        name, given = call["function"].get("name"), call["function"].get("arguments")
        found = _object_of(given)
        arguments = given if found is None else found
        lines.append(json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False))
    return "\n".join(lines)


def _quality(form: Form, render: Render) -> int:
    """Return whether the template writes all calls of a form, unchanged."""
    marked = _Marked(form)
    written = render(marked.messages)
    if not all(mark in written for mark in marked.marks):
        return _LOST
    for mark in marked.arguments:
        # Python's spelling of an object, or JSON text that was encoded a second time.
        if f"'{mark}'" in written or f'\\"{mark}' in written:
            return _MISSPELLED
    if _writes_none(form, render):
        return _MISSPELLED
    if form.spelled:
        return _SPELLED
    return _WRITTEN if all(mark in written for mark in marked.said) else _ALONE


def _writes_none(form: Form, render: Render) -> bool:
    """Whether the template writes null content as Python's word for it."""
    if not any(_calls_of(m) and m.get("content", "") is None for m in form.messages):
        return False
    count = render(form.messages).count("None")
    if not count:
        return False
    try:
        return count > render(_with_empty_content(form.messages, "empty")).count("None")
    except RequestError:
        return False


class _Marked:
    """A copy of a conversation with a unique marker word in each call and in each tool's answer."""

    def __init__(self, form: Form) -> None:
        self.marks: list[str] = []
        """What the template has to write."""
        self.arguments: list[str] = []
        """Those of the marks that are keys and values of arguments."""
        self.said: list[str] = []
        """What it should also write: the content that came with calls."""
        self.messages = [
            self._message(message, place in form.spelled)
            for place, message in enumerate(form.messages)
        ]

    def _message(self, message: Message, is_spelled: bool) -> Message:
        if calls := _calls_of(message):
            marked = {**message, "tool_calls": [self._call(call) for call in calls]}
            if content := message.get("content"):
                self.said.append(f"saidmark{len(self.said)}x")
                marked["content"] = joined_content(content, self.said[-1])
            return marked
        if is_spelled or message.get("role") == "tool":
            return {**message, "content": joined_content(message.get("content"), self._mark())}
        return message

    def _call(self, call: Message) -> Message:
        function = {**call["function"], "name": call["function"]["name"] + self._mark()}
        arguments = function.get("arguments")
        found = _object_of(arguments)
        if found:  # leaving out an empty object loses nothing
            mark = self._mark()
            self.arguments.append(mark)
            marked = {**found, mark: mark}
            function["arguments"] = json.dumps(marked) if isinstance(arguments, str) else marked
        return {**call, "function": function}

    def _mark(self) -> str:
        self.marks.append(f"callmark{len(self.marks)}x")
        return self.marks[-1]


def _calls_of(message: Message) -> list[Message]:
    calls: list[Message] = message.get("tool_calls") or []
    return calls


def _object_of(arguments: Any) -> dict[str, Any] | None:
    """Return arguments as an object; None if they are not one."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, dict) else None


def _with_arguments(messages: list[Message], change: Callable[[Any], Any]) -> list[Message]:
    return [
        {
            **message,
            "tool_calls": [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": change(call["function"].get("arguments", {})),
                    },
                }
                for call in calls
            ],
        }
        if (calls := _calls_of(message))
        else message
        for message in messages
    ]


def _with_objects(messages: list[Message]) -> list[Message] | None:
    """Return the arguments as objects, as most templates want them; None where some are no object."""
    found = _with_arguments(messages, _object_of)
    calls = [call for message in found for call in _calls_of(message)]
    return None if any(call["function"]["arguments"] is None for call in calls) else found


def _with_texts(messages: list[Message]) -> list[Message]:
    """Return the arguments as JSON text, as OpenAI's protocol has them."""

    def text(arguments: Any) -> str:
        if isinstance(arguments, str):
            return arguments if arguments.strip() else "{}"
        return json.dumps(arguments, ensure_ascii=False)

    return _with_arguments(messages, text)


def _has_content(messages: list[Message]) -> bool:
    return any(_calls_of(message) and message.get("content") for message in messages)


def _parted(messages: list[Message]) -> list[Message]:
    """Return content in a separate message before the calls that it came with."""
    found = []
    for message in messages:
        if _calls_of(message) and message.get("content"):
            found.append({key: value for key, value in message.items() if key != "tool_calls"})
            found.append({**message, "content": None})
        else:
            found.append(message)
    return found


def _has_several(messages: list[Message]) -> bool:
    return any(len(_calls_of(message)) > 1 for message in messages)


def _one_by_one(messages: list[Message]) -> list[Message]:
    """Return each call in a separate message, followed by its answer."""
    found: list[Message] = []
    taken: set[int] = set()
    for place, message in enumerate(messages):
        calls = _calls_of(message)
        if place in taken:
            continue
        if len(calls) < 2:
            found.append(message)
            continue
        following = range(place + 1, len(messages))
        for number, call in enumerate(calls):
            content = message.get("content") if number == 0 else None
            found.append({**message, "content": content, "tool_calls": [call]})
            for other in following:
                if messages[other].get("role") != "tool":
                    break
                if messages[other].get("tool_call_id") == call.get("id") and other not in taken:
                    taken.add(other)
                    found.append(messages[other])
                    break
    return found


def _has_long_ids(messages: list[Message]) -> bool:
    ids = [call.get("id") for message in messages for call in _calls_of(message)]
    return any(not isinstance(item, str) or not _is_short(item) for item in ids)


def _is_short(item: str) -> bool:
    return len(item) == SHORT_ID_LENGTH and item.isascii() and item.isalnum()


def _with_short_ids(messages: list[Message]) -> list[Message]:
    """Return ids of SHORT_ID_LENGTH letters and digits, equal ones where they were equal."""

    def short(item: Any) -> str:
        if isinstance(item, str) and _is_short(item):
            return item
        return hashlib.sha256(str(item).encode(errors="replace")).hexdigest()[:SHORT_ID_LENGTH]

    found = []
    for message in messages:
        changed = dict(message)
        if calls := _calls_of(message):
            changed["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in calls]
        if "tool_call_id" in message:
            changed["tool_call_id"] = short(message["tool_call_id"])
        found.append(changed)
    return found


def _with_empty_content(messages: list[Message], content: Content) -> list[Message]:
    """Return the values that mean "no content" in the messages that contain calls."""
    found = []
    for message in messages:
        if _calls_of(message) and not message.get("content"):
            changed = {key: value for key, value in message.items() if key != "content"}
            if content != "absent":
                changed["content"] = None if content == "null" else ""
            found.append(changed)
        else:
            found.append(message)
    return found


def _as_content(messages: list[Message]) -> Form:
    """Return the calls in the content of their messages."""
    found, spelled = [], []
    for place, message in enumerate(messages):
        if calls := _calls_of(message):
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            content = joined_content(message.get("content"), spelled_calls(calls))
            found.append({**kept, "content": content})
            spelled.append(place)
        else:
            found.append(message)
    return Form(found, frozenset(spelled))


def joined_content(content: Any, text: str) -> Any:
    """Return content, a text or a list of parts, with a text on a line after it."""
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    return f"{content}\n{text}" if content else text


def _without_tool_role(messages: list[Message]) -> list[Message]:
    return [
        {"role": "user", "content": message.get("content") or ""}
        if message.get("role") == "tool"
        else message
        for message in messages
    ]


def _merged(form: Form) -> Form:
    """Merge consecutive messages of one role: many templates require alternating roles."""
    found: list[Message] = []
    spelled = set()
    for place, message in enumerate(form.messages):
        last = found[-1] if found else {}
        content = message.get("content")
        if last.get("role") == message.get("role") and isinstance(content, str):
            found[-1] = {**last, "content": joined_content(last.get("content"), content)}
        else:
            found.append(message)
        if place in form.spelled:
            spelled.add(len(found) - 1)
    return Form(found, frozenset(spelled))
