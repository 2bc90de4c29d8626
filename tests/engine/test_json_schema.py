"""Schemas in schemas: the places that references mean, and schemas that are moved with them."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.engine.grammar_spec import GrammarError, embedded
from hanok.engine.json_schema import Document, keywords

TREE = {
    "type": "object",
    "properties": {"value": {"$ref": "#/$defs/number"}, "next": {"$ref": "#"}},
    "required": ["value"],
    "$defs": {"number": {"type": "integer", "minimum": 3}},
}
SCHEMAS: list[tuple[str, Any]] = [
    ("a tree that refers to itself", TREE),
    (
        "definitions",
        {"items": {"$ref": "#/definitions/k"}, "definitions": {"k": {"enum": ["a", 3]}}},
    ),
    (
        "names that are escaped",
        {
            "anyOf": [{"$ref": "#/$defs/a~1b~0c%25"}, {"$ref": "#/$defs/%C3%BC%20x"}],
            "$defs": {"a/b~c%": {"const": 3}, "ü x": {"type": "string"}},
        },
    ),
    (
        "a reference that is not percent-encoded",
        {"$ref": "#/$defs/Box[int] ü", "$defs": {"Box[int] ü": {"type": "integer"}}},
    ),
    (
        "properties",
        {
            "properties": {"a": {"type": "integer"}, "next": {"$ref": "#/properties/a"}},
            "items": {"prefixItems": [{"$ref": "#/properties/next"}]},
        },
    ),
    (
        "an array's item",
        {"prefixItems": [{"type": "integer"}, {"$ref": "#/prefixItems/0"}]},
    ),
    (
        "keywords that nobody knows",
        {
            "items": {"$ref": "#/components/schemas/k"},
            "components": {
                "schemas": {"k": {"anyOf": [{"$ref": "#/components/schemas/j"}]}, "j": {"const": 3}}
            },
        },
    ),
    (
        "anchors",
        {"items": {"$ref": "#k"}, "$defs": {"x": {"$anchor": "k", "type": "integer"}}},
    ),
    (
        "one dynamic anchor",
        {
            "properties": {"next": {"$dynamicRef": "#node"}},
            "$dynamicAnchor": "node",
            "type": "object",
        },
    ),
    (
        "an identity",
        {
            "$id": "http://host.invalid/tree",
            "properties": {
                "a": {"$ref": "tree#/$defs/k"},
                "next": {"$ref": "http://host.invalid/tree"},
                "value": {"$ref": "http://host.invalid/tree#k"},
            },
            "$defs": {"k": {"$anchor": "k", "type": "integer"}},
        },
    ),
    (
        "a document in the document",
        {
            "$id": "http://host.invalid/one",
            "properties": {"a": {"$ref": "two"}, "next": {"$ref": "two#/$defs/k"}},
            "$defs": {
                "k": {"type": "string"},
                "two": {
                    "$id": "two",
                    "$defs": {"k": {"type": "integer"}},
                    "anyOf": [{"$ref": "#/$defs/k"}, {"$ref": "one#/$defs/k"}],
                    "maximum": 3,
                },
            },
        },
    ),
    (
        "properties and values called $ref",
        {
            "properties": {
                "$ref": {"type": "string"},
                "a": {"const": {"$ref": "#/$defs/k"}},
                "next": {"enum": [{"$ref": "#/nowhere"}, 3], "default": {"$ref": "#/nowhere"}},
                "$defs": {"$ref": "#/$defs/k"},
            },
            "$defs": {"k": {"type": "integer"}},
            "examples": [{"$ref": "#/nowhere"}],
        },
    ),
    ("none", {"properties": {"a": {"type": "integer"}}, "$schema": "http://host.invalid/own"}),
    ("siblings", {"items": {"$ref": "#/$defs/k", "minimum": 4}, "$defs": {"k": {"maximum": 5}}}),
    ("no schema but true", {"items": {"$ref": "#/$defs/k"}, "$defs": {"k": False}}),
]

LEAVES = st.sampled_from([3, 4, 6, -1, 3.5, "a", "", None, True])
NAMES = st.sampled_from(["value", "next", "a", "$ref", "$defs"])
VALUES = st.recursive(
    LEAVES | st.just({"$ref": "#/$defs/k"}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def is_valid(schema: Any, value: Any) -> bool:
    # A URI that nobody can fetch in "$schema" says nothing to the library either.
    return jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("schema", [item[1] for item in SCHEMAS], ids=[x[0] for x in SCHEMAS])
@settings(max_examples=60)
@given(value=VALUES)
def test_a_moved_schema_takes_the_same_values(schema: Any, value: Any) -> None:
    before = json.dumps(schema)
    moved, definitions = embedded(schema, "a/tool")
    assert json.dumps(schema) == before
    around = {"properties": {"arguments": moved}, "$defs": definitions}
    assert is_valid(around, {"arguments": value}) == is_valid(schema, value)


def test_several_schemas_stand_side_by_side() -> None:
    """Definitions of one name are each schema's own."""
    kinds: list[dict[str, Any]] = [
        {"$ref": "#/$defs/kind", "$defs": {"kind": {"const": number}}} for number in range(3)
    ]
    moved = [embedded(schema, f"tool-{number}") for number, schema in enumerate(kinds)]
    around = {
        "prefixItems": [schema for schema, _ in moved],
        "$defs": {name: found for _, part in moved for name, found in part.items()},
    }
    assert is_valid(around, [0, 1, 2])
    assert not any(is_valid(around, value) for value in ([1, 1, 2], [0, 2, 2], [0, 1, 1]))


