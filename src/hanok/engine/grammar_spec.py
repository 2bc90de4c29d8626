"""What a request asks its text to fit: JSON schema, regex or grammar, and what is wrong with one.

Reads and bounds a JSON schema before anything compiles it, and finds the JSON pointer (RFC 6901) of
the keyword that stands in the way. Imports neither torch nor llguidance.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, NoReturn

from hanok.errors import RequestError

MAX_BYTES = 128 * 1024
"""Largest schema, regex or grammar."""

MAX_DEPTH = 64
"""Deepest nesting of a schema's objects and arrays."""

MAX_MULTIPLE = 50_000
"""Largest common multiple of a schema's `multipleOf`. Time to compile grows with its square."""

Schema = dict[str, Any]

_HOLDS_SCHEMA = frozenset(
    "items additionalItems additionalProperties unevaluatedItems unevaluatedProperties contains "
    "propertyNames not if then else contentSchema".split()
)
_HOLDS_LIST = frozenset("anyOf oneOf allOf prefixItems items".split())
_HOLDS_NAMED = frozenset(
    "properties patternProperties $defs definitions dependentSchemas dependencies".split()
)


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


def read_schema(text: str) -> Schema:
    """The schema in a JSON text, in bounds and without what no grammar can promise. GrammarError."""
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
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
    _check_depth(schema, "", MAX_DEPTH)
    _check_promises(schema)
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


def keywords(schema: Schema, pointer: str = "") -> Iterator[tuple[str, str, Schema]]:
    """Each keyword of a schema and of the schemas in it: pointer, name, and the schema it is in.

    What a keyword holds comes before the keyword. Names of properties are no keywords.
    """
    for keyword, value in schema.items():
        place = f"{pointer}/{_escape(keyword)}"
        inner: list[tuple[str, Any]] = []
        if keyword in _HOLDS_SCHEMA:
            inner.append((place, value))
        if keyword in _HOLDS_LIST and isinstance(value, list):
            inner += ((f"{place}/{index}", item) for index, item in enumerate(value))
        if keyword in _HOLDS_NAMED and isinstance(value, dict):
            inner += ((f"{place}/{_escape(name)}", item) for name, item in value.items())
        for where, item in inner:
            if isinstance(item, dict):
                yield from keywords(item, where)
        yield place, keyword, schema


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
            _check_depth(item, f"{pointer}/{_escape(str(key))}", depth - 1)


def _check_promises(schema: Schema) -> None:
    """Refuse what llguidance accepts and would not keep, or would compile for minutes."""
    multiple = Fraction(1)
    for pointer, keyword, holder in keywords(schema):
        value = holder[keyword]
        required = holder.get("required", [])
        if keyword == "minProperties" and isinstance(value, int) and isinstance(required, list):
            # It counts pairs and does not see that two of them have one name.
            if value > max(1, len({str(name) for name in required})):
                raise GrammarError(
                    f"{pointer} of the JSON schema asks for {value} properties and 'required' names "
                    f"{len(required)}: that the others have different names cannot be promised. Name "
                    f"them in 'required', or leave minProperties out and check the answer",
                    pointer,
                )
        elif keyword == "multipleOf" and isinstance(value, int | float) and value > 0:
            multiple = _common_multiple(multiple, Fraction(Decimal(str(value))))
            if multiple.numerator > MAX_MULTIPLE:
                raise GrammarError(
                    f"{pointer} of the JSON schema is {value}: the least common multiple of all its "
                    f"multipleOf is {multiple}, and at most {MAX_MULTIPLE} can be followed. Leave it "
                    "out and check the answer",
                    pointer,
                )


def _common_multiple(a: Fraction, b: Fraction) -> Fraction:
    return Fraction(math.lcm(a.numerator, b.numerator), math.gcd(a.denominator, b.denominator))


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
