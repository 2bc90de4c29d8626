"""Tokenized documents of one file on disk: written once, mapped afterwards.

A folder holds plain arrays in this machine's byte order, and `summary.json`:

| file | of each | item |
|---|---|---|
| `ids.bin` | token | 4 bytes |
| `targets.bin` | token | 1 byte: 1 if it is to be predicted |
| `ends.bin` | document | 8 bytes: where its tokens end |
| `lines.bin` | document | 8 bytes: the line of its row |
| `counts.bin` | document | 4 bytes: its targets |
| `flags.bin` | document | 1 byte |

Its name is the hash of all that it was made from. It is written under another name and renamed when
complete, so neither a part of one nor another's is ever read.
"""

import hashlib
import json
import mmap
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

from hanok.checkpoint.aside import folder_aside
from hanok.checkpoint.content_hash import content_hashes
from hanok.checkpoint.tokenizer import Tokenizer
from hanok.errors import DataError
from hanok.package import __version__
from hanok.training.data.masks import Encoded

IS_TEXT, IS_OPEN, HAS_END, HAS_DOUBLED_BOS = 1, 2, 4, 8
KEPT_BAD_ROWS = 100
_ITEMS: Mapping[str, Literal["B", "I", "Q"]] = {
    "ids": "I",
    "targets": "B",
    "ends": "Q",
    "lines": "Q",
    "counts": "I",
    "flags": "B",
}
_SUMMARY, _HASHES = "summary.json", "hashes.json"


@dataclass(slots=True, kw_only=True)
class FileSummary:
    """What was read from one file."""

    format: str = ""
    num_rows: int = 0
    num_bad_rows: int = 0
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    """(line, reason) of the first ones."""
    ways: Counter[str] = field(default_factory=Counter)
    """How often answers were found in each way (`masks.py`)."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Why turns are not learnt, and how many."""

    def add_bad_row(self, line: int, reason: str) -> None:
        """Count a row that cannot be learnt from."""
        self.num_bad_rows += 1
        if len(self.bad_rows) < KEPT_BAD_ROWS:
            self.bad_rows.append((line, reason))


class TokenWriter:
    """Writes documents into a folder, one after another."""

    def __init__(self, files: Mapping[str, BinaryIO], bos: int | None) -> None:
        self._files = files
        self._bos = bos
        self._end = 0

    def add(self, document: Encoded, line: int) -> None:
        """Write one document; `line` is that of its row."""
        ids, targets = array("I", document.ids), document.targets
        self._end += len(ids)
        bos = self._bos
        is_doubled = (
            bos is not None
            and document.ids.count(bos) > 1
            and any(first == second == bos for first, second in pairwise(document.ids))
        )
        flags = (
            IS_TEXT * document.is_text
            | IS_OPEN * document.is_open
            | HAS_END * document.has_end
            | HAS_DOUBLED_BOS * is_doubled
        )
        values: dict[str, Any] = {
            "ids": ids,
            "targets": targets,
            "ends": array("Q", [self._end]),
            "lines": array("Q", [line]),
            "counts": array("I", [targets.count(1)]),
            "flags": array("B", [flags]),
        }
        for name, value in values.items():
            self._files[name].write(value)


class TokenFile:
    """The documents of one file, mapped from disk. OSError, ValueError or TypeError if it is damaged."""

    def __init__(self, folder: Path) -> None:
        found = json.loads((folder / _SUMMARY).read_text())
        self.summary = FileSummary(
            **{
                **found,
                "bad_rows": [(line, reason) for line, reason in found["bad_rows"]],
                "ways": Counter(found["ways"]),
                "dropped": Counter(found["dropped"]),
            }
        )
        self.ids = _mapped(folder, "ids")
        self.targets = _mapped(folder, "targets")
        self.ends = _mapped(folder, "ends")
        self.lines = _mapped(folder, "lines")
        self.counts = _mapped(folder, "counts")
        self.flags = _mapped(folder, "flags")
        num_tokens = self.ends[-1] if len(self) else 0
        sizes = {len(self.ids), len(self.targets), num_tokens}
        if len(sizes) > 1 or {len(self.lines), len(self.counts), len(self.flags)} != {len(self)}:
            raise ValueError(f"the files of {folder} do not fit together")

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.ends)

    def start(self, number: int) -> int:
        """Return where the tokens of a document begin."""
        return int(self.ends[number - 1]) if number else 0


class TokenCache:
    """The folder in which tokenized files are kept."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder = folder
        self._bos = tokenizer.bos_token_id
        self._tokenizer = _hash_of(tokenizer)

    def folder_of(self, file: Path, made_with: Mapping[str, Any]) -> Path:
        """Return where the documents of a file are, or will be; `made_with` is all else that counts."""
        try:
            (content,) = content_hashes([file], self._folder / _HASHES)
        except OSError as error:
            raise DataError(f"{file}: cannot be read, or its hash not be kept: {error}.") from error
        described = {
            "version": __version__,
            "byte_order": sys.byteorder,
            "file": content,
            "tokenizer": self._tokenizer,
            **made_with,
        }
        text = json.dumps(described, sort_keys=True)
        return self._folder / hashlib.sha256(text.encode()).hexdigest()[:32]

    @contextmanager
    def writing(self, folder: Path, summary: FileSummary) -> Iterator[TokenWriter]:
        """Yield what writes a folder; it has its name when the block ends, with the summary."""
        try:
            with folder_aside(folder) as aside:
                files = {name: (aside / f"{name}.bin").open("wb") for name in _ITEMS}
                try:
                    yield TokenWriter(files, self._bos)
                finally:
                    for file in files.values():
                        file.close()
                values = {item.name: getattr(summary, item.name) for item in fields(summary)}
                (aside / _SUMMARY).write_text(json.dumps(values))
        except OSError as error:
            if folder.is_dir():
                return  # another process has written the same meanwhile
            raise DataError(
                f"tokenized documents cannot be kept in {folder.parent}: {error}. Choose another "
                "folder for them."
            ) from error


def read_tokens(folder: Path) -> TokenFile | None:
    """Return what a folder of the cache holds; None where nothing is. A damaged one is removed."""
    if not folder.is_dir():
        return None
    try:
        return TokenFile(folder)
    except (OSError, ValueError, TypeError, KeyError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _mapped(folder: Path, name: str) -> "memoryview[int]":
    with (folder / f"{name}.bin").open("rb") as file:
        if not file.seek(0, 2):
            return memoryview(b"").cast(_ITEMS[name])
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return view.cast(_ITEMS[name])


def _hash_of(tokenizer: Tokenizer) -> str:
    """Return a hash of the tokenizer's files, as they are or as they have been changed in memory."""
    found = hashlib.sha256()
    with TemporaryDirectory(prefix="hanok-tokenizer-") as name:
        tokenizer.save(Path(name))
        for file in sorted(Path(name).rglob("*")):
            if file.is_file():
                found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()
