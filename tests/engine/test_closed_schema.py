"""Objects have the properties that their schema names: closing takes away, and never adds."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.engine.closed_schema import closed


def is_valid(schema: Any, value: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


A, B, C = ({"properties": {name: {"type": "integer"}}} for name in "abc")
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
}

# Each schema with what may still be written, and with what may not be any more.
CASES: list[tuple[str, Any, list[Any], list[Any]]] = [
    ("an object", A, [{}, {"a": 1}, 3], [{"b": 1}, {"a": 1, "b": 1}]),
    ("without properties", {"type": "object"}, [{"a": 1}], []),
    ("with no properties", {"type": "object", "properties": {}}, [{}], [{"a": 1}]),
    ("that says more", {**A, "additionalProperties": True}, [{"b": 1}], []),
    ("that says what more", {**A, "additionalProperties": {"type": "null"}}, [{"b": None}], []),
    ("required", {**A, "required": ["b"]}, [{"b": 1}, {"a": 1, "b": 1}], [{"b": 1, "c": 1}]),
    ("patterns", {**A, "patternProperties": {"^x": True}}, [{"xy": 1}, {"a": 1}], [{"b": 1}]),
    ("more than are named", {**A, "minProperties": 2}, [{"a": 1, "b": 2}], []),
    ("as many as are named", {**A, "minProperties": 1}, [{"a": 1}], [{"a": 1, "b": 2}]),
    (
        "nested",
        {"items": {"properties": {"x": A}}, "additionalProperties": A},
        [[{"x": {"a": 1}}], {"any": {"a": 1}}],
        [[{"y": 1}], [{"x": {"b": 1}}], {"any": {"b": 1}}],
    ),
    ("choices", {"anyOf": [A, B]}, [{"a": 1}, {"b": 1}], [{"a": 1, "b": 1}, {"c": 1}]),
    ("all", {"allOf": [A, B]}, [{"a": 1, "b": 1}, {"a": 1}], [{"c": 1}]),
    (
        "choices beside properties",
        {**A, "anyOf": [{**B, "required": ["b"]}, C]},
        [{"a": 1, "b": 1}, {"a": 1, "c": 1}],
        [{"d": 1}, {"b": 1, "c": 1}],
    ),
    (
        "choices of what is required",
        {**A, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1, "c": 1}],
    ),
    (
        "all of choices",
        {"allOf": [{"anyOf": [A, B]}, {"anyOf": [C, {"properties": {"d": True}}]}]},
        [{"a": 1, "c": 1}, {"b": 1, "d": 1}],
        [{"a": 1, "b": 1}, {"c": 1, "d": 1}, {"e": 1}],
    ),
    (
        "all with one that says more",
        {"allOf": [A, {**B, "additionalProperties": True}]},
        [{"a": 1, "c": 1}],
        [],
    ),
    (
        "all with patterns",
        {"allOf": [A, {**B, "patternProperties": {"^x": {"type": "null"}}}]},
        [{"a": 1, "b": 1, "x": None}],
        [{"c": 1}],
    ),
    (
        "definitions",
        {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": A}},
        [[{"a": 1}]],
        [[{"b": 1}]],
    ),
    ("itself", {**NODE, "$defs": {"node": NODE}}, [{"next": {"value": 1}}], [{"next": {"x": 1}}]),
    (
        "one that stands alone and is part of another",
        {
            "prefixItems": [
                {"$ref": "#/$defs/a"},
                {"allOf": [{"$ref": "#/$defs/a"}, B]},
                {"$ref": "#/$defs/a", **C},
                {"$ref": "#/$defs/a", "required": ["d"]},
            ],
            "$defs": {"a": A},
        },
        [[{"a": 1}, {"a": 1, "b": 1}, {"a": 1, "c": 1}, {"a": 1, "d": 1}]],
        [[{"b": 1}], [{}, {"c": 1}], [{}, {}, {"b": 1}], [{}, {}, {}, {"d": 1, "b": 1}]],
    ),
    (
        "one reference in allOf, as pydantic wrote them",
        {"allOf": [{"$ref": "#/$defs/a"}], "description": "an a", "$defs": {"a": A}},
        [{"a": 1}],
        [{"b": 1}],
    ),
    (
        "one that is told apart",
        {
            "oneOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}, {"type": "null"}],
            "$defs": {
                name: {
                    "type": "object",
                    "properties": {"kind": {"const": name}, name: True},
                    "required": ["kind"],
                }
                for name in "xy"
            },
        },
        [{"kind": "x", "x": 1}, {"kind": "y", "y": 1}, None],
        [{"kind": "x", "y": 1}],
    ),
    (
        "properties called like keywords",
        {"properties": {"not": A}},
        [{"not": {"a": 1}}],
        [{"if": 1}],
    ),
]


@pytest.mark.parametrize(
    ("schema", "taken", "refused"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_what_is_not_named_is_refused(schema: Any, taken: list[Any], refused: list[Any]) -> None:
    before = json.dumps(schema)
    found = closed(schema)
    assert json.dumps(schema) == before
    for value in taken:
        assert is_valid(schema, value)
        assert is_valid(found, value), value
    for value in refused:
        assert is_valid(schema, value)
        assert not is_valid(found, value), value
    assert closed(found) == found


LEFT: list[tuple[str, Any]] = [
    ("not", {**A, "not": B}),
    ("in a definition", {"items": A, "$defs": {"x": {"if": A, "then": B}}}),
    ("oneOf that is not told apart", {"items": A, "oneOf": [{**A, "required": ["a"]}, B]}),
    ("oneOf with any value", {"oneOf": [True, A]}),
    ("oneOf of one kind", {"oneOf": [{"const": 1}, {"enum": [1.0, 2]}], **A}),
    ("unevaluatedProperties", {"allOf": [A, B], "unevaluatedProperties": False}),
    ("another document", {"$ref": "http://host.invalid/x", **A}),
    ("nothing", {"$ref": "#/$defs/x", **A}),
    ("a document inside", {"items": {"$id": "http://host.invalid/x", **A}}),
    ("no list", {"allOf": A, **A}),
    ("a part that holds itself", {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x", **A}}}),
]


@pytest.mark.parametrize("schema", [case[1] for case in LEFT], ids=[case[0] for case in LEFT])
def test_what_cannot_be_closed_stays_as_it_is(schema: Any) -> None:
    assert closed(schema) == schema


@pytest.mark.parametrize("count", [2, 40, 2000])
def test_what_is_added_is_bounded(count: int) -> None:
    parts = [
        {"properties": {f"{part} {name}": True for name in range(20)}} for part in range(count)
    ]
    chain = {
        str(at): {"$ref": f"#/$defs/{at + 1}", "properties": {f"{at}": True}} for at in range(count)
    }
    for schema in (
        {"allOf": parts},
        {"$ref": "#/$defs/0", "$defs": {**chain, str(count): {}}},
        {"allOf": [{"$ref": "#/$defs/x"}] * min(count, 60), **A, "$defs": {"x": {"allOf": parts}}},
    ):
        size = len(json.dumps(schema))
        assert len(json.dumps(closed(schema))) < 4 * size + 100_000


def schemas(*references: str) -> st.SearchStrategy[Any]:
    """Schemas that refer to some others."""
    names = st.sampled_from(["a", "b", "c"])
    targets = st.sampled_from(references) if references else st.nothing()
    leaves = st.sampled_from([True, {"type": "integer"}, {"const": 1}, {"enum": ["x", 2]}])
    leaves |= st.fixed_dictionaries({"$ref": targets})

    def around(schema: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(schema, min_size=1, max_size=3)
        named = st.dictionaries(names, schema, max_size=2)
        patterns = st.dictionaries(st.sampled_from(["^a", "c"]), schema, max_size=1)
        keys = {
            "type": st.sampled_from(["object", ["object", "integer"]]),
            "properties": named,
            "patternProperties": patterns,
            "additionalProperties": schema | st.just(False),
            "required": st.lists(names, max_size=2, unique=True),
            "minProperties": st.integers(0, 2),
            "allOf": lists,
            "anyOf": lists,
            "oneOf": lists,
            "items": schema,
        }
        return st.fixed_dictionaries({}, optional=keys | ({"$ref": targets} if references else {}))

    return st.recursive(leaves, around, max_leaves=8).filter(lambda found: found is not True)


DOCUMENTS = st.builds(
    lambda root, d, e: {**root, "$defs": {"d": d, "e": e}},
    schemas("#/$defs/d", "#/$defs/e"),
    schemas(),
    schemas("#/$defs/d"),
)
VALUES = st.recursive(
    st.sampled_from([1, 2, "x", None]),
    lambda inner: (
        st.dictionaries(st.sampled_from(["a", "b", "c", "ac", "d"]), inner, max_size=3)
        | st.lists(inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(schema=DOCUMENTS, values=st.lists(VALUES, min_size=4, max_size=8))
def test_what_the_closed_schema_takes_the_original_takes(schema: Any, values: list[Any]) -> None:
    found = closed(schema)
    for value in values:
        assert is_valid(schema, value) or not is_valid(found, value)
