"""Text that arrives in pieces, for parsers written as if it were complete.

A parser is a generator: it yields whenever it needs more text, and is resumed when there is some, or
when the text has ended. JSON is checked character by character, so that only valid JSON is passed on.
"""

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A parser: it yields where more text is needed, and returns what it read."""
Write = Callable[[str], object]

MAX_DEPTH = 64
"""Levels of nesting; deeper JSON counts as a fault of the model."""

MOST_DIGITS = 4300
"""Most digits of a number; Python, and clients written in it, parse no longer ones."""

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_WORD = re.compile(r"[A-Za-z0-9+\-.]+")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_LITERALS = {
    "true": "true",
    "false": "false",
    "null": "null",
    # Spellings of Python and JavaScript that models write; JSON has no NaN and no infinity.
    "True": "true",
    "False": "false",
    "None": "null",
    "NaN": "null",
    "Infinity": "null",
    "-Infinity": "null",
}


class NotJsonError(Exception):
    """The text is not JSON."""


class Incoming:
    """Text whose beginning has arrived."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        """Where the next character is read."""
        self.is_ended = False

    @property
    def rest(self) -> str:
        """The text that has arrived and was not read."""
        return self.text[self.at :]

    def push(self, text: str) -> None:
        """Append text, keeping all of it: parsers go back to where a call might have begun."""
        self.text += text

    def forget(self) -> None:
        """Drop the text that was read."""
        self.text, self.at = self.text[self.at :], 0

    def peek(self) -> Reading[str]:
        """Return the next character, "" if the text has ended."""
        while self.at >= len(self.text):
            if self.is_ended:
                return ""
            yield
        return self.text[self.at]

    def starts_with(self, word: str) -> Reading[bool]:
        """Return whether the text continues with a word."""
        while True:
            found = self.text[self.at : self.at + len(word)]
            if found == word:
                return True
            if self.is_ended or not word.startswith(found):
                return False
            yield

    def takes(self, word: str) -> Reading[bool]:
        """Read a word if the text continues with it."""
        found = yield from self.starts_with(word)
        if found:
            self.at += len(word)
        return found

    def until(self, *words: str) -> Reading[tuple[str, str]]:
        """Read up to and including the first of some words; return the text before it, and the word.

        The word is "" if the text ended without any of them.
        """
        start = self.at
        while True:
            found = [(at, word) for word in words if (at := self.text.find(word, start)) >= 0]
            if found:
                at, word = min(found)
                self.at = at + len(word)
                return self.text[start:at], word
            if self.is_ended:
                self.at = len(self.text)
                return self.text[start:], ""
            yield

    def skip_space(self) -> Reading[str]:
        """Read whitespace and return it."""
        start = self.at
        while (yield from self.peek()).isspace():
            self.at += 1
        return self.text[start : self.at]


def read_value(source: Incoming, write: Write, depth: int = 0) -> Reading[None]:
    """Read a JSON value and write it unchanged, except that foreign spellings become JSON.

    Raises NotJsonError, with everything before the fault written; `source` is then at the fault.
    """
    write((yield from source.skip_space()))
    char = yield from source.peek()
    if depth >= MAX_DEPTH:
        raise NotJsonError
    if char == '"':
        yield from read_string(source, write)
    elif char == "{":
        yield from _read_items(source, write, depth, is_object=True)
    elif char == "[":
        yield from _read_items(source, write, depth, is_object=False)
    else:
        yield from _read_word(source, write)


def _read_items(source: Incoming, write: Write, depth: int, *, is_object: bool) -> Reading[None]:
    closing = "}" if is_object else "]"
    write(source.text[source.at])
    source.at += 1
    write((yield from source.skip_space()))
    if (yield from source.takes(closing)):
        write(closing)
        return
    while True:
        if is_object:
            write((yield from source.skip_space()))
            yield from read_string(source, write)
            write((yield from source.skip_space()))
            yield from expect(source, ":")
            write(":")
        yield from read_value(source, write, depth + 1)
        write((yield from source.skip_space()))
        if (yield from source.takes(closing)):
            write(closing)
            return
        yield from expect(source, ",")
        write(",")


def expect(source: Incoming, char: str) -> Reading[None]:
    """Read a required character."""
    if not (yield from source.takes(char)):
        raise NotJsonError


def read_string(source: Incoming, write: Write) -> Reading[None]:
    """Read a JSON string; control characters, which JSON forbids in it, are written escaped."""
    yield from expect(source, '"')
    write('"')
    while True:
        char = yield from source.peek()
        if not char:
            raise NotJsonError
        if plain := _PLAIN.match(source.text, source.at):
            write(plain[0])
            source.at = plain.end()
            continue
        source.at += 1
        if char == '"':
            write(char)
            return
        if char == "\\":
            write((yield from _escape(source)))
        else:
            write(json.dumps(char)[1:-1])


def _escape(source: Incoming) -> Reading[str]:
    char = yield from source.peek()
    if not char or char not in "\"\\/bfnrtu'":
        raise NotJsonError
    source.at += 1
    if char == "'":
        return char
    if char != "u":
        return "\\" + char
    digits = yield from _four_digits(source)
    if not _is_half(digits):
        return "\\u" + digits
    start = source.at
    if digits[:2].upper() < "DC" and (yield from source.takes("\\u")):
        second = yield from _four_digits(source)
        if _is_half(second) and second[:2].upper() >= "DC":
            return f"\\u{digits}\\u{second}"
    source.at = start
    return "\\ufffd"  # half a surrogate pair: clients could neither decode it nor send it back


def _four_digits(source: Incoming) -> Reading[str]:
    digits = ""
    while len(digits) < 4:
        digit = yield from source.peek()
        if not digit or digit not in "0123456789abcdefABCDEF":
            raise NotJsonError
        digits += digit
        source.at += 1
    return digits


def _is_half(digits: str) -> bool:
    """Whether four hexadecimal digits are half of a surrogate pair."""
    return 0xD800 <= int(digits, 16) <= 0xDFFF


def of_whole_characters(text: str) -> str:
    """Return a text with surrogate pairs joined and lone surrogates replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_word(source: Incoming, write: Write) -> Reading[None]:
    """Read a number, or true, false or null in any spelling."""
    start = end = source.at
    while True:
        found = _WORD.match(source.text, start)
        end = found.end() if found else start
        if end < len(source.text) or source.is_ended:
            break
        yield
    word = source.text[start:end]
    is_number = len(word) <= MOST_DIGITS and _NUMBER.fullmatch(word)
    if word not in _LITERALS and not is_number:
        raise NotJsonError
    source.at = end
    write(_LITERALS.get(word, word))