def test_a_schema_without_references_stays_where_it_is() -> None:
    schema = {"$schema": "x", "$id": "y", "properties": {"a": {"$anchor": "b", "type": "null"}}}
    assert embedded(schema, "name") == ({"properties": {"a": {"type": "null"}}}, {})


def test_a_part_that_is_the_same_object_twice_is_moved_once() -> None:
    part = {"$ref": "#/$defs/k"}
    schema = {"properties": {"a": part, "next": part}, "$defs": {"k": {"const": 3}}}
    moved, definitions = embedded(schema, "t")
    assert is_valid(moved | {"$defs": definitions}, {"a": 3, "next": 3})
    assert not is_valid(moved | {"$defs": definitions}, {"a": 3, "next": 4})


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"items": {"$ref": "#/$defs/k"}}, "/items/$ref"),
        ({"anyOf": [{"$ref": "#/title/x"}], "title": "x"}, "/anyOf/0/$ref"),
        ({"$ref": "#/anyOf/7", "anyOf": [True]}, "/$ref"),
        ({"$ref": "#/anyOf/x", "anyOf": [True]}, "/$ref"),
        ({"$ref": "#/title", "title": "x"}, "/$ref"),
        ({"$ref": "#anchor"}, "/$ref"),
        (
            {
                "$dynamicRef": "#n",
                "anyOf": [{"$dynamicAnchor": "n"}, {"$dynamicAnchor": "n", "type": "null"}],
            },
            "/$dynamicRef",
        ),
    ],
)
def test_a_reference_that_cannot_move_is_named(schema: Any, place: str) -> None:
    with pytest.raises(GrammarError, match="of the JSON schema is '#") as caught:
        embedded(schema, "t")
    assert caught.value.pointer == place


def test_another_document_stays_where_it_is() -> None:
    """Whoever compiles the schema knows it, or says that it is not there."""
    for reference in ("http://host.invalid/other#/$defs/k", "http://[host/", "urn:a:b"):
        schema = {"anyOf": [{"$ref": reference}, {"$ref": "#/$defs/k"}], "$defs": {"k": True}}
        _, definitions = embedded(schema, "t")
        assert definitions["t"]["anyOf"][0] == {"$ref": reference}


def references(schema: Any) -> Iterator[str]:
    return (found["$ref"] for _, keyword, found in keywords(schema) if keyword == "$ref")


def test_a_document_knows_what_its_references_mean() -> None:
    document = Document(TREE)
    assert list(references(TREE)) == ["#/$defs/number", "#"]
    assert document.target("/properties/value", "#/$defs/number") == "/$defs/number"
    assert document.target("/properties/next", "#") == ""
    assert document.schemas["/$defs/number"] is TREE["$defs"]["number"]
