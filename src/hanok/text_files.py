"""Text that users give as files or on standard input, read as UTF-8 or refused helpfully, and compared.

Every verb reads through here, so that a prompt, a text to score, a grid and a trace are the same text
whatever wrote the file: a byte order mark is dropped, and lines end with a line feed.
"""

import codecs
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hanok.errors import RequestError

STANDARD_INPUT = Path("-")
# The longer marks first: UTF-32's begins like UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# The two line numbers of the head of a hunk.
_HUNK_START = re.compile(r"([-+])(\d+)(?=[, ])")


def read_text(file: Path) -> str:
    """The text of a file, or of standard input for `-`; RequestError if it cannot be read."""
    if file == STANDARD_INPUT:
        return decode(sys.stdin.buffer.read(), "standard input")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}.") from None
    return decode(data, str(file))


def decode(data: bytes, name: str) -> str:
    """Bytes as text; RequestError names the first byte that is not text, and what to do."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The mark that UTF-8 may begin with is not counted by the error.
        at = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        raise _other_encoding(data, name, at, "is not UTF-8 text") from None
    if "\0" in text:  # never in written text, but common in other encodings
        raise _other_encoding(data, name, data.index(0), "contains a NUL, which is not text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _other_encoding(data: bytes, name: str, at: int, what: str) -> RequestError:
    """The error for bytes that are not UTF-8 text, with the encoding that they may be in."""
    encoding = next((word for mark, word in _MARKS.items() if data.startswith(mark)), None)
    guess = f"it begins like {encoding}"
    if encoding is None:
        first, second = data[:64:2].count(0), data[1:64:2].count(0)  # of each pair of bytes
        encoding, guess = "LATIN1", "it may be Latin-1 or similar"
        if first or second:
            encoding = "UTF-16LE" if second > first else "UTF-16BE"
            guess = f"it may be {encoding}"
    return RequestError(
        f"{name} {what}, at byte {at} (0x{data[at]:02X}); {guess}. Convert it first, for "
        f"example with: iconv -f {encoding} -t UTF-8"
    )


def unified_diff(before: str, after: str, from_file: str, to_file: str) -> Iterator[str]:
    """Yield a unified diff of two texts; the ends that long ones share cost next to nothing."""
    old, new = before.splitlines(), after.splitlines()
    start = _num_equal(old, new)
    end = _num_equal(old[start:][::-1], new[start:][::-1])
    first = max(0, start - 3)
    cut_old, cut_new = (
        old[first : len(old) - max(0, end - 3)],
        new[first : len(new) - max(0, end - 3)],
    )
    for line in difflib.unified_diff(cut_old, cut_new, from_file, to_file, lineterm=""):
        if line.startswith("@@"):  # counted from the cut on
            line = _HUNK_START.sub(lambda found: f"{found[1]}{int(found[2]) + first}", line)
        yield line


def _num_equal(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many lines two texts begin with alike."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
