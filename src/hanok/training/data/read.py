"""Reads files of rows: JSONL, JSON arrays, CSV, plain text, Parquet and Arrow; one row at a time.

A row is what its file says, not yet understood (`formats.py`), or the reason why it cannot be read; one
bad row spoils no other. A JSONL file may be larger than memory; a JSON array is held as text.

Parquet and Arrow need pyarrow: `pip install 'hanok[data]'`.
"""

import csv
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

from hanok.errors import DataError, RequestError
from hanok.text_files import decode
from hanok.training.data.formats import Text

LINES, ARRAY, TABLE, TEXT, COLUMNS = "jsonl", "json", "csv", "txt", "parquet"
SUFFIXES = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": ARRAY,
    ".csv": TABLE,
    ".tsv": TABLE,
    ".txt": TEXT,
    ".md": TEXT,
    ".text": TEXT,
    ".parquet": COLUMNS,
    ".arrow": COLUMNS,
    ".feather": COLUMNS,
}
PART_BYTES = 2**20
"""A text file is read in parts of about this many bytes, each ending where a line does."""
_BOM = b"\xef\xbb\xbf"
_MAX_FIELD = 2**27
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: what it says, or why it cannot be read."""

    line: int
    """Where it begins, from 1; of Parquet and Arrow the number of the row."""
    value: Any = None
    reason: str = ""
    """Why it cannot be read. Empty: it can."""
    size_bytes: int = 0
    """About how much of the file it is, for progress; 0 where that is not known."""


class JsonLines(Sequence[Row]):
    """The rows of a JSONL file, found by the offsets of their lines; empty lines are no rows."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def _places(self) -> "tuple[array[int], array[int]]":
        """The offset and the number of each row's line."""
        offsets, numbers = array("Q"), array("Q")
        offset = 0
        with self._file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
        return offsets, numbers

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._places[0])

    def __getitem__(self, index: Any) -> Any:
        """Read one row, or those of a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        offsets, numbers = self._places
        with self._file.open("rb") as opened:
            opened.seek(offsets[index])
            return _json_row(numbers[index], opened.readline())

    def __iter__(self) -> Iterator[Row]:
        """Read all rows in their order."""
        with self._file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    yield _json_row(number, line)


def find_files(path: Path) -> list[Path]:
    """Return the file, or those of a folder that can be read, in the order of their names.

    DataError where there is none.
    """
    if path.is_file():
        kind_of(path)
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder; check the path.")
    entries = [
        entry
        for entry in sorted(path.rglob("*"))
        if entry.is_file() and not any(p.startswith(".") for p in entry.relative_to(path).parts)
    ]
    # A text next to rows describes them (README.md and its like).
    found = [entry for entry in entries if SUFFIXES.get(entry.suffix.lower(), TEXT) != TEXT]
    found = found or [e for e in entries if e.suffix.lower() in SUFFIXES]
    if not found:
        names = ", ".join(entry.name for entry in entries[:10]) or "nothing"
        raise DataError(
            f"{path}: no file of training data in this folder; there is {names}. Known endings: "
            f"{' '.join(SUFFIXES)}."
        )
    return found


def size_of(path: Path) -> int:
    """Return the bytes of the files that would be read."""
    return sum(file.stat().st_size for file in find_files(path))


def kind_of(file: Path) -> str:
    """Return how a file is to be read; DataError for an unknown ending."""
    kind = SUFFIXES.get(file.suffix.lower())
    if kind is None:
        raise DataError(
            f"{file}: its ending {file.suffix!r} says nothing of how to read it. Known: "
            f"{' '.join(SUFFIXES)}; rename the file."
        )
    if kind == ARRAY:
        with file.open("rb") as opened:
            start = opened.read(4096).removeprefix(_BOM).lstrip()
        # Many .json files are JSONL.
        return LINES if start.startswith(b"{") else ARRAY
    return kind


def read_rows(file: Path) -> Iterable[Row]:
    """Return the rows of a file, read when they are asked for; a Sequence where they are `JsonLines`."""
    kind = kind_of(file)
    if kind == LINES:
        return JsonLines(file)
    readers = {ARRAY: _read_array, TABLE: _read_table, TEXT: _read_text, COLUMNS: _read_columns}
    return readers[kind](file)


def capped(rows: Iterable[Row], cap: int, seed: int) -> list[Row]:
    """Return `cap` rows in their order, chosen by the seed from all; all where there are no more.

    Of a JSONL file only the chosen ones are parsed.
    """
    keys = Random(seed)
    if isinstance(rows, JsonLines):
        chosen = nsmallest(cap, ((keys.random(), index) for index in range(len(rows))))
        return [rows[index] for _, index in sorted(chosen, key=itemgetter(1))]
    kept = nsmallest(cap, ((keys.random(), index, row) for index, row in enumerate(rows)))
    return [row for _, _, row in sorted(kept, key=itemgetter(1))]


def _json_row(number: int, line: bytes) -> Row:
    try:
        value = json.loads(line.removeprefix(_BOM) if number == 1 else line)
        return Row(number, value, size_bytes=len(line))
    except UnicodeDecodeError as error:
        return Row(number, reason=f"not UTF-8 text, at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Row(number, reason=f"not valid JSON: {error}")


def _text_of(file: Path) -> str:
    try:
        return decode(file.read_bytes(), str(file))
    except RequestError as error:
        raise DataError(str(error)) from None


def _read_array(file: Path) -> Iterator[Row]:
    text = _text_of(file)
    decoder = json.JSONDecoder()
    place = _skip(text, 0)
    line, counted = 1, 0
    if text[place : place + 1] != "[":
        raise DataError(f"{file}: neither a JSON array of rows nor JSONL; it begins {text[:40]!r}.")
    place = _skip(text, place + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            # Where the next row begins is not known.
            raise DataError(
                f"{file}, line {line}: the array cannot be read on from here: {error}. Mend the "
                "file, or write one row a line (JSONL), of which bad ones are left out."
            ) from None
        yield Row(line, value, size_bytes=end - place)
        place = _skip(text, end)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            raise DataError(
                f"{file}, line {line}: after this row the array goes on with "
                f"{text[place : place + 20]!r}, neither a comma nor its end. Is the file cut off?"
            )


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _read_table(file: Path) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD)
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, delimiter=separator, strict=True)
        names: list[str] | None = None
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Row(begin, reason=f"not valid CSV: {error}")
                continue
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}, after line {begin - 1}: not UTF-8 text: {error}."
                ) from None
            if cells is None:
                return
            if names is None:
                names = cells
            elif len(cells) == len(names):
                yield Row(begin, dict(zip(names, cells, strict=True)))
            elif cells:
                reason = f"{len(cells)} cells, but the header names {len(names)} columns"
                yield Row(begin, reason=reason)


def _read_text(file: Path) -> Iterator[Row]:
    """Yield the parts of a text: its first has `begins`, its last `ends`."""
    line = 1
    with file.open("rb") as opened:
        part = _next_part(opened)
        while part:
            following = _next_part(opened)
            try:
                text = decode(part, f"{file}, from line {line}")
            except RequestError as error:
                raise DataError(str(error)) from None
            value = Text(text=text, begins=line == 1, ends=not following)
            yield Row(line, value, size_bytes=len(part))
            line += part.count(b"\n")
            part = following


def _next_part(opened: Any) -> bytes:
    part: bytes = opened.read(PART_BYTES)
    return part + opened.readline() if part and not part.endswith(b"\n") else part


def _read_columns(file: Path) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{file}: pyarrow reads this format and is not installed; pip install 'hanok[data]'."
        ) from None
    try:
        if file.suffix.lower() == ".parquet":
            batches = parquet.ParquetFile(file).iter_batches()
        else:
            source = arrow.memory_map(str(file))
            try:
                opened = arrow.ipc.open_file(source)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except arrow.ArrowInvalid:
                batches = iter(arrow.ipc.open_stream(arrow.memory_map(str(file))))
        number = 0
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(number, value)
    except arrow.ArrowException as error:
        raise DataError(f"{file}: cannot be read by pyarrow: {error}.") from error
