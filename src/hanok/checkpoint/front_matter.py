"""The front matter of a model card: the YAML between two lines of `---` at its beginning.

It is read with PyYAML's safe loader and edited in place: only the values that change are rewritten, so
order, comments and spelling of everything else stay. An edit is read back; one whose result is not
exactly the old values with the new ones is refused, and nothing is written.

Invariant: `edited` returns a text whose front matter reads as the old one with the changes, and whose
body is the same to the byte.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hanok.errors import CheckpointError

if TYPE_CHECKING:
    import yaml

MARK = "\ufeff"  # a byte order mark, which editors write and the hub ignores
OPENING = re.compile(rf"{MARK}?\s*---(?:\r\n|\r|\n|\Z)")
CLOSING = re.compile(r"^---[ \t]*(?:\r\n|\n|\Z)", re.MULTILINE)
LINE_BREAK = re.compile(r"\r\n|\r|\n")
INLINE_STYLES = (None, "'", '"')  # how a scalar is written that is no block of lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A card cut in four: together they are the text again."""

    opening: str
    """The first `---` with its line break; empty if there is no front matter."""
    yaml: str
    """The lines between, with their line breaks."""
    closing: str
    body: str


def split(text: str) -> Parts:
    """Return the parts of a card, as the hub cuts it; CheckpointError if the second `---` is missing."""
    start = OPENING.match(text)
    if start is None:
        return Parts(opening="", yaml="", closing="", body=text)
    end = CLOSING.search(text, start.end())
    if end is None:
        raise CheckpointError(
            "the front matter begins with a line of --- and no second one ends it; add it after the "
            "last key"
        )
    return Parts(
        opening=text[: start.end()],
        yaml=text[start.end() : end.start()],
        closing=end[0],
        body=text[end.end() :],
    )


def front_matter(text: str) -> dict[str, Any]:
    """Return the values of a card's front matter; empty if it has none.

    CheckpointError where it is no YAML, not a map from names to values, or gives a name twice.
    """
    return _read(split(text).yaml)


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """Return the text with front matter that says what `changes` say; other keys keep their lines.

    Items that a list of `changes` has and the card's list lacks are added to it, any other value
    replaces the card's. CheckpointError names a key that cannot be changed without touching others.
    """
    parts = split(text)
    has_break = LINE_BREAK.search(text)
    line_break = has_break[0] if has_break else "\n"
    yaml_text, found = parts.yaml, _read(parts.yaml)
    for key, wanted in changes.items():
        value = _united(found.get(key), wanted)
        if key in found and found[key] == value and type(found[key]) is type(value):
            continue
        expected = {**found, key: value}
        yaml_text = _with(yaml_text, key, value, line_break, expected)
        found = expected
    if yaml_text == parts.yaml:
        return text
    if parts.opening:
        return parts.opening + yaml_text + parts.closing + parts.body
    mark = MARK if text.startswith(MARK) else ""
    body = text.removeprefix(MARK)
    gap = line_break if body.strip() and not body.startswith(("\r", "\n")) else ""
    return f"{mark}---{line_break}{yaml_text}---{line_break}{gap}{body}"


def _united(found: Any, wanted: Any) -> Any:
    """Return what a key is to say: a list keeps the items that the card has."""
    if not isinstance(wanted, list) or not found:
        return wanted
    old = found if isinstance(found, list) else [found]
    new = [item for item in wanted if item not in old]
    return [*old, *new] if new else found


def _read(text: str) -> dict[str, Any]:
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the front matter is not YAML: {_one_line(error)}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(
            "the front matter is not a map from names to values, with one `name: value` on each line"
        )
    if others := [key for key in value if not isinstance(key, str)]:
        raise CheckpointError(f"the front matter has the key {others[0]!r}, which is not text")
    names = [key.value for key, _ in root.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(
            f"the front matter gives {', '.join(twice)} twice, so it is not clear which value counts"
        )
    return value


def _with(text: str, key: str, value: Any, line_break: str, expected: Mapping[str, Any]) -> str:
    """Return YAML with one value changed or added, read back and compared."""
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    edits = list(_edits(text, root, key, value, line_break))
    for result in edits:
        try:
            found = _read(result)
        except CheckpointError:
            continue
        if found == expected and list(found) == list(expected):
            return result
    raise CheckpointError(
        f"the front matter's {key!r} cannot be changed to {value!r} without touching the lines around "
        "it; edit it by hand"
    )


def _edits(
    text: str, root: "yaml.Node | None", key: str, value: Any, line_break: str
) -> Iterator[str]:
    """Yield the edits that may do, the one that changes least first."""
    if root is None:
        yield _ended(text, line_break) + _lines(key, value, line_break)
        return
    if root.flow_style:
        return
    node = next((item for name, item in root.value if name.value == key), None)
    if node is None:
        indent = " " * root.start_mark.column
        lines = _lines(key, value, line_break)
        indented = "".join(f"{indent}{line}" for line in lines.splitlines(keepends=True))
        yield _ended(text, line_break) + indented
    elif node.id == "scalar" and node.style in INLINE_STYLES:
        space = "" if node.start_mark.index < node.end_mark.index else " "
        yield _replaced(text, node, space + _inline(value))
    elif node.id == "sequence" and isinstance(value, list):
        yield from _longer_sequence(text, node, value[len(node.value) :], line_break)


def _longer_sequence(
    text: str, node: "yaml.Node", new: list[Any], line_break: str
) -> Iterator[str]:
    """Yield a list with more items at its end, written as it is: in lines, or between brackets."""
    if node.flow_style:
        at = node.end_mark.index - 1
        separator = ", " if node.value else ""
        yield text[:at] + separator + ", ".join(map(_inline, new)) + text[at:]
        return
    last = node.value[-1]
    if last.id != "scalar" or last.style not in INLINE_STYLES:
        return
    found = LINE_BREAK.search(text, last.end_mark.index)
    at = found.end() if found else len(text)
    head = _ended(text[:at], line_break)
    indent = " " * node.start_mark.column
    yield head + "".join(f"{indent}- {_inline(item)}{line_break}" for item in new) + text[at:]


def _replaced(text: str, node: "yaml.Node", value: str) -> str:
    return text[: node.start_mark.index] + value + text[node.end_mark.index :]


def _ended(text: str, line_break: str) -> str:
    return text if not text or text.endswith(("\n", "\r")) else text + line_break


def _lines(key: str, value: Any, line_break: str) -> str:
    """Return `key: value` as lines of YAML."""
    return _dumped({key: value}, default_flow_style=False).replace("\n", line_break)


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    written = _dumped([value], default_flow_style=True)
    return written.strip().removeprefix("[").removesuffix("]")


def _dumped(value: Any, *, default_flow_style: bool) -> str:
    import yaml

    text: str = yaml.safe_dump(
        value,
        default_flow_style=default_flow_style,
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
    )
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
