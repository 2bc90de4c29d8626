"""What a request asks its text to fit: JSON schema, regex or grammar, and what is wrong with one.

Reads and bounds a JSON schema before anything compiles it, and finds the JSON pointer (RFC 6901) of
the keyword that is not supported. Imports neither torch nor llguidance.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import permutations
from typing import Literal
from urllib.parse import unquote

from hanok.engine.json_schema import Document, Schema, escape, keywords, reference_to
from hanok.errors import RequestError

MAX_BYTES = 128 * 1024
"""Largest schema."""

MAX_GRAMMAR_BYTES = 16 * 1024
"""Largest Lark grammar, and most that all the patterns of a schema may have."""

MAX_PATTERN_BYTES = 4 * 1024
"""Largest regex or pattern. llguidance's time and memory grow with the square of one's length."""

MAX_DEPTH = 64
"""Deepest nesting of a schema's objects and arrays."""

MAX_DISTINCT = 5
"""Most values of which arrays that repeat none are listed; five give 326 arrays."""

FORMATS = frozenset("date-time date time duration email hostname ipv4 ipv6 uuid uri".split())
"""Formats of texts that are followed. Others say what a text is for, as JSON Schema has it."""

MAX_MULTIPLE = 50_000
"""Largest common multiple of a schema's `multipleOf`. Time to compile grows with its square."""


