"""From a file of rows to tokenized documents on disk: detected, read, rendered and masked once.

Rows are taken in batches, so that the tokenizer's threads have something to do and no file is held in
memory. A file that was tokenized before in the same way is only mapped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hanok.errors import DataError
from hanok.training.data.cache import FileSummary, TokenCache, TokenFile, TokenWriter, read_tokens
from hanok.training.data.formats import (
    SHOWN_ROWS,
    BadRowError,
    Conversation,
    Record,
    Text,
    detect,
    to_record,
)
from hanok.training.data.masks import Encoded, Renderer
from hanok.training.data.options import Source
from hanok.training.data.read import Row, capped, read_rows

Progress = Callable[[int], None]
"""Called with numbers of bytes that have been read."""
BATCH_ROWS = 256
SURE_ROWS = 1000
"""After so many rows their share of bad ones is taken for that of the file."""
SHOWN_BAD_ROWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What reading depends on besides the source."""

    seed: int
    """Of the rows that a cap takes."""
    max_bad_rows: float
    progress: Progress


def tokenize_file(
    file: Path,
    source: Source,
    renderer: Renderer,
    cache: TokenCache,
    reading: Reading,
) -> TokenFile:
    """Return the documents of a file, read from the cache where it has them.

    Raises DataError where the file cannot be read, its format is not clear, or its share of bad rows is
    above the limit.
    """
    folder = cache.folder_of(
        file,
        {
            "format": source.format,
            "columns": dict(source.columns),
            "cap": source.cap,
            "seed": reading.seed if source.cap is not None else None,
            "suffix": file.suffix,
            "template": renderer.template,
            "end_ids": sorted(renderer.end_ids),
            "append_eos": renderer.appends_eos,
        },
    )
    found = read_tokens(folder)
    if found is None:
        rows = read_rows(file)
        if source.cap is not None:
            rows = capped(rows, source.cap, reading.seed)
        summary = FileSummary()
        with cache.writing(folder, summary) as writer:
            _Task(file, source, renderer, writer, summary, reading).run(rows)
        found = TokenFile(folder)
    else:
        reading.progress(file.stat().st_size)
    _check_bad_rows(file, found.summary, reading.max_bad_rows)
    return found


class _Task:
    """The tokenizing of one file."""

    def __init__(
        self,
        file: Path,
        source: Source,
        renderer: Renderer,
        writer: TokenWriter,
        summary: FileSummary,
        reading: Reading,
    ) -> None:
        self._file = file
        self._columns = source.columns
        self._format = source.format
        self._renderer = renderer
        self._writer = writer
        self._summary = summary
        self._reading = reading
        self._left = file.stat().st_size

    def run(self, rows: Iterable[Row]) -> None:
        """Tokenize all rows."""
        for batch in _batches(rows):
            if not self._summary.format:
                shown = [self._renamed(row.value) for row in batch[:SHOWN_ROWS] if not row.reason]
                if self._format is not None or shown:
                    self._summary.format = self._format or detect(self._file, shown)
            self._add(batch)
            if self._summary.num_rows >= SURE_ROWS:
                _check_bad_rows(self._file, self._summary, self._reading.max_bad_rows)
            self._advance(sum(row.size_bytes for row in batch))
        self._advance(self._left)

    def _advance(self, num_bytes: int) -> None:
        """Say how far it is; rows know their size only about."""
        num_bytes = min(num_bytes, self._left)
        self._left -= num_bytes
        self._reading.progress(num_bytes)

    def _add(self, rows: list[Row]) -> None:
        records: list[tuple[Row, Record]] = []
        for row in rows:
            self._summary.num_rows += 1
            try:
                if row.reason:
                    raise BadRowError(row.reason)
                record = to_record(self._renamed(row.value), self._summary.format)
            except BadRowError as error:
                self._summary.add_bad_row(row.line, str(error))
                continue
            if isinstance(record, Conversation) and not self._renderer.has_template:
                raise DataError(
                    f"{self._file} has conversations, and this checkpoint has no chat template. Name "
                    "one as chat_template: vicuna_v1.1, a file, or the text of one."
                )
            records.append((row, record))
        encoded = self._renderer.encode([record for _, record in records])
        for (row, _), document in zip(records, encoded, strict=True):
            if isinstance(document, Encoded):
                self._summary.ways.update(document.ways)
                self._summary.dropped.update(document.dropped)
                self._writer.add(document, row.line)
            else:
                self._summary.add_bad_row(row.line, str(document))

    def _renamed(self, value: Any) -> Any:
        if not self._columns or not isinstance(value, Mapping):
            return value
        named = {name: value[column] for name, column in self._columns.items() if column in value}
        kept = {name: item for name, item in value.items() if name not in self._columns.values()}
        return {**kept, **named}


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield rows in batches; parts of texts, which are long, one by one."""
    remaining = iter(rows)
    while batch := list(islice(remaining, 1)):
        if not isinstance(batch[0].value, Text):
            batch += islice(remaining, BATCH_ROWS - 1)
        yield batch


def _check_bad_rows(file: Path, summary: FileSummary, limit: float) -> None:
    """Raise DataError if too many rows are bad, with the first of them."""
    if not summary.num_rows:
        raise DataError(f"{file}: there are no rows in this file.")
    share = summary.num_bad_rows / summary.num_rows
    if share <= limit:
        return
    lines = "".join(
        f"\n  {file}:{line}: {reason}" for line, reason in summary.bad_rows[:SHOWN_BAD_ROWS]
    )
    left = summary.num_bad_rows - SHOWN_BAD_ROWS
    raise DataError(
        f"{summary.num_bad_rows:,} of {summary.num_rows:,} rows are bad ({share:.1%}), more than "
        f"max_bad_rows allows ({limit:.1%}):{lines}"
        + (f"\n  and {left:,} more" if left > 0 else "")
        + "\nMend them, or allow a larger share."
    )
