"""JSON schemas of objects that have no properties but those they name.

JSON Schema lets an object have any further property unless `additionalProperties` says otherwise. Who
writes a schema rarely means that, and a model that may write more goes on writing: small ones never
come to the closing brace. So where nothing is said, nothing more may be written.

What the closed schema takes the original takes too. Schemas that hold for the same object (those of an
`allOf`, the target of a `$ref` with siblings, an `anyOf` next to `properties`) are closed
together: each allows the names of all. Where a schema that takes less would make another take more
(`not`, a `oneOf` whose parts may fit one value), or what is named cannot be known, the whole schema
stays as it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, starmap
from typing import Any

from hanok.engine.json_schema import Document, Schema, escape, schemas_in, with_schemas

_LEFT_AS_IT_IS = frozenset(
    "not if then else contains dependentSchemas dependencies unevaluatedProperties unevaluatedItems "
    "$dynamicRef $recursiveRef".split()
)
"""Keywords whose schemas do not simply all have to fit."""

_MOST_TOGETHER = 64
"""Schemas that hold for the same object. Of more, nothing is closed."""

_SPARE = 2_000
"""How many schemas and names may be added to a schema, beyond twice its own."""

_MOST_COMPARED = 20_000
"""Pairs of schemas whose values are distinguished."""

_MOST_STEPS = 8
"""References, and properties in properties, that are followed one after the other."""

_KINDS = ("array", "boolean", "integer", "null", "number", "object", "string")
_OF_THE_PLACE = frozenset(["$defs", "definitions", "$anchor"])  # which a copy does not have


def closed(schema: Schema) -> Schema:
    """The schema with `additionalProperties` false where it names properties and says nothing of others.

    Every value that it takes fits the original. The original is not changed.
    """
    document = Document(schema)
    for pointer, item in document.schemas.items():
        if not _LEFT_AS_IT_IS.isdisjoint(item) or (pointer and "$id" in item):
            return schema
    try:
        return _Closing(document).closed("", _NOTHING)
    except (_CannotClose, LookupError):  # of a reference to nothing the compiler says so
        return schema


class _CannotClose(Exception):
    """The schema is better left unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """The properties that some schemas name."""

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    says_more: bool = False
    """One says what others may be."""

    def __bool__(self) -> bool:
        return bool(self.names or self.patterns or self.says_more)


_NOTHING = _Named()


def _named_itself(schema: Schema) -> _Named:
    properties, patterns = schema.get("properties"), schema.get("patternProperties")
    names = properties if isinstance(properties, dict) else ()
    return _Named(
        names=tuple(dict.fromkeys([*names, *_required(schema)])),
        patterns=tuple(patterns) if isinstance(patterns, dict) else (),
        says_more=schema.get("additionalProperties", False) is not False,
    )


def _all(found: Iterable[_Named]) -> _Named:
    parts = list(found)
    return _Named(
        names=tuple(dict.fromkeys(name for part in parts for name in part.names)),
        patterns=tuple(dict.fromkeys(pattern for part in parts for pattern in part.patterns)),
        says_more=any(part.says_more for part in parts),
    )