class GrammarError(RequestError):
    """A schema, regex or grammar cannot be followed. `pointer` is where in the schema, if known."""

    def __init__(self, message: str, pointer: str | None = None) -> None:
        super().__init__(message)
        self.pointer = pointer


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What a text has to fit. `value` is JSON text of a schema, a regex or a Lark grammar.

    "json_object" is any JSON object; its value is not read. A regex has to fit the whole text.
    """

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    value: str = ""


def check_size(spec: GrammarSpec) -> None:
    """GrammarError for a spec that is too large to be looked at, or no text."""
    largest = {"regex": MAX_PATTERN_BYTES, "lark": MAX_GRAMMAR_BYTES}.get(spec.kind, MAX_BYTES)
    try:
        size = len(spec.value.encode())
    except UnicodeEncodeError as error:
        raise GrammarError(
            f"character {error.start} of the {spec.kind} is half of a surrogate pair, which no text "
            "has: repair it before it is sent"
        ) from error
    if size > largest:
        raise GrammarError(
            f"the {spec.kind} has {size:,} bytes and may have {largest:,}: ask for less at once"
        )
    if spec.kind == "regex" and _is_cut(spec.value):
        raise GrammarError(
            f"the regex ends in a single backslash, {spec.value[-20:]!r}: write two for a backslash, or "
            "what it was to escape"
        )


def read_schema(text: str) -> Schema:
    """The schema in a JSON text, in bounds and without what no grammar can promise. GrammarError."""
    try:
        schema = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is not valid JSON: {error}", "") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GrammarError(
            f"the JSON schema is {text[:40]!r}; it has to be an object that describes what to write, "
            'such as {"type": "object", "properties": {…}}',
            "",
        )
    schema.pop("x-guidance", None)  # llguidance's own options, which are not the request's to set
    _check_depth(schema, "", MAX_DEPTH)
    _check_promises(schema)
    document = Document(schema)
    for pointer, holder in list(document.schemas.items()):
        _simplify(holder, pointer, document)
    return schema


def find_culprit(
    schema: Schema, reason: str, compile_error: Callable[[Schema], str | None]
) -> str | None:
    """The pointer of a keyword without which `reason` is no longer why the schema fails.

    Keywords that the reason names are tried first, the innermost before those around it. None where
    no single keyword is to blame. `compile_error` says why a schema fails; it may raise
    TimeoutError to end the search.
    """
    # Behind it llguidance names the definition, which no change inside of it removes.
    message, _, _ = reason.partition(" while processing ")
    words = re.findall(r"\$?[A-Za-z]+", message)
    present = {keyword for _, keyword, _ in keywords(schema)}
    groups = [{word} for word in dict.fromkeys(words) if word in present]
    if "min/maxProperties" in message:
        groups.insert(0, {"minProperties", "maxProperties"})
    for group in [*groups, present]:
        rest = copy.deepcopy(schema)
        for pointer, keyword, holder in list(keywords(rest)):
            if keyword in group:
                del holder[keyword]
                try:
                    if compile_error(rest) != reason:
                        return pointer
                except TimeoutError:
                    return None
    return None


def embedded(schema: Schema, name: str) -> tuple[Schema, dict[str, Schema]]:
    """A schema as it may stand anywhere in another one, and what that one's `$defs` need for it.

    References are to places of the document they stand in. A schema that has any is moved whole to
    `#/$defs/{name}` and its references with it, so that it means the same there; `name` is its own.
    GrammarError for a reference to what is not there, or that may mean several places.
    """
    moved = copy.deepcopy(schema)
    document = Document(moved)
    root = f"/$defs/{escape(name)}"
    found: list[tuple[Schema, str, str]] = []
    pending = list(document.schemas)
    for pointer in pending:
        for keyword in ("$ref", "$dynamicRef"):
            target = _target(document, pointer, keyword)
            if target is not None:
                found.append((document.schemas[pointer], keyword, reference_to(root + target)))
        if len(document.schemas) > len(pending):  # what is only referred to
            pending += list(document.schemas)[len(pending) :]
    for holder, keyword, reference in found:
        holder.pop(keyword, None)
        holder["$ref"] = reference
    for holder in document.schemas.values():
        for keyword in ("$schema", "$id", "$anchor", "$dynamicAnchor", "$vocabulary"):
            holder.pop(keyword, None)
    return ({"$ref": reference_to(root)}, {name: moved}) if found else (moved, {})


def _target(document: Document, pointer: str, keyword: str) -> str | None:
    """The pointer that a referring keyword of the schema at `pointer` means, if any in its document."""
    schema = document.schemas[pointer]
    reference = schema.get(keyword)
    if not isinstance(reference, str):
        return None
    place = f"{pointer}/{keyword}"
    if keyword == "$dynamicRef" and ("$ref" in schema or document.has_several(reference)):
        raise GrammarError(
            f"{place} of the JSON schema is {reference!r}, and what it means depends on how it is "
            "reached: refer to one place with $ref",
            place,
        )
    try:
        return document.target(pointer, reference)
    except LookupError as error:
        raise GrammarError(
            f"{place} of the JSON schema is {reference!r}, and there is no such place in it", place
        ) from error


def _check_depth(value: object, pointer: str, depth: int) -> None:
    if depth < 0:
        raise GrammarError(
            f"the JSON schema is nested deeper than {MAX_DEPTH} levels, at {pointer!r}; move parts "
            "into $defs and refer to them",
            pointer,
        )
    items: Iterator[tuple[object, object]] = iter(())
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, list):
        items = iter(enumerate(value))
    for key, item in items:
        if isinstance(item, dict | list):
            _check_depth(item, f"{pointer}/{escape(str(key))}", depth - 1)


def _simplify(schema: Schema, pointer: str, document: Document) -> None:
    """Write what keywords ask for so that it can be followed; take out those that ask for nothing.

    References become URIs: many hold names of types as they are, `#/$defs/List<Item>`.
    """
    reference, kind = schema.get("$ref"), schema.get("format")
    if isinstance(reference, str) and reference.startswith("#/"):
        schema["$ref"] = reference_to(unquote(reference[1:]))
    if isinstance(kind, str) and kind not in FORMATS:
        del schema["format"]
    if schema.pop("uniqueItems", False) is True and schema.get("type") == "array":
        values = _values_of(schema.get("items"), f"{pointer}/items", document)
        if values is not None:
            _repeat_none(schema, values)


def _values_of(items: object, pointer: str, document: Document) -> list[str] | None:
    """The JSON texts of all the values that an array's items may have, where they are listed."""
    if not isinstance(items, dict):
        return None
    target = None
    if "$ref" in items:
        try:
            target = _target(document, pointer, "$ref")
        except GrammarError:
            return None  # the compiler says so
    if target is not None:
        items = document.schemas.get(target, {})
    values = items.get("enum")
    if "const" in items:
        values = [items["const"]]
    elif items.get("type") == "boolean" and values is None:
        values = [False, True]
    if not isinstance(values, list):
        return None
    return list(dict.fromkeys(json.dumps(value) for value in values))


