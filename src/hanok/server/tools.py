"""The tools of a request: which functions may be called, and whether a call is required.

If a call is required, a grammar makes the model write `{"name": …, "arguments": …}` and nothing else.
If the model may choose, it writes calls in the format it was trained on (`server/calls.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hanok.engine.grammar_spec import GrammarError, GrammarSpec, embedded
from hanok.server.errors import ServerError, invalid

Function = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of one request."""

    tools: tuple[dict[str, Any], ...] = ()
    """For the template; empty if none may be called."""
    functions: Mapping[str, Function] = field(default_factory=dict)
    """The functions that may be called, by name."""
    grammar: GrammarSpec | None = None
    """The grammar of a required call."""

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.grammar is not None


def tool_use(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None
) -> ToolUse:
    """Return the tools of a request.

    Raises ServerError for an invalid or unknown tool.
    """
    if not tools or choice == "none":
        if isinstance(choice, Mapping) or (not tools and choice == "required"):
            raise invalid("`tool_choice` asks for a tool, and there are no `tools`", "tool_choice")
        return ToolUse()
    functions = {}
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise invalid(f"tools.{number}.function.name must be a string", "tools")
        functions[name] = function
    given = tuple(dict(tool) for tool in tools)
    names, is_demanded = _chosen(choice, list(functions))
    for name in names:
        if name not in functions:
            raise ServerError(
                f"Tool error: Tool with name {name} not found",
                kind="tool_error",
                parameter="tool_choice",
            )
    chosen = {name: functions[name] for name in names}
    grammar = _grammar(chosen) if is_demanded else None
    return ToolUse(tools=given, functions=chosen, grammar=grammar)


def _chosen(choice: str | Mapping[str, Any] | None, names: list[str]) -> tuple[list[str], bool]:
    """Return the names that may be called, and whether one of them must be."""
    if choice is None or choice == "auto":
        return names, False
    if choice == "required":
        return names, True
    if isinstance(choice, str):  # TGI's
        return [choice], True
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        listed = allowed.get("tools") if isinstance(allowed, Mapping) else None
        if not isinstance(listed, list) or not listed:
            raise invalid(
                "`tool_choice.allowed_tools.tools` must be a list of tools", "tool_choice"
            )
        return [_name_in(item) for item in listed], allowed.get("mode") == "required"
    return [_name_in(choice)], True


def _name_in(choice: Any) -> str:
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise invalid("`tool_choice.function.name` must be a string", "tool_choice")
    return name


def _grammar(functions: Mapping[str, Function]) -> GrammarSpec:
    calls, definitions = [], {}
    for number, (name, function) in enumerate(functions.items()):
        try:
            arguments, needed = embedded(_parameters(name, function), f"parameters{number}")
        except GrammarError as error:
            raise invalid(f"the parameters of {name!r} are not valid: {error}", "tools") from error
        definitions.update(needed)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if definitions:
        schema = {**schema, "$defs": definitions}
    return GrammarSpec("json_schema", json.dumps(schema))


def _parameters(name: str, function: Function) -> dict[str, Any]:
    """Return the schema of a function's arguments: always an object's."""
    found = function.get("parameters", function.get("arguments"))
    if found is None:
        return {"type": "object", "properties": {}}
    if not isinstance(found, Mapping):
        raise invalid(f"the parameters of {name!r} must be a JSON schema, an object", "tools")
    kinds = found.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise invalid(
            f"the parameters of {name!r} are of type {kinds!r}; arguments are an object", "tools"
        )
    return {**found, "type": "object"}
