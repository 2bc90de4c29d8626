"""The schemas inside of a JSON schema: where they lie, and which of them its references mean.

Follows JSON Schema 2020-12 (https://json-schema.org/draft/2020-12/json-schema-core), with the keywords
of earlier drafts. Places are JSON pointers (RFC 6901) from the root of the whole document.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote, urljoin

Schema = dict[str, Any]

_HOLDS_SCHEMA = frozenset(
    "items additionalItems additionalProperties unevaluatedItems unevaluatedProperties contains "
    "propertyNames not if then else contentSchema".split()
)
_HOLDS_LIST = frozenset("anyOf oneOf allOf prefixItems items".split())
_HOLDS_NAMED = frozenset(
    "properties patternProperties $defs definitions dependentSchemas dependencies".split()
)
_IN_FRAGMENTS = "/?!$&'()*+,;=:@~"  # besides letters, digits and -._ (RFC 3986, section 3.5)


def keywords(schema: Schema, pointer: str = "") -> Iterator[tuple[str, str, Schema]]:
    """Each keyword of a schema and of the schemas in it: pointer, name, and the schema it is in.

    What a keyword holds comes before the keyword. Names of properties are no keywords.
    """
    for keyword in schema:
        for place, item in schemas_in(schema, keyword, pointer):
            yield from keywords(item, place)
        yield f"{pointer}/{escape(keyword)}", keyword, schema


def schemas_in(schema: Schema, keyword: str, pointer: str = "") -> Iterator[tuple[str, Schema]]:
    """The schemas that one keyword of a schema holds, each with its pointer; none without it."""
    place, value = f"{pointer}/{escape(keyword)}", schema.get(keyword)
    found: list[tuple[str, Any]] = []
    if keyword in _HOLDS_SCHEMA:
        found.append((place, value))
    if keyword in _HOLDS_LIST and isinstance(value, list):
        found += ((f"{place}/{index}", item) for index, item in enumerate(value))
    if keyword in _HOLDS_NAMED and isinstance(value, dict):
        found += ((f"{place}/{escape(name)}", item) for name, item in value.items())
    return ((where, item) for where, item in found if isinstance(item, dict))


def with_schemas(
    schema: Schema, keyword: str, pointer: str, change: Callable[[str], Schema]
) -> Any:
    """The value of a keyword with the schemas in it as `change` gives them, by their pointers."""
    changed = {place: change(place) for place, _ in schemas_in(schema, keyword, pointer)}
    place, value = f"{pointer}/{escape(keyword)}", schema[keyword]
    if place in changed:
        return changed[place]
    if isinstance(value, list):
        return [changed.get(f"{place}/{index}", item) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {name: changed.get(f"{place}/{escape(name)}", item) for name, item in value.items()}
    return value


def escape(name: str) -> str:
    """A name as a part of a pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def reference_to(pointer: str) -> str:
    """The `$ref` to a place of the same document."""
    return "#" + quote(pointer, safe=_IN_FRAGMENTS)


class Document:
    """A schema as a document that its references are to.

    Where it has `$id`, parts of it are documents of their own, with names and pointers of their own.
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        self.schemas: dict[str, Schema] = {}
        """By their pointers. Objects where no schema is expected count only if they are referred to."""
        self._bases: dict[str, str] = {}
        """Of each schema: the URI that references in it are relative to."""
        self._roots = {"": ""}
        """URI of a document → pointer of its root."""
        self._anchors: dict[tuple[str, str], str] = {}
        self._dynamic: Counter[str] = Counter()
        self._add(root, "", "")

    def _add(self, schema: Schema, pointer: str, base: str) -> None:
        if pointer in self.schemas:
            return
        identity = schema.get("$id")
        if isinstance(identity, str):
            base = _joined(base, identity.removesuffix("#"))
            self._roots.setdefault(base, pointer)
        self.schemas[pointer], self._bases[pointer] = schema, base
        for keyword in ("$anchor", "$dynamicAnchor"):
            name = schema.get(keyword)
            if isinstance(name, str):
                self._anchors.setdefault((base, name), pointer)
                self._dynamic[name] += keyword == "$dynamicAnchor"
        for keyword in schema:
            for place, item in schemas_in(schema, keyword, pointer):
                self._add(item, place, base)

    def target(self, pointer: str, reference: str) -> str | None:
        """The pointer that a reference in the schema at `pointer` means; None: another document.

        LookupError if there is no schema.
        """
        address, _, fragment = reference.partition("#")
        base = _joined(self._bases[pointer], address)
        if base not in self._roots:
            return None
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            return self._anchors[base, fragment]
        place = self._roots[base] + fragment
        if place not in self.schemas:
            found = self._at(place)
            if isinstance(found, dict):
                self._add(found, place, base)
            elif not isinstance(found, bool):
                raise LookupError(place)
        return place

    def _at(self, pointer: str) -> object:
        found: Any = self._root
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise LookupError(pointer)
        return found

    def has_several(self, reference: str) -> bool:
        """Whether which place a `$dynamicRef` means depends on how it was reached."""
        return self._dynamic[unquote(reference.partition("#")[2])] > 1


def _joined(base: str, reference: str) -> str:
    try:
        return urljoin(base, reference) if reference else base
    except ValueError:  # no URI at all
        return reference
