"""Changes rows of tensors in a safetensors file by writing the file anew, without reading the others.

Only the header, the changed rows and what follows from them are made here; every other byte is copied by
the kernel from file to file. Rows are converted in Python, for there are few of them.

Memory: the changed rows. Time: that of copying the file.
"""

import array
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from hanok.checkpoint.safetensors import LENGTH_BYTES, TensorRef, read_header
from hanok.checkpoint.writer import HEADER_ALIGNMENT
from hanok.errors import CheckpointError

FLOATS = ("F32", "BF16", "F16")
"""What rows may be stored in."""
COPY_BYTES = 2**26
COMPARE_BYTES = 2**22
FILL_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RowEdit:
    """A tensor with other rows: those of the file stay, but for `rows`, and more may follow."""

    tensor: TensorRef
    num_rows: int
    """Of the result, at least those of the file."""
    rows: Mapping[int, bytes]
    filler: bytes = b""
    """A row for those beyond the file's that are not among `rows`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return (self.num_rows, *self.tensor.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return row_bytes(self.tensor)

    def parts(self) -> Iterator["Part"]:
        """Yield the result's bytes in turn, as ranges of the file and as bytes."""
        size, start, old = self.row_bytes, self.tensor.offset_bytes, self.tensor.shape[0]
        reached = 0
        for index in sorted(index for index in self.rows if index < old):
            yield from _range(start + reached * size, (index - reached) * size)
            yield self.rows[index]
            reached = index + 1
        yield from _range(start + reached * size, (old - reached) * size)
        reached = old
        for index in sorted(index for index in self.rows if index >= old):
            yield from self._filled(index - reached)
            yield self.rows[index]
            reached = index + 1
        yield from self._filled(self.num_rows - reached)

    def _filled(self, count: int) -> Iterator[bytes]:
        most = max(1, FILL_BYTES // self.row_bytes)
        for first in range(0, count, most):
            yield self.filler * min(most, count - first)


Part = tuple[int, int] | bytes
"""A range of the old file, (first byte, number of bytes), or bytes."""


def row_bytes(tensor: TensorRef) -> int:
    """Return the bytes of one row."""
    return tensor.size_bytes // tensor.shape[0]


def read_row(tensor: TensorRef, index: int) -> list[float]:
    """Return one row as numbers."""
    size = row_bytes(tensor)
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset_bytes + index * size)
        data = file.read(size)
    if tensor.dtype == "F16":
        return list(struct.unpack(f"<{size // 2}e", data))
    if tensor.dtype == "BF16":
        halves = array.array("H", data)
        data = array.array("I", (half << 16 for half in halves)).tobytes()
    return list(array.array("f", data))


def to_bytes(values: Sequence[float], dtype: str) -> bytes:
    """Return numbers as they are stored, rounded to the nearest (ties to even)."""
    if dtype == "F16":
        return struct.pack(f"<{len(values)}e", *values)
    floats = array.array("f", values)
    if dtype == "F32":
        return floats.tobytes()
    bits = array.array("I", floats.tobytes())
    return array.array(
        "H", ((value + 0x7FFF + (value >> 16 & 1)) >> 16 & 0xFFFF for value in bits)
    ).tobytes()


def rewrite(source: Path, file: BinaryIO, edits: Iterable[RowEdit]) -> int:
    """Write `source` with changed tensors to an empty file; return the bytes written.

    The tensors keep their order, and the header its metadata.
    """
    tensors, metadata = read_header(source)
    changed = {edit.tensor.name: edit for edit in edits}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts: list[Iterable[Part]] = []
    reached = 0
    for ref in sorted(tensors.values(), key=lambda ref: (ref.offset_bytes, ref.size_bytes)):
        edit = changed.get(ref.name)
        shape = edit.shape if edit else ref.shape
        size = edit.row_bytes * edit.num_rows if edit else ref.size_bytes
        header[ref.name] = {
            "dtype": ref.dtype,
            "shape": list(shape),
            "data_offsets": [reached, reached + size],
        }
        reached += size
        parts.append(edit.parts() if edit else _range(ref.offset_bytes, ref.size_bytes))
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % HEADER_ALIGNMENT)
    start = len(raw).to_bytes(LENGTH_BYTES, "little") + raw
    with source.open("rb") as old:
        file.write(start)
        for part in _joined(chain.from_iterable(parts)):
            if isinstance(part, bytes):
                file.write(part)
            else:
                _copy(old, file, *part)
    return len(start) + reached


def first_difference(old: TensorRef, new: TensorRef, changed: Iterable[int]) -> int | None:
    """Return the first row of `old` that `new` has with other bytes, `changed` ones aside; or None."""
    size = row_bytes(old)
    skipped = sorted({*(index for index in changed if index < old.shape[0]), old.shape[0]})
    start = 0
    with old.path.open("rb") as one, new.path.open("rb") as other:
        for index in skipped:
            first, left = start * size, (index - start) * size
            one.seek(old.offset_bytes + first)
            other.seek(new.offset_bytes + first)
            while left:
                count = min(left, COMPARE_BYTES)
                expected, found = one.read(count), other.read(count)
                if expected != found or len(expected) < count:
                    return (first + _equal_bytes(expected, found)) // size
                first, left = first + count, left - count
            start = index + 1
    return None


def _equal_bytes(one: bytes, other: bytes) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _range(start: int, size: int) -> list[Part]:
    return [(start, size)] if size else []


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    """Yield the parts, ranges that follow one another joined."""
    held: tuple[int, int] | None = None
    for part in parts:
        if held is not None and not isinstance(part, bytes) and sum(held) == part[0]:
            held = (held[0], held[1] + part[1])
            continue
        if held is not None:
            yield held
            held = None
        if isinstance(part, bytes):
            yield part
        else:
            held = part
    if held is not None:
        yield held


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    """Append a range of one file to the other, in the kernel where it can."""
    target.flush()
    in_kernel = True
    while size:
        count = 0
        if in_kernel:
            try:
                count = os.copy_file_range(
                    source.fileno(), target.fileno(), min(size, COPY_BYTES), start
                )
            except OSError:  # two file systems, or one that cannot
                in_kernel = False
        if not in_kernel:
            data = os.pread(source.fileno(), min(size, COPY_BYTES), start)
            count = target.write(data)
            target.flush()
        if count == 0:
            raise CheckpointError(f"{source.name} ends {size} bytes early; get it again.")
        start, size = start + count, size - count
