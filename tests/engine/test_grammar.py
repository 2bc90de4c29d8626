import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import jsonschema
import pytest
import torch

import hanok
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.engine import grammar as grammar_module
from hanok.engine.grammar import Grammar, GrammarCompiler, Matcher
from hanok.engine.grammar_spec import (
    FORMATS,
    MAX_BYTES,
    MAX_PATTERN_BYTES,
    GrammarError,
    GrammarSpec,
    embedded,
    read_schema,
)
from hanok.engine.json_schema import keywords

ROWS = 2060  # more than the tokenizer has tokens, as padded embeddings do
LIMIT = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(hanok.BUNDLED)


@pytest.fixture(scope="module")
def end_id(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos_token_id is not None
    return tokenizer.eos_token_id


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, end_id: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, ROWS, [end_id])


def schema_spec(schema: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema))


def allowed(matcher: Matcher) -> set[int]:
    scores = matcher.mask(torch.zeros(ROWS))
    assert set(scores.unique().tolist()) <= {0.0, float("-inf")}
    return set((scores == 0).nonzero().flatten().tolist())


def written(
    grammar: Grammar, tokenizer: Tokenizer, end_id: int, seed: int, *, spread: float = 3.0
) -> str | None:
    """A text drawn from random scores, or None where it was not finished in time.

    The end and what closes brackets and quotes are a little likelier, so that most texts end.
    """
    generator = torch.Generator().manual_seed(seed)
    bias = torch.zeros(ROWS)
    for text in '}])"':
        token_id = tokenizer.token_to_id(text)
        if token_id is not None:
            bias[token_id] = 5.0
    bias[end_id] = 8.0
    matcher = grammar.matcher()
    ids: list[int] = []
    for _ in range(LIMIT):
        scores = matcher.mask(torch.randn(ROWS, generator=generator) * spread + bias)
        token_id = int(scores.argmax())
        assert scores[token_id] > float("-inf")
        was_finished = matcher.is_finished
        assert not was_finished or token_id == end_id
        matcher.accept(token_id)
        if token_id == end_id:
            assert matcher.is_finished
            return tokenizer.decode(ids, skip_special_tokens=False)
        ids.append(token_id)
    return None