def _repeat_none(schema: Schema, values: list[str]) -> None:
    """Let an array have each of some values once: as a list of all such arrays, or by its length."""
    least, most = schema.get("minItems", 0), schema.get("maxItems", len(values))
    if "prefixItems" in schema or not isinstance(least, int) or not isinstance(most, int):
        return
    most = min(most, len(values))
    schema["maxItems"] = most
    if len(values) <= MAX_DISTINCT and "enum" not in schema and "const" not in schema:
        lengths = range(max(least, 0), most + 1)
        found = [row for length in lengths for row in permutations(values, length)]
        schema["enum"] = [[json.loads(value) for value in row] for row in found]


def _check_promises(schema: Schema) -> None:
    """Refuse what llguidance accepts and would not keep, or would compile for minutes."""
    multiple = Fraction(1)
    pattern_bytes = 0
    for pointer, keyword, holder in keywords(schema):
        value = holder[keyword]
        if keyword == "minProperties":
            _check_names(pointer, value, holder.get("required"))
        elif keyword == "multipleOf" and type(value) in (int, float) and value > 0:
            multiple = _common_multiple(multiple, Fraction(Decimal(str(value))))
            if multiple.numerator > MAX_MULTIPLE:
                raise GrammarError(
                    f"{pointer} of the JSON schema is {value}: the least common multiple of all its "
                    f"multipleOf is {multiple}, and at most {MAX_MULTIPLE} can be followed. Leave it "
                    "out and check the answer",
                    pointer,
                )
        elif keyword in ("pattern", "patternProperties"):
            patterns = list(value) if isinstance(value, dict) else [str(value)]
            if any(map(_is_cut, patterns)):
                raise GrammarError(
                    f"{pointer} of the JSON schema ends in a single backslash: write two for a "
                    "backslash, or what it was to escape",
                    pointer,
                )
            pattern_bytes += sum(map(_size, patterns))
            longest = max(map(_size, patterns), default=0)
            if longest > MAX_PATTERN_BYTES or pattern_bytes > MAX_GRAMMAR_BYTES:
                raise GrammarError(
                    f"{pointer} of the JSON schema has a pattern of {longest:,} bytes: one may have "
                    f"{MAX_PATTERN_BYTES:,} and all together {MAX_GRAMMAR_BYTES:,}. Shorten it",
                    pointer,
                )


def _check_names(pointer: str, least: object, required: object) -> None:
    """`minProperties` counts pairs and does not see that two of them have one name."""
    names = {str(name) for name in required} if isinstance(required, list) else set()
    if isinstance(least, int) and least > max(1, len(names)):
        raise GrammarError(
            f"{pointer} of the JSON schema asks for {least} properties and 'required' names "
            f"{len(names)}: that the others have different names cannot be promised. Name them in "
            "'required', or leave minProperties out and check the answer",
            pointer,
        )


def _is_cut(pattern: str) -> bool:
    """Whether a regex ends where an escaped character should follow; llguidance drops the backslash."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


def _size(text: str) -> int:
    # Escaped in JSON there may be half a surrogate pair, which has no encoding.
    return len(text.encode(errors="surrogatepass"))


def _common_multiple(a: Fraction, b: Fraction) -> Fraction:
    return Fraction(math.lcm(a.numerator, b.numerator), math.gcd(a.denominator, b.denominator))


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number that a schema may have")
    return number
