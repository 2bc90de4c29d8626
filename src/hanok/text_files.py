"""Text that people give as files or on standard input: UTF-8, with an error that helps where it is not.

Every verb reads through here, so that a prompt, a text to score, a grid and a trace are the same text
whatever wrote the file: a byte order mark is no part of it, and a line ends with a line feed.
"""

import codecs
import sys
from pathlib import Path

from hanok.errors import RequestError

STANDARD_INPUT = Path("-")


def read_text(file: Path) -> str:
    """The text of a file, or of standard input for `-`; RequestError where it cannot be had."""
    if file == STANDARD_INPUT:
        return decode(sys.stdin.buffer.read(), "standard input")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}.") from None
    return decode(data, str(file))


def decode(data: bytes, name: str) -> str:
    """Bytes as text; RequestError names the first byte that is none, and what to do."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The mark that UTF-8 may begin with is not counted by the error.
        at = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "UTF-16" if is_utf16 else "LATIN1"
        what = "it begins as UTF-16 does" if is_utf16 else "it may be Latin-1 or the like"
        raise RequestError(
            f"{name} is not UTF-8 text, at byte {at} (0x{data[at]:02X}); {what}. Convert it first, for "
            f"example with: iconv -f {encoding} -t UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
