"""Tools: what is asked of the model, and its text as calls, in pieces as in one."""

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.server.errors import ServerError
from hanok.server.tools import ToolReader, ToolUse, tool_use

TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "time"}},
]
CALL = {"name": "weather", "arguments": {"place": "Köln 가", "n": [1, 2.5, None]}}
TEXT = json.dumps(CALL, ensure_ascii=False)
WRITTEN = {
    "hermes": (f"Let me see.\n<tool_call>\n{TEXT}\n</tool_call>", "Let me see.\n", 1),
    "two": (f"<tool_call>{TEXT}</tool_call>\n<tool_call>{TEXT}</tool_call>", "", 2),
    "mistral": (f"[TOOL_CALLS] [{TEXT}, {TEXT}]", "", 2),
    "llama": (json.dumps({"name": "time", "parameters": {}}), "", 1),
    "tagged": (f"<|python_tag|>{TEXT}", "", 1),
    "none": ("A <tool is a [TOOL of {braces}.", "A <tool is a [TOOL of {braces}.", 0),
    "object": ('{"answer": 42} is it', '{"answer": 42} is it', 0),
    "broken": ("<tool_call>{nothing", "<tool_call>{nothing", 0),
}


def read(text: str, cuts: list[int], use: ToolUse) -> tuple[str, list[tuple[str, str]]]:
    reader, content, calls = ToolReader(use=use), "", []
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    for found in [*map(reader.push, pieces), reader.finish()]:
        content += found[0]
        calls += [(call.name, call.arguments) for call in found[1]]
    return content, calls


@pytest.mark.parametrize("name", WRITTEN)
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_any_pieces_give_the_same_calls_and_lose_no_character(name: str, cuts: list[int]) -> None:
    text, content, count = WRITTEN[name]
    use = tool_use(TOOLS, "auto")
    found = read(text, cuts, use)
    assert found == read(text, [], use)
    assert (found[0].strip(), len(found[1])) == (content.strip(), count)
    if name in ("hermes", "two", "mistral", "tagged"):
        assert all(json.loads(arguments) == CALL["arguments"] for _, arguments in found[1])


def test_every_call_has_an_id_of_its_own() -> None:
    """Of nine letters or digits: the templates of some models refuse a conversation with others."""
    ids = []
    for _ in range(2):
        reader = ToolReader(use=tool_use(TOOLS, "auto"))
        calls = [*reader.push(WRITTEN["two"][0])[1], *reader.finish()[1]]
        ids += [call.body()["id"] for call in calls]
    assert len(set(ids)) == len(ids) == 4
    assert all(re.fullmatch("[0-9a-zA-Z]{9}", item) for item in ids)


def test_without_tools_nothing_is_read() -> None:
    text = WRITTEN["hermes"][0]
    assert read(text, [3, 9], tool_use(None, None)) == (text, [])
    assert read(text, [], tool_use(TOOLS, "none")) == (text, [])


def test_what_is_demanded_becomes_a_grammar() -> None:
    assert tool_use(TOOLS, "auto").grammar is None
    for choice in ("time", {"type": "function", "function": {"name": "time"}}):
        grammar = tool_use(TOOLS, choice).grammar
        assert grammar is not None
        assert json.loads(grammar.value)["properties"]["name"] == {"const": "time"}
    required = tool_use(TOOLS, "required").grammar
    assert required is not None
    assert len(json.loads(required.value)["anyOf"]) == 2


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        (TOOLS, "lunch", "Tool with name lunch not found"),
        (None, "required", "there are no `tools`"),
        ([{"function": {}}], "auto", "tools.0.function.name must be a text"),
        (TOOLS, {"function": {}}, "`tool_choice.function.name` must be a text"),
    ],
)
def test_tools_that_are_none_are_refused(tools: Any, choice: Any, words: str) -> None:
    with pytest.raises(ServerError, match=words) as caught:
        tool_use(tools, choice)
    assert caught.value.status == 422
