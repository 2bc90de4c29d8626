"""Tools: what a request says of them, what the model is made to write, and its text as calls.

Where a call is demanded, a grammar makes the model write `{"name": …, "arguments": …}` and nothing else.
Where the model may choose, its template has taught it a spelling of its own; those that are read:
Hermes' and Qwen's <tool_call>, Mistral's [TOOL_CALLS], and Llama's JSON object in place of an answer.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hanok.engine.grammar_spec import GrammarSpec
from hanok.server.errors import ServerError, invalid

OPENINGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
CLOSING = "</tool_call>"
ID_LENGTH = 9  # Mistral's templates refuse conversations with any other


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of one request."""

    tools: tuple[dict[str, Any], ...] = ()
    """For the template; empty where none may be called."""
    grammar: GrammarSpec | None = None
    """Of a call that is demanded."""

    @property
    def is_forced(self) -> bool:
        """Whether the answer is a call whatever the model thinks."""
        return self.grammar is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call, as the model wrote it; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:ID_LENGTH])
    """Its answer names it: no other call of the conversation may have the same."""

    def body(self) -> dict[str, Any]:
        """Return it in OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def tool_use(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None
) -> ToolUse:
    """Return what a request's tools ask for. ServerError for one that is none, or is not there."""
    if not tools or choice == "none":
        if isinstance(choice, Mapping) or (not tools and choice == "required"):
            raise invalid("`tool_choice` asks for a tool, and there are no `tools`", "tool_choice")
        return ToolUse()
    functions = {}
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise invalid(f"tools.{number}.function.name must be a text", "tools")
        functions[name] = function
    given = tuple(dict(tool) for tool in tools)
    wanted = _wanted(choice)
    if wanted is None:
        return ToolUse(tools=given)
    if wanted == "required":
        chosen = functions
    elif wanted in functions:
        chosen = {wanted: functions[wanted]}
    else:
        raise ServerError(
            f"Tool error: Tool with name {wanted} not found",
            kind="tool_error",
            parameter="tool_choice",
        )
    calls = [_call_schema(name, function) for name, function in chosen.items()]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return ToolUse(tools=given, grammar=GrammarSpec("json_schema", json.dumps(schema)))


def _wanted(choice: str | Mapping[str, Any] | None) -> str | None:
    """Return "required", the name of the function that is demanded, or None."""
    if choice is None or choice == "auto":
        return None
    if isinstance(choice, str):
        return choice
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise invalid("`tool_choice.function.name` must be a text", "tool_choice")
    return name


def _call_schema(name: str, function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters", function.get("arguments"))
    if not isinstance(parameters, Mapping):
        parameters = {"type": "object", "properties": {}}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": dict(parameters)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


@dataclass(slots=True, kw_only=True)
class ToolReader:
    """Reads a model's text in pieces: what is certainly not a call is passed on at once.

    A call is passed on when it is whole, so that pieces of arguments never have to be taken back.
    """

    use: ToolUse
    calls: list[ToolCall] = field(default_factory=list)
    _held: str = ""
    """What may be, or is, part of a call."""
    _has_content: bool = False
    _follows_call: bool = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the content that is certain now, and the calls that are whole now."""
        if not self.use.tools:
            return text, []
        self._held += text
        if self._follows_call:  # the space between two calls is nobody's
            self._held = self._held.lstrip()
        if self.use.is_forced or self._is_inside():
            return "", self._closed()
        starts = [at for opening in OPENINGS if (at := self._held.find(opening)) >= 0]
        cut = min(starts) if starts else len(self._held) - _overlap(self._held)
        if not self._has_content and self._held.lstrip().startswith("{"):
            cut = 0  # an object in place of an answer
        content, self._held = self._held[:cut], self._held[cut:]
        self._has_content = self._has_content or bool(content.strip())
        self._follows_call = self._follows_call and not content
        return content, self._closed() if self._is_inside() else []

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return what was held back: calls, or content where it is none after all."""
        held, self._held = self._held, ""
        found = _calls_in(_unwrapped(held)) if held.strip() else []
        self.calls += found
        return ("" if found else held), found

    def _is_inside(self) -> bool:
        return self._held.startswith(OPENINGS)

    def _closed(self) -> list[ToolCall]:
        """Return the calls that are closed by their spelling, and forget their text."""
        found: list[ToolCall] = []
        while self._held.startswith("<tool_call>") and CLOSING in self._held:
            whole, _, rest = self._held.partition(CLOSING)
            calls = _calls_in(_unwrapped(whole))
            if not calls:
                break  # not a call: content, at the end
            found += calls
            self._held, self._follows_call = rest.lstrip(), True
        self.calls += found
        return found


def _overlap(text: str) -> int:
    """Return how many of the last characters may begin one of OPENINGS."""
    return max(
        next((n for n in range(len(o) - 1, 0, -1) if text.endswith(o[:n])), 0) for o in OPENINGS
    )


def _unwrapped(text: str) -> str:
    text = text.strip()
    for opening in OPENINGS:
        text = text.removeprefix(opening)
    return text.removesuffix(CLOSING).strip()


def _calls_in(text: str) -> list[ToolCall]:
    """Return the calls that a JSON text is; none where it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found = []
    for item in value if isinstance(value, list) else [value]:
        name = item.get("name") if isinstance(item, Mapping) else None
        if not isinstance(name, str):
            return []
        arguments = item.get("arguments", item.get("parameters", {}))
        is_text = isinstance(arguments, str)
        body = arguments if is_text else json.dumps(arguments, ensure_ascii=False)
        found.append(ToolCall(name=name, arguments=body))
    return found
