"""What a request's tools ask for: which functions may be called, and the grammar of a demanded call."""

import json
from typing import Any

import jsonschema
import pytest

from hanok.server.errors import ServerError
from hanok.server.tools import tool_use

TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "time"}},
]


def tool(name: str, parameters: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def demanded(tools: Any, choice: Any = "required") -> Any:
    grammar = tool_use(tools, choice).grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"
    return json.loads(grammar.value)


def takes(schema: Any, name: str, arguments: Any) -> bool:
    call = {"name": name, "arguments": arguments}
    return jsonschema.Draft202012Validator(schema).is_valid(call)


def test_what_may_be_called() -> None:
    assert set(tool_use(TOOLS, "auto").functions) == set(tool_use(TOOLS, None).functions)
    assert set(tool_use(TOOLS, None).functions) == {"weather", "time"}
    for nothing in (tool_use(None, None), tool_use(TOOLS, "none"), tool_use([], "auto")):
        assert (nothing.tools, dict(nothing.functions), nothing.grammar) == ((), {}, None)


def test_what_is_demanded_becomes_a_grammar() -> None:
    assert tool_use(TOOLS, "auto").grammar is None
    named = {"type": "function", "function": {"name": "time"}}
    for choice in ("time", named, {"type": "function", "name": "time"}):
        schema = demanded(TOOLS, choice)
        assert takes(schema, "time", {})
        assert not takes(schema, "weather", {})
        assert set(tool_use(TOOLS, choice).functions) == {"time"}
    schema = demanded(TOOLS)
    assert takes(schema, "time", {})
    assert takes(schema, "weather", {"a": 1})


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_a_choice_of_them(mode: str) -> None:
    listed = [{"type": "function", "function": {"name": "time"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}
    use = tool_use(TOOLS, choice)
    assert (len(use.tools), set(use.functions)) == (2, {"time"})
    assert use.is_forced == (mode == "required")


def test_references_are_to_the_tools_own_schema() -> None:
    """Two tools with definitions of one name, and one whose arguments hold themselves."""
    color = {"$defs": {"Kind": {"enum": ["red", "blue"]}}}
    seat = {"$defs": {"Kind": {"enum": ["aisle", "window"]}}}
    one = {"type": "object", "properties": {"kind": {"$ref": "#/$defs/Kind"}}, "required": ["kind"]}
    tree = {
        "type": "object",
        "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["kids"],
    }
    schema = demanded([tool("paint", one | color), tool("sit", one | seat), tool("grow", tree)])
    assert takes(schema, "paint", {"kind": "red"})
    assert not takes(schema, "paint", {"kind": "aisle"})
    assert takes(schema, "sit", {"kind": "aisle"})
    assert not takes(schema, "sit", {"kind": "red"})
    assert takes(schema, "grow", {"kids": [{"kids": []}]})
    assert not takes(schema, "grow", {"kids": [{}]})
    older = {"properties": {"kind": {"$ref": "#/definitions/Kind"}}, "definitions": color["$defs"]}
    assert not takes(demanded([tool("paint", older)]), "paint", {"kind": "aisle"})


@pytest.mark.parametrize(
    "parameters",
    [{}, {"properties": {"a": {"type": "integer"}}}, {"type": ["object", "null"]}, None],
)
def test_arguments_are_an_object(parameters: Any) -> None:
    schema = demanded([tool("f", parameters)])
    for wrong in (7, "seven", [], None):
        assert not takes(schema, "f", wrong)
    assert takes(schema, "f", {"a": 1})


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        (TOOLS, "lunch", "Tool with name lunch not found"),
        (None, "required", "there are no `tools`"),
        ([{"function": {}}], "auto", "tools.0.function.name must be a string"),
        (TOOLS, {"function": {}}, "`tool_choice.function.name` must be a string"),
        (TOOLS, {"type": "allowed_tools"}, "allowed_tools.tools` must be a list"),
        ([tool("f", {"type": "string"})], "f", "parameters of 'f' are of type 'string'"),
        ([tool("f", 3)], "f", "parameters of 'f' must be a JSON schema"),
        ([tool("f", {"$ref": "#/$defs/A"})], "f", "parameters of 'f' are not valid: .*A"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(tools: Any, choice: Any, words: str) -> None:
    with pytest.raises(ServerError, match=words) as caught:
        tool_use(tools, choice)
    assert caught.value.status == 422