STRINGS: list[Any] = [
    {"type": "string"},
    {"type": "string", "maxLength": 0},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "minLength": 3},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "pattern": "^\\d{3}-\\d{4}$"},
    {"type": "string", "pattern": "x"},
    {"type": "string", "pattern": "^(rot|grün|blau)$", "minLength": 4},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "password", "maxLength": 5},
    {"type": "string", "format": "binary", "minLength": 1, "pattern": "^b"},
    {"enum": ["a", "b\n", 'quo"te', "ü", "日本"]},
    {"const": "back\\slash"},
]
NUMBERS: list[Any] = [
    {"type": "integer"},
    {"type": "number"},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -2.5, "exclusiveMaximum": -1.25},
    {"type": "integer", "multipleOf": 7},
    {"type": "number", "multipleOf": 0.25},
    {"type": "integer", "minimum": 100, "maximum": 1000, "multipleOf": 25},
    {"enum": [1, 2.5, -3, 0]},
    {"const": 42},
]
OTHERS: list[Any] = [
    True,
    {},
    {"type": "null"},
    {"type": "boolean"},
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean", "null"]},
    {"enum": [None, True, "x", 1, {"a": [1, {"b": None}]}, []]},
    {"const": {"a": [1, 2, {"b": "c"}]}},
    {"const": []},
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"type": "integer", "anyOf": [{"minimum": 100}, {"maximum": -100}]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer", "maximum": 0}}},
    {"$ref": "#/definitions/n", "minimum": -9, "definitions": {"n": {"type": "integer"}}},
    {"$ref": "#/$defs/List<Ünit>", "$defs": {"List<Ünit>": {"type": "null"}}},
    {"title": "A title", "description": "…", "default": 1, "examples": [1], "type": "integer"},
]
ARRAYS: list[Any] = [
    {"type": "array", "uniqueItems": False, "maxItems": 2},
    {"type": "array", "items": {"enum": ["a", "b", None]}, "uniqueItems": True},
    {"type": "array", "items": {"enum": [1, 2, 3, 4, 5]}, "uniqueItems": True, "minItems": 2},
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 1},
    {"type": "array", "items": {"const": "a"}, "uniqueItems": True, "minItems": 1, "maxItems": 9},
    {"type": "array"},
    {"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 1, "maxItems": 3},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2},
    {"type": "array", "maxItems": 0},
    {"type": "array", "items": False},
    {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "string", "maxLength": 4}],
        "items": False,
        "minItems": 2,
    },
    {
        "type": "array",
        "prefixItems": [{"const": "x"}],
        "items": {"type": "boolean"},
        "maxItems": 4,
    },
    {"type": "array", "items": {"type": "array", "items": {"type": "null"}, "maxItems": 2}},
    {"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "integer"}]}, "maxItems": 3},
    {
        "type": "array",
        "items": {"$ref": "#/$defs/Kind of x"},
        "uniqueItems": True,
        "$defs": {"Kind of x": {"enum": ["a", "b", "a"], "title": "Kind"}},
    },
]
OBJECTS: list[Any] = [
    {"type": "object"},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"type": "integer"}}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["b", "a"]},
    {
        "type": "object",
        "properties": {name: {"enum": [1, 2]} for name in "abcdefgh"},
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in "abcd"},
        "required": ["b", "d"],
        "minProperties": 2,
        "additionalProperties": False,
    },
    {"type": "object", "minProperties": 1, "maxProperties": 3},
    {
        "type": "object",
        "patternProperties": {"^n_": {"type": "integer"}, "^s_": {"type": "string"}},
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {'quo"te': {"const": 1}, "/~ ü": {"const": 2}},
        "required": ['quo"te', "/~ ü"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {
            "user": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 12},
                    "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
                },
                "required": ["name", "tags"],
                "additionalProperties": False,
            },
            "note": {"anyOf": [{"type": "string", "maxLength": 8}, {"type": "null"}]},
        },
        "required": ["user"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 99},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "size": schema},
                "required": ["kind", "size"],
                "additionalProperties": False,
            }
            for kind, schema in [("n", {"type": "integer"}), ("s", {"enum": ["big"]})]
        ]
    },
    {  # as pydantic writes a union that a function tells apart, without `discriminator`
        "$defs": {
            kind: {
                "type": "object",
                "properties": {"kind": {"const": kind}, "size": schema},
                "required": ["kind", "size"],
            }
            for kind, schema in [("n", {"type": "integer"}), ("s", {"enum": ["big"]})]
        },
        "type": "object",
        "properties": {"it": {"oneOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/s"}]}},
        "required": ["it"],
    },
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 5}, "b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "pair": {
                "type": "array",
                "items": [{"type": "integer"}, {"type": "boolean"}],
                "additionalItems": False,
                "minItems": 2,
            }
        },
        "required": ["pair"],
        "additionalProperties": False,
    },
]


def combined() -> Iterator[Any]:
    """Objects and arrays of every two kinds of string and number, and of some others."""
    for text, number in product(STRINGS[2:12:2], NUMBERS[1:10:2]):
        yield {
            "type": "object",
            "properties": {"t": text, "n": {"type": "array", "items": number, "maxItems": 2}},
            "required": ["n"],
            "additionalProperties": False,
        }
    for first, second in product(OTHERS[2:9:2], [*ARRAYS[1:8:3], *OBJECTS[5:9:2]]):
        yield {"anyOf": [{"type": "array", "prefixItems": [first, second], "items": False}, second]}


SCHEMAS = [*STRINGS, *NUMBERS, *OTHERS, *ARRAYS, *OBJECTS, *combined()]