class _Closing:
    """Closes the schemas of one document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._left = 2 * len(document.schemas) + _SPARE
        self._found: dict[str, _Named] = {}
        self._found_groups: dict[str, list[list[str]]] = {}
        self._copied: list[str] = []
        self._num_compared = 0

    def closed(self, pointer: str, others: _Named) -> Schema:
        """The schema at `pointer`, where its siblings name `others` for the same object."""
        schema = self._document.schemas[pointer]
        itself, groups = _named_itself(schema), self._groups(pointer)
        named = [_all(map(self._named, group)) for group in groups]
        beside: dict[str, _Named] = {}
        for number, group in enumerate(groups):
            around = _all([others, itself, *named[:number], *named[number + 1 :]])
            self._spend(len(around.names))
            beside |= dict.fromkeys(group, around)

        def inner(place: str) -> Schema:
            return self.closed(place, beside.get(place, _NOTHING))

        result = {key: with_schemas(schema, key, pointer, inner) for key in schema}
        parts = [part for _, part in schemas_in(schema, "oneOf", pointer)]
        if "anyOf" not in schema and any("$ref" in part for part in parts):
            # No value fits two of them, which the compiler, following no references, cannot see.
            result["anyOf"] = result.pop("oneOf")
        target = self._target(pointer)
        if target is not None and beside[target]:
            # Elsewhere the same schema is used alone.
            del result["$ref"]
            both = result.get("allOf", [])
            result["allOf"] = [*both, self._copy(target, beside[target])]
        self._spend(1)
        return _without_more(result, _all([itself, others, *named]))

    def _copy(self, pointer: str, others: _Named) -> Schema:
        if pointer in self._copied or len(self._copied) > _MOST_STEPS:
            raise _CannotClose
        self._copied.append(pointer)
        found = self.closed(pointer, others)
        self._copied.pop()
        return {key: value for key, value in found.items() if key not in _OF_THE_PLACE}

    def _groups(self, pointer: str) -> list[list[str]]:
        """The schemas that hold for the same object; of those in one list only one has to."""
        if pointer in self._found_groups:
            return self._found_groups[pointer]
        schema, target = self._document.schemas[pointer], self._target(pointer)
        groups = [] if target is None else [[target]]
        for keyword in ("allOf", "anyOf", "oneOf"):
            places = [place for place, _ in schemas_in(schema, keyword, pointer)]
            if not isinstance(schema.get(keyword, []), list):
                raise _CannotClose  # the compiler says what is wrong
            if keyword == "allOf":
                groups += [[place] for place in places]
            elif places:
                groups.append(places)
        if len(groups) > _MOST_TOGETHER or not self._is_one(pointer):
            raise _CannotClose
        self._found_groups[pointer] = groups
        return groups

    def _is_one(self, pointer: str) -> bool:
        """Whether certainly no value fits two parts of a `oneOf`."""
        schema = self._document.schemas[pointer]
        places = [place for place, _ in schemas_in(schema, "oneOf", pointer)]
        has_any = any(part is True for part in schema.get("oneOf", []))
        return not has_any and all(starmap(self._are_apart, combinations(places, 2)))

    def _named(self, pointer: str, depth: int = 0) -> _Named:
        """What the schema at `pointer` names, by itself and by others that hold for the same object."""
        if depth > _MOST_TOGETHER:
            raise _CannotClose
        if pointer not in self._found:
            self._found[pointer] = _NOTHING  # for one that holds for itself
            places = [place for group in self._groups(pointer) for place in group]
            parts = [self._named(place, depth + 1) for place in places]
            self._found[pointer] = _all([_named_itself(self._document.schemas[pointer]), *parts])
        return self._found[pointer]

    def _target(self, pointer: str) -> str | None:
        reference = self._document.schemas[pointer].get("$ref")
        if not isinstance(reference, str):
            return None
        target = self._document.target(pointer, reference)
        if target is None:
            raise _CannotClose  # what another document names is not known
        return target if target in self._document.schemas else None

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _CannotClose

    def _are_apart(self, first: str, second: str, depth: int = 0) -> bool:
        """Whether certainly no value fits both."""
        self._num_compared += 1
        if self._num_compared > _MOST_COMPARED:
            raise _CannotClose
        one, other = self._resolved(first), self._resolved(second)
        if depth > _MOST_STEPS or one is None or other is None:
            return False
        a, b = self._document.schemas[one], self._document.schemas[other]
        kinds, values = (_kinds(a), _kinds(b)), (_values(a), _values(b))
        if kinds[0].isdisjoint(kinds[1]):
            return True
        if values[0] is not None and values[1] is not None and values[0].isdisjoint(values[1]):
            return True
        if {"object"} not in kinds:
            return False
        places = [dict(schemas_in(*x)) for x in ((a, "properties", one), (b, "properties", other))]
        both = set(_required(a)) & set(_required(b))
        pairs = [tuple(f"{p}/properties/{escape(name)}" for p in (one, other)) for name in both]
        return any(
            x in places[0] and y in places[1] and self._are_apart(x, y, depth + 1) for x, y in pairs
        )

    def _resolved(self, pointer: str) -> str | None:
        """The end of a chain of references."""
        for _ in range(_MOST_STEPS):
            target = self._target(pointer)
            if target is None:
                return pointer
            pointer = target
        return None


def _without_more(schema: Schema, named: _Named) -> Schema:
    """A schema that names properties, with none but `named`; it is changed."""
    properties, patterns = schema.get("properties"), schema.get("patternProperties", {})
    least = schema.get("minProperties")
    has_room = not isinstance(least, int | float) or named.patterns or least <= len(named.names)
    if not isinstance(properties, dict) or not isinstance(patterns, dict):
        return schema
    if has_room and not named.says_more and "additionalProperties" not in schema:
        schema["properties"] = {**dict.fromkeys(named.names, True), **properties}
        if named.patterns:
            schema["patternProperties"] = {**dict.fromkeys(named.patterns, True), **patterns}
        schema["additionalProperties"] = False
    return schema


def _required(schema: Schema) -> list[str]:
    required = schema.get("required")
    return (
        [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    )


def _kinds(schema: Schema) -> frozenset[str]:
    """The types that a value may have; an integer is a number."""
    given = schema.get("type")
    listed = [kind for kind in (given if isinstance(given, list) else [given]) if kind in _KINDS]
    kinds = frozenset("number" if kind == "integer" else str(kind) for kind in listed or _KINDS)
    values = _values(schema)
    return kinds if values is None else kinds & {kind for kind, _ in values}


def _values(schema: Schema) -> frozenset[tuple[str, Any]] | None:
    """The values of a `const` or `enum`, with their types; None: any, or such as are not compared."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, dict | list) for value in values):
        return None
    return frozenset((_kind(value), value) for value in values)


def _kind(value: bool | int | float | str | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return "string" if isinstance(value, str) else "number"
