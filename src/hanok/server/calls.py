"""Parses tool calls in a model's text, in the formats that models were trained on, as they arrive.

Only calls of declared functions count; a call of any other name is content. A call is recognized by a
family's marker before it, or by its position: at the beginning of an answer or after another call.
"""

import ast
import itertools
import json
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hanok.server.incoming import (
    Incoming,
    NotJsonError,
    Reading,
    expect,
    of_whole_characters,
    read_string,
    read_value,
)

ID_LENGTH = 9  # Mistral's templates refuse conversations with any other

OPENINGS = (
    "<tool_call>",  # Hermes, Qwen, SmolLM3, EXAONE 4, Granite 4, GLM-4.5, Qwen3-Coder
    "[TOOL_CALLS]",  # Mistral
    "<|tool_call|>",  # Granite 3, Phi-4-mini
    "<function_call>",  # Granite 3.0
    "<|python_tag|>",  # Llama 3
    "<function=",  # Llama 3.1's own functions, Functionary; Qwen3-Coder and Seed-OSS within theirs
    "<|START_ACTION|>",  # Command-R7B and later
    "Action: ```json",  # Command-R
    "<seed:tool_call>",  # Seed-OSS
    "<function_calls>",  # OLMo 3
    "<|tool_call_start|>",  # LFM2
    "<｜tool▁calls▁begin｜>",  # DeepSeek
    "<｜tool▁call▁begin｜>",
    "functools[",  # Phi-4-mini, Firefunction
    "```tool_code",  # Gemma 3
)
"""Markers that open a call."""
FIRST_OF_CALL: Mapping[str, str] = {"<function=": "<function=", "functools[": "["}
"""For markers that end with the beginning of the call itself: that beginning."""
CLOSINGS = (
    "</tool_call>",
    "<|/tool_call|>",
    "</function_call>",
    "</function>",
    "<|END_ACTION|>",
    "</seed:tool_call>",
    "</function_calls>",
    "<|tool_call_end|>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "```",
)
INNER = (
    "[ARGS]",
    "[CALL_ID]",
    "<｜tool▁sep｜>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
"""Markers within calls."""

PREFIXES = ("", "functions.", "function<｜tool▁sep｜>")
"""Prefixes that may come between a marker and the function's name."""
NAME_MARKS = ("_", "-", ".")
"""Characters of a name besides letters and digits."""
NAME_KEYS = ("name", "tool_name")
ARGUMENT_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("type", "id", "tool_call_id", "index")


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call whose function is known; its arguments follow."""

    index: int
    id: str
    """Unique in a conversation: the call's result refers to it."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The end of a call; an incomplete one ended or broke off within its text."""

    index: int
    is_whole: bool


CallEvent = CallBegun | CallArguments | CallEnded


class NotACallError(Exception):
    """The text is not a call of a declared function."""


class CallReader:
    """Reads calls at a source's current position, and emits them as they arrive.

    `functions` are the declared ones by name, as requests give them.
    """

    def __init__(
        self,
        source: Incoming,
        functions: Mapping[str, Mapping[str, Any]],
        emit: Callable[[CallEvent], object],
    ) -> None:
        self._source = source
        self._functions = functions
        self._emit = emit
        self._names = sorted(functions, key=len, reverse=True)
        self.num_begun = 0
        self.is_open = False
        """Whether a call has begun and not ended."""
        self.restart = 0
        """Where content continues, should the text that follows not be a call."""

    def read(self, *, is_marked: bool) -> Reading[None]:
        """Read one call or a list of calls, after a marker or where a call may be.

        Raises NotACallError if it is neither; calls before the fault were emitted.
        """
        source = self._source
        self.restart = source.at
        try:
            yield from source.skip_space()
            if (yield from source.starts_with("[CALL_ID]")):
                raise NotACallError
            if (yield from source.starts_with("[")):
                yield from self._list(is_marked=is_marked)
            else:
                yield from self._call(is_marked=is_marked)
        except NotJsonError as error:
            raise NotACallError from error

    def end(self, *, is_whole: bool) -> None:
        """End the open call."""
        self.is_open = False
        self._emit(CallEnded(self.num_begun - 1, is_whole))
        self.restart = self._source.at

    def take_back(self) -> None:
        """Discard the open call."""
        self.is_open = False
        self.num_begun -= 1

    def _list(self, *, is_marked: bool) -> Reading[None]:
        source = self._source
        source.at += 1
        while True:
            yield from source.skip_space()
            yield from self._call(is_marked=is_marked, is_listed=True)
            yield from source.skip_space()
            if (yield from source.takes("]")):
                self.restart = source.at
                return
            yield from expect(source, ",")

    def _call(self, *, is_marked: bool, is_listed: bool = False) -> Reading[None]:
        source = self._source
        fence = "```json"
        if not is_listed and (yield from source.takes(fence)):
            yield from source.skip_space()
        if (yield from source.starts_with("{")):
            yield from self._object(is_marked=is_marked, is_listed=is_listed)
        elif (yield from source.takes("<function=")):
            yield from self._tagged()
        else:
            yield from self._named(is_marked=is_marked, is_listed=is_listed)
        if self.is_open:
            self.end(is_whole=True)

    def _begin(self, name: str) -> None:
        if name not in self._functions:
            raise NotACallError
        self._emit(CallBegun(self.num_begun, uuid.uuid4().hex[:ID_LENGTH], name))
        self.num_begun += 1
        self.is_open = True

    def _write(self, text: str) -> None:
        if text:
            self._emit(CallArguments(self.num_begun - 1, text))

    def _begin_with(self, name: str, arguments: Mapping[str, Any]) -> None:
        self._begin(name)
        self._write(_as_json(arguments))

    # {"name": …, "arguments": {…}}

    def _object(self, *, is_marked: bool, is_listed: bool, is_inner: bool = False) -> Reading[None]:
        """Read a call as a JSON object with keys in any order; OpenAI's form nests one in another."""
        source, name, held, is_bare = self._source, "", "", True
        source.at += 1
        while True:
            yield from source.skip_space()
            key = yield from self._string()
            yield from source.skip_space()
            yield from expect(source, ":")
            yield from source.skip_space()
            if key == "function" and not is_inner and (yield from source.starts_with("{")):
                yield from self._object(is_marked=is_marked, is_listed=is_listed, is_inner=True)
                name = "" if self.is_open else name
            elif key in NAME_KEYS or key == "function":
                name = yield from self._string()
                if name not in self._functions:
                    raise NotACallError
            elif key in ARGUMENT_KEYS and not self.is_open:
                held = yield from self._arguments(name)
            elif is_marked or self.is_open or key in OTHER_KEYS:
                is_bare = is_bare and key == "type"
                yield from read_value(source, lambda _: None)
            else:
                raise NotACallError
            yield from source.skip_space()
            if (yield from source.takes("}")):
                break
            yield from expect(source, ",")
        if not self.is_open:
            if not held and not is_marked:
                self._check_needs_nothing(name, is_bare=is_bare and not is_listed)
            self._begin(name)
            self._write(held or "{}")

    def _check_needs_nothing(self, name: str, *, is_bare: bool) -> None:
        """Raise NotACallError for a bare name without a marker, if the function needs arguments.

        Names in a list, and names with an id, are often plain data.
        """
        if not is_bare or _parameters_of(self._functions.get(name, {})).get("required"):
            raise NotACallError

    def _string(self) -> Reading[str]:
        pieces: list[str] = []
        yield from read_string(self._source, pieces.append)
        return str(json.loads("".join(pieces)))

    def _arguments(self, name: str) -> Reading[str]:
        """Read an object, or one within a JSON string; null means an empty one.

        The call begins once its name is known; until then, return the text.
        """
        source = self._source
        held: list[str] = []
        if (yield from source.starts_with("{")):
            if name:
                self._begin(name)
            yield from read_value(source, self._write if name else held.append)
            return "".join(held)
        is_null = yield from source.takes("null")
        text = "{}" if is_null else _object_text((yield from self._string()))
        if not name:
            return text
        self._begin(name)
        self._write(text)
        return ""

    # <function=name>{…}</function> and <function=name><parameter=key>value</parameter></function>

    def _tagged(self) -> Reading[None]:
        source = self._source
        name, closing = yield from source.until(">")
        if not closing:
            raise NotACallError
        yield from source.skip_space()
        self._begin(name.strip())
        if (yield from source.starts_with("{")):
            yield from read_value(source, self._write)
            yield from source.skip_space()
            yield from source.takes("</function>")
            return
        self._write("{")
        count = 0
        while (yield from source.takes("<parameter=")):
            key, _ = yield from source.until(">")
            value, closing = yield from source.until("</parameter>", "<parameter=", "</function>")
            if not closing:
                raise NotACallError
            if closing != "</parameter>":  # it was discarded
                source.at -= len(closing)
            self._member(count, name.strip(), key.strip(), value)
            count += 1
            yield from source.skip_space()
        yield from expect(source, "</function>")
        self._write("}")

    def _member(self, count: int, function: str, key: str, value: str) -> None:
        schema = _parameters_of(self._functions[function])
        comma = ", " if count else ""
        text = _as_json(_typed(value, key, schema))
        self._write(f"{comma}{json.dumps(key, ensure_ascii=False)}: {text}")

    # name{…}, name[ARGS]{…}, name\n{…}, name(key=value), name<arg_key>…

    def _named(self, *, is_marked: bool, is_listed: bool) -> Reading[None]:
        source = self._source
        is_printed = is_marked and (yield from self._is_printed())
        name = yield from self._name(PREFIXES if is_marked else ("",))
        if (is_marked or is_listed) and (yield from source.starts_with("(")):
            yield from self._python(name)
            if is_printed:
                yield from expect(source, ")")
            return
        if is_listed:
            raise NotACallError
        if is_marked:
            yield from self._skip_separators()
        space = yield from source.skip_space()
        if is_marked and (yield from source.takes("```json")):
            yield from source.skip_space()
        if (yield from source.starts_with("{")) and (is_marked or "\n" in space):
            self._begin(name)
            yield from read_value(source, self._write)
        elif is_marked and (yield from source.starts_with("<arg_key>")):
            yield from self._pairs(name)
        elif is_marked and (yield from self._is_closed()):
            self._begin_with(name, {})
        else:
            raise NotACallError

    def _is_printed(self) -> Reading[bool]:
        """Read the opening of a call wrapped in print(…), unless a function named print is declared."""
        source = self._source
        start = source.at
        if (yield from source.takes("print(")):
            inner = source.at
            try:
                yield from self._name(PREFIXES)
                is_printed = yield from source.starts_with("(")
            except NotACallError:
                is_printed = False
            source.at = inner if is_printed else start
            return is_printed
        return False

    def _name(self, prefixes: Sequence[str]) -> Reading[str]:
        """Read a function's whole name, which may itself begin like a prefix."""
        source = self._source
        start = source.at
        for prefix, name in itertools.product(prefixes, self._names):
            source.at = start
            if (yield from source.takes(prefix + name)):
                following = yield from source.peek()
                if not (following.isalnum() or following in NAME_MARKS):
                    return name
        raise NotACallError

    def _skip_separators(self) -> Reading[None]:
        source = self._source
        if (yield from source.takes("<｜tool▁sep｜>")):
            return
        if (yield from source.takes("[CALL_ID]")):
            yield from source.until("[ARGS]")
            return
        yield from source.takes("[ARGS]")

    def _is_closed(self) -> Reading[bool]:
        for closing in CLOSINGS:
            if (yield from self._source.starts_with(closing)):
                return True
        return False

    def _pairs(self, name: str) -> Reading[None]:
        source, count = self._source, 0
        self._begin(name)
        self._write("{")
        while (yield from source.takes("<arg_key>")):
            key, _ = yield from source.until("</arg_key>")
            yield from source.skip_space()
            yield from expect(source, "<arg_value>")
            value, closing = yield from source.until("</arg_value>")
            if not closing:
                raise NotACallError
            self._member(count, name, key.strip(), value)
            count += 1
            yield from source.skip_space()
        self._write("}")

    def _python(self, name: str) -> Reading[None]:
        """Read a call in Python's syntax, with literals as arguments."""
        text = yield from self._parenthesized()
        try:
            with warnings.catch_warnings():  # about escapes unknown to Python: not useful here
                warnings.simplefilter("ignore")
                call = ast.parse(f"f{text}", mode="eval").body
            if not isinstance(call, ast.Call):
                raise NotACallError
            keys = list(_parameters_of(self._functions[name]).get("properties", {}))
            given = dict(zip(keys, map(_literal, call.args), strict=False))
            if len(call.args) > len(keys) or any(word.arg is None for word in call.keywords):
                raise NotACallError
            given |= {str(word.arg): _literal(word.value) for word in call.keywords}
            arguments = json.loads(json.dumps(given, allow_nan=False))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise NotACallError from error
        self._begin_with(name, arguments)

    def _parenthesized(self) -> Reading[str]:
        source, depth, quote = self._source, 0, ""
        start = source.at
        while True:
            char = yield from source.peek()
            if not char:
                raise NotACallError
            source.at += 1
            if quote:
                if char == "\\":
                    yield from source.peek()
                    source.at += 1
                elif char == quote:
                    quote = ""
            elif char in "\"'":
                quote = char
            elif char in "([{":
                depth += 1
            elif char in ")]}":
                depth -= 1
                if depth == 0:
                    return source.text[start : source.at]


def _literal(node: ast.expr) -> Any:
    """Return a literal's value; true, false and null may be spelled as in JSON."""
    names = {"true": True, "false": False, "null": None}

    class Named(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.Constant(names[node.id]) if node.id in names else node

    return ast.literal_eval(Named().visit(node))


def _object_text(text: str) -> str:
    """Return an object as JSON text, unchanged."""
    source, pieces = Incoming(), list[str]()
    source.push(text.strip() or "{}")
    source.is_ended = True
    if not source.text.startswith("{"):
        raise NotACallError
    for _ in read_value(source, pieces.append):
        pass
    if source.rest.strip():
        raise NotACallError
    return "".join(pieces)


def _as_json(value: Any) -> str:
    return of_whole_characters(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _parameters_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    found = function.get("parameters", function.get("arguments"))
    return found if isinstance(found, Mapping) else {}


_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _typed(text: str, key: str, parameters: Mapping[str, Any]) -> Any:
    """Return the value that a tagged argument's text represents, by the function's schema.

    A string if the schema has a string, or if the text has none of the schema's types.
    """
    text = text.removeprefix("\n").removesuffix("\n")
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    types = _types_of(schema, parameters)
    if types == {"string"}:
        return text
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        value = {"True": True, "False": False, "None": None}.get(text, text)
    is_boolean = isinstance(value, bool)
    fits = any(
        isinstance(value, _TYPES[name]) and (not is_boolean or name == "boolean")
        for name in types or _TYPES
    )
    return value if fits else text


def _types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """Return the types that a schema names, if any."""
    if not isinstance(schema, Mapping) or depth > 8:
        return set()
    given = schema.get("type")
    if isinstance(given, str):
        return {given} & set(_TYPES)
    if isinstance(given, Sequence):
        return {name for name in given if name in _TYPES}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        return _types_of(target, root, depth + 1)
    if isinstance(values := schema.get("enum"), list):
        return {n for n, kinds in _TYPES.items() if any(isinstance(v, kinds) for v in values)}
    options = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    return set().union(*(_types_of(option, root, depth + 1) for option in options))