def test_there_are_more_than_a_hundred_schemas() -> None:
    assert len({json.dumps(schema) for schema in SCHEMAS}) == len(SCHEMAS) > 100


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_what_is_finished_is_valid(
    schema: Any, compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    grammar = compiler.compile(schema_spec(schema))
    finished = 0
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    for seed in range(4):
        text = written(grammar, tokenizer, end_id, seed)
        if text is not None:
            finished += 1
            value = json.loads(text)
            error = jsonschema.exceptions.best_match(validator(schema).iter_errors(value))
            assert error is None, f"{text!r}: {error.message}"
            assert "  " not in re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    assert finished


def test_a_schema_means_the_same_inside_of_another(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    """Two schemas with definitions of one name, moved into one that has both."""
    kinds = [
        {"type": "array", "items": {"$ref": "#/$defs/Of<T>"}, "$defs": {"Of<T>": {"const": value}}}
        for value in ("a", "b")
    ]
    moved = [embedded(schema, f"f/{number}") for number, schema in enumerate(kinds)]
    around = {
        "type": "object",
        "properties": {"x": moved[0][0], "y": moved[1][0]},
        "required": ["x", "y"],
        "additionalProperties": False,
        "$defs": moved[0][1] | moved[1][1],
    }
    grammar = compiler.compile(schema_spec(around))
    values = [
        json.loads(text) for seed in range(6) if (text := written(grammar, tokenizer, end_id, seed))
    ]
    assert any(value["x"] for value in values)
    for value in values:
        assert set(value["x"]) <= {"a"}
        assert set(value["y"]) <= {"b"}


def test_only_named_properties_are_written_unless_more_is_asked_for(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    node = {"type": "object", "properties": {"a": {"type": "null"}, "n": {"$ref": "#/$defs/node"}}}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    more = {"$ref": "#/$defs/node", "$defs": {"node": {**node, "additionalProperties": True}}}
    for text, is_named in (('{"a": null,"n": {"a": null}}', True), ('{"n": {"b": null}}', False)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for asked, is_taken in ((schema, is_named), (more, True)):
            matcher = compiler.compile(schema_spec(asked)).matcher()
            assert (matcher.allowed_prefix(ids) == len(ids)) == is_taken


def test_any_object_is_an_object(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    grammar = compiler.compile(GrammarSpec("json_object"))
    texts = [written(grammar, tokenizer, end_id, seed) for seed in range(20)]
    objects = [json.loads(text) for text in texts if text is not None]
    assert len(objects) > 5
    assert all(isinstance(item, dict) for item in objects)
    assert any(objects)


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{3,8}",
        r"[0-9]{4}-[0-9][0-9]-[0-9][0-9]",
        r"(ja|nein|vielleicht)",
        r"^anchored$",
        r"[가-힣]{2}!",
        r"a*b?c+",
        r"(?i)hanok",
        r"https?://[a-z0-9.]+/\S{0,9}",
        "line\nbreak|/slash/",
        r"[^\n\"]{0,12}",
        r"\\{1,3}",
        r"a\\",
    ],
)
def test_what_is_finished_fits_the_whole_regex(
    regex: str, compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    grammar = compiler.compile(GrammarSpec("regex", regex))
    texts = [written(grammar, tokenizer, end_id, seed) for seed in range(6)]
    assert any(text is not None for text in texts)
    assert [text for text in texts if text is not None and not re.fullmatch(regex, text)] == []


def test_a_lark_grammar_is_followed(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    grammar = compiler.compile(
        GrammarSpec("lark", 'start: "f(" NUMBER ("," NUMBER)* ")"\nNUMBER: /[0-9]{1,3}/')
    )
    texts = [written(grammar, tokenizer, end_id, seed) for seed in range(6)]
    found = [text for text in texts if text is not None]
    assert found
    assert all(re.fullmatch(r"f\(\d{1,3}(,\d{1,3})*\)", text) for text in found)


def test_an_end_may_come_only_where_the_text_fits(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "ab?")).matcher()
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert a is not None
    assert b is not None
    assert end_id not in allowed(matcher)
    assert not matcher.is_finished
    matcher.accept(a)
    assert allowed(matcher) == {b, end_id}
    assert not matcher.is_finished
    matcher.accept(b)
    assert allowed(matcher) == {end_id}
    assert matcher.is_finished


def test_every_end_token_ends(tokenizer: Tokenizer, end_id: int) -> None:
    other = tokenizer.token_to_id("<|user|>")
    assert other is not None
    compiler = GrammarCompiler(tokenizer, ROWS, [end_id, other])
    matcher = compiler.compile(GrammarSpec("regex", "a")).matcher()
    matcher.accept(tokenizer.encode("a", add_special_tokens=False)[0])
    assert allowed(matcher) == {end_id, other}
    matcher.accept(other)
    assert matcher.is_finished


def test_without_end_tokens_a_text_is_finished_where_nothing_may_follow(
    tokenizer: Tokenizer, end_id: int
) -> None:
    matcher = GrammarCompiler(tokenizer, ROWS, []).compile(GrammarSpec("regex", "ab")).matcher()
    while not matcher.is_finished:
        ids = allowed(matcher)
        assert end_id not in ids
        matcher.accept(min(ids))


def test_special_tokens_are_never_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(GrammarSpec("regex", r"[\s\S]{5}")).matcher()
    ids = allowed(matcher)
    assert ids & tokenizer.special_token_ids == set()
    assert len(ids) > 500


@pytest.mark.parametrize("around", [("", ""), ("so ", ""), ("", " it"), ("a", "b")], ids=repr)
def test_the_spelling_of_a_special_token_is_written_with_others(
    around: tuple[str, str], compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    for special in sorted(tokenizer.special_token_ids):
        text = around[0] + tokenizer.token_text(special) + around[1]
        for spec, expected in (
            (GrammarSpec("regex", re.escape(text)), text),
            (schema_spec({"const": text}), json.dumps(text)),
            (schema_spec({"enum": [text, "x"]}), json.dumps(text)),
        ):
            matcher = compiler.compile(spec).matcher()
            rest = expected.encode()
            while rest:
                found = allowed(matcher)
                assert tokenizer.special_token_ids.isdisjoint(found)
                spelled = {tokenizer.token_bytes(token_id): token_id for token_id in found}
                longest = max(filter(rest.startswith, spelled), key=len)
                matcher.accept(spelled[longest])
                rest = rest.removeprefix(longest)
            assert allowed(matcher) == {end_id}


def test_rows_without_a_token_are_never_allowed(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(GrammarSpec("regex", r"[\s\S]*")).matcher()
    assert max(allowed(matcher)) < tokenizer.vocab_size < ROWS


def test_other_scores_are_kept(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "[a-z]+")).matcher()
    scores = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    masked = matcher.mask(scores)
    assert torch.equal(scores, before)
    kept = masked > float("-inf")
    assert 0 < int(kept.sum()) < ROWS
    assert torch.equal(masked[kept], scores[kept])


def test_two_matchers_of_a_grammar_do_not_disturb_each_other(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = compiler.compile(GrammarSpec("regex", "(ab|cd)*"))
    one, two = grammar.matcher(), grammar.matcher()
    ids = {text: tokenizer.encode(text, add_special_tokens=False)[0] for text in "abcd"}
    one.accept(ids["a"])
    two.accept(ids["c"])
    assert ids["b"] in allowed(one)
    assert ids["d"] not in allowed(one)
    assert ids["d"] in allowed(two)
    assert ids["b"] not in allowed(two)
    assert {ids["a"], ids["c"]} <= allowed(grammar.matcher())


@pytest.mark.parametrize("seed", range(4))
def test_taking_tokens_back_restores(seed: int, compiler: GrammarCompiler, end_id: int) -> None:
    matcher = compiler.compile(schema_spec(OBJECTS[10])).matcher()
    generator = torch.Generator().manual_seed(seed)
    masks: list[set[int]] = [allowed(matcher)]
    for _ in range(40):
        for _ in range(4):
            if not matcher.is_finished:
                scores = matcher.mask(torch.randn(ROWS, generator=generator))
                matcher.accept(int(scores.argmax()))
                masks.append(allowed(matcher))
        back = int(torch.randint(0, min(len(masks) - 1, 5) + 1, (), generator=generator))
        matcher.rollback(back)
        del masks[len(masks) - back :]
        assert allowed(matcher) == masks[-1]
    matcher.rollback(len(masks) - 1)
    assert allowed(matcher) == masks[0]


@pytest.mark.parametrize("regex", ["a", "aa", "a?", "aa?", "(a|b){1,3}"])
def test_an_end_is_taken_back_too(
    regex: str, tokenizer: Tokenizer, compiler: GrammarCompiler, end_id: int
) -> None:
    """Whether the text may go on where it ends, or is over without an end token."""
    matcher = compiler.compile(GrammarSpec("regex", regex)).matcher()
    (a_id,) = tokenizer.encode("a", add_special_tokens=False)
    masks, finished = [], []
    for token_id in (a_id, a_id, a_id, end_id):
        masks.append(allowed(matcher))
        finished.append(matcher.is_finished)
        if token_id in masks[-1]:
            matcher.accept(token_id)
        else:
            masks.pop()
            finished.pop()
    assert matcher.is_finished
    while masks:
        matcher.rollback(1)
        assert (allowed(matcher), matcher.is_finished) == (masks.pop(), finished.pop())


def test_a_token_that_may_not_come_is_an_error(compiler: GrammarCompiler, end_id: int) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "ab")).matcher()
    with pytest.raises(GrammarError, match="could not be followed any further"):
        matcher.accept(end_id)
    assert not matcher.is_finished


def test_threads_compile_and_follow_at_once(tokenizer: Tokenizer, end_id: int) -> None:
    shared = GrammarCompiler(tokenizer, ROWS, [end_id])
    specs = [schema_spec(schema) for schema in OBJECTS]

    def work(spec: GrammarSpec) -> list[str | None]:
        grammar = shared.compile(spec)
        return [written(grammar, tokenizer, end_id, seed) for seed in range(2)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, [*specs, *specs]))
    assert found == [work(spec) for spec in [*specs, *specs]]


def test_a_grammar_is_compiled_once_until_others_push_it_out(
    tokenizer: Tokenizer, end_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "CACHED_GRAMMARS", 2)
    compiler = GrammarCompiler(tokenizer, ROWS, [end_id])
    first, second, third = (
        compiler.compile(GrammarSpec("regex", text)) for text in ("a", "b", "c")
    )
    assert compiler.compile(GrammarSpec("regex", "b")) is second
    assert compiler.compile(GrammarSpec("regex", "c")) is third
    assert compiler.compile(GrammarSpec("regex", "a")) is not first


@pytest.mark.parametrize(
    ("schema", "pointer", "words"),
    [
        ({"type": "strin"}, "/type", "strin"),
        ({"properties": {"a/b": {"not": {}}}}, "/properties/a~1b/not", "not supported"),
        ({"items": {"anyOf": [{}, {"contains": True}]}}, "/items/anyOf/1/contains", "contains"),
        ({"properties": {"not": {"not": {}}}}, "/properties/not/not", '"not"'),
        ({"if": {"type": "object"}}, "/if", '"if"'),
        ({"$defs": {"x": {"pattern": "("}}, "$ref": "#/$defs/x"}, "/$defs/x/pattern", "unclosed"),
        ({"$defs": {"x": {"not": {}}}, "items": {"$ref": "#/$defs/x"}}, "/$defs/x/not", '"not"'),
        (
            {"properties": {"properties": {"properties": 3}}},
            "/properties/properties/properties",
            "",
        ),
        ({"$ref": "#/nope"}, "/$ref", "does not exist"),
        ({"$ref": "#"}, "/$ref", "no text can fit"),
        ({"minimum": "1"}, "/minimum", "minimum"),
        ({"items": {"pattern": "a\\"}}, "/items/pattern", "single backslash"),
        ({"patternProperties": {"\\\\\\": {}}}, "/patternProperties", "single backslash"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "/minimum", "greater"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf", "anyOf"),
        ({"properties": {"a": {}}, "maxProperties": 3}, "/maxProperties", "properties"),
        ({"minProperties": 2}, "/minProperties", "different names"),
        ({"items": {"multipleOf": 100_003}}, "/items/multipleOf", "50000"),
        ({"allOf": [{"multipleOf": 509}, {"multipleOf": 521}]}, "/allOf/1/multipleOf", "265189"),
        ({"pattern": "a" * (MAX_PATTERN_BYTES + 1)}, "/pattern", "Shorten"),
        ({"const": "\x01"}, "/const", "no text can fit"),
    ],
)
def test_the_keyword_that_stands_in_the_way_is_named(
    schema: Any, pointer: str, words: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(schema_spec(schema))
    assert words in str(caught.value)
    assert caught.value.pointer == pointer
    assert str(caught.value).startswith(f"{pointer} of the JSON schema ")
    assert caught.value.http_status == 422


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "false", '{"x": NaN}', '{"minimum": 1e999}'])
def test_what_is_no_schema_is_refused(text: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="JSON schema"):
        compiler.compile(GrammarSpec("json_schema", text))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("regex", "(?=a)a"), "look-around"),
        (GrammarSpec("regex", "a\\"), "single backslash"),
        (GrammarSpec("regex", r"[^\s\S]"), "no text can fit"),
        (GrammarSpec("regex", "\ud800"), "surrogate"),
        (GrammarSpec("regex", "a" * (MAX_PATTERN_BYTES + 1)), "4,097 bytes"),
        (GrammarSpec("lark", 'start: "a" b'), "unknown name"),
        (GrammarSpec("lark", 'start: %json {"multipleOf": 3000017}'), "%json"),
        (GrammarSpec("json_schema", " " * (MAX_BYTES + 1)), "131,073 bytes"),
        (GrammarSpec("json_schema", '{"items":' * 70 + "{}" + "}" * 70), "deeper than 64"),
        (GrammarSpec("json_schema", "[" * 60_000), "not valid JSON"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    spec: GrammarSpec, words: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(spec)
    assert len(str(caught.value)) < 1000


def chain(link: Callable[[str], Any]) -> Any:
    """As many definitions, each of which refers to the next, as fit."""
    definitions = {f"{i}": link(f"#/$defs/{i + 1}") for i in range(2500)}
    return {"$defs": {**definitions, "2500": {"type": "null"}}, "$ref": "#/$defs/0"}


EXPLODING = {
    "choices of choices": {
        "allOf": [
            {"anyOf": [{"properties": {f"{i} {j}": {"type": "string"}}} for j in range(4)]}
            for i in range(20)
        ]
    },
    "references": chain(lambda target: {"items": {"$ref": target}}),
    "intersections": chain(lambda target: {"minLength": 1, "$ref": target}),
    "repeated": {
        "type": "array",
        "minItems": 10**6,
        "items": {
            "type": "array",
            "minItems": 10**6,
            "items": {"type": "string", "minLength": 10**6},
        },
    },
    "pattern": {"type": "string", "pattern": r"^(\w?){300}(\w{1,300}){1,300}$"},
    "optional": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}},
}


@pytest.mark.parametrize("name", EXPLODING)
def test_an_exploding_schema_ends_in_an_error_or_is_followed(
    name: str, compiler: GrammarCompiler
) -> None:
    """None ends the process: chains of references overflow the stack that a thread usually has."""
    try:
        matcher = compiler.compile(schema_spec(EXPLODING[name])).matcher()
        for _ in range(50):
            matcher.accept(max(allowed(matcher)))
    except GrammarError as error:
        assert error.http_status == 422  # noqa: PT017


def test_alternatives_that_multiply_are_an_error(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="too large") as caught:
        compiler.compile(schema_spec(EXPLODING["choices of choices"]))
    assert caught.value.pointer is None


def test_waiting_for_a_grammar_ends(
    tokenizer: Tokenizer, end_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow one is given up; while as many as may are still at it, the next one is refused too."""
    go_on = threading.Event()
    begun: list[GrammarSpec] = []
    compile_now = grammar_module._compile

    def slow(spec: GrammarSpec, tokenizer: Any) -> Grammar:
        begun.append(spec)
        assert go_on.wait(60)
        return compile_now(spec, tokenizer)

    monkeypatch.setattr(grammar_module, "COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(grammar_module, "_compile", slow)
    compiler = GrammarCompiler(tokenizer, ROWS, [end_id])
    specs = [GrammarSpec("regex", text) for text in "abc"]
    for spec in specs:
        with pytest.raises(GrammarError, match=r"not compiled within 0\.05 s"):
            compiler.compile(spec)
    assert begun == specs[: grammar_module.COMPILING_AT_ONCE]
    monkeypatch.setattr(grammar_module, "COMPILE_SECONDS", 60.0)
    go_on.set()
    assert compiler.compile(specs[2]) is compiler.compile(specs[2])


def test_a_failure_that_is_no_exception_fails_the_request_alone(
    tokenizer: Tokenizer, end_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicError(BaseException):
        pass

    def panic(spec: GrammarSpec, tokenizer: Any) -> Grammar:
        raise PanicError("index out of bounds")

    compiler = GrammarCompiler(tokenizer, ROWS, [end_id])
    with monkeypatch.context() as patch:
        patch.setattr(grammar_module, "_compile", panic)
        for _ in range(grammar_module.COMPILING_AT_ONCE + 1):
            with pytest.raises(GrammarError, match="index out of bounds"):
                compiler.compile(GrammarSpec("regex", "a"))
    assert compiler.compile(GrammarSpec("regex", "a"))


def test_the_stack_of_other_threads_stays_as_it_was(compiler: GrammarCompiler) -> None:
    before = threading.stack_size()
    compiler.compile(GrammarSpec("regex", "stack"))
    assert threading.stack_size() == before


def test_a_schema_does_not_set_how_it_is_compiled(compiler: GrammarCompiler) -> None:
    schema = {"contains": {}, "x-guidance": {"lenient": True, "nothing": 1}}
    with pytest.raises(GrammarError, match="contains"):
        compiler.compile(schema_spec(schema))


def test_a_name_cannot_be_spelled_past_its_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    matcher = compiler.compile(schema_spec(schema)).matcher()
    for text in ['{"', "\\"]:
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            matcher.accept(token_id)
    texts = {tokenizer.token_text(token_id)[:1] for token_id in allowed(matcher)}
    assert texts == set('nrbtf\\"')


def test_properties_called_like_keywords_are_no_keywords() -> None:
    schema = {"properties": {"not": {"type": "null"}}, "enum": [{"not": 1}]}
    found = [pointer for pointer, _, _ in keywords(schema)]
    assert found == ["/properties/not/type", "/properties", "/enum"]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats_of_texts_are_followed(
    name: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(schema_spec({"type": "string", "format": name})).matcher()
    ids = tokenizer.encode('"?"', add_special_tokens=False)
    assert matcher.allowed_prefix(ids) < len(ids)


def test_an_array_of_many_values_is_no_longer_than_they_are_many(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """That none comes twice cannot be promised then; docs/serve.md says so."""
    schema = {"type": "array", "items": {"enum": [*range(1, 8)]}, "uniqueItems": True}
    matcher = compiler.compile(schema_spec(schema)).matcher()
    for text, is_taken in (
        ("[1,2,3,4,5,6,7]", True),
        ("[1,1]", True),
        ("[1,2,3,4,5,6,7,1]", False),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (matcher.allowed_prefix(ids) == len(ids)) == is_taken


def test_true_is_any_value() -> None:
    assert read_schema("true") == {}


def test_what_is_forced_is_the_text_without_a_choice(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "The dog saw (a|the) cat")).matcher()
    forced = matcher.forced()
    assert b"".join(map(tokenizer.token_bytes, forced)) == b"The dog saw"
    before = allowed(matcher)
    assert forced[0] in before
    for token_id in forced:
        matcher.accept(token_id)
    assert matcher.forced() == []
    matcher.rollback(len(forced))
    assert allowed(matcher) == before
