"""Turns the places that a checkpoint names into torch tensors: mapped where possible, else read.

A mapped tensor is a view of the file: nothing is copied, processes share the pages, and the first use
brings them in. What must change on the way (another dtype, parts that do not lie together, another
order) is read into an `Arena`: anonymous memory, claimed once.

Reading goes through `pread` and not through the mapping, so that pages which were only copied from do
not count as this process's memory.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hanok.checkpoint.files import TensorRef
from hanok.errors import CheckpointError, UnsupportedError
from hanok.models.family import Source

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
MEAN_ROWS = 4096  # widened at a time
ALIGNMENT = 64  # bytes; a cache line, and what vector loads like


def dtype_of(ref: TensorRef) -> torch.dtype:
    """Return the torch dtype of a stored tensor; UnsupportedError where hanok does not compute in it."""
    if ref.dtype not in DTYPES:
        raise UnsupportedError(
            f"{ref.path}: tensor {ref.name} is {ref.dtype}, which this version does not compute "
            f"with. It reads {', '.join(DTYPES)}."
        )
    return DTYPES[ref.dtype]


class MappedFiles:
    """Weight files, each mapped once; a mapping lives as long as a tensor that looks into it."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def view(self, ref: TensorRef, size_bytes: int | None = None) -> Tensor:
        """Return a tensor over the file's own bytes, shaped as `ref` says; nothing is read yet.

        With `size_bytes`, the flat run of so many bytes that starts at `ref`.
        """
        dtype = dtype_of(ref)
        run_bytes = ref.size_bytes if size_bytes is None else size_bytes
        if run_bytes == 0:
            return torch.empty(ref.shape, dtype=dtype)
        flat = torch.frombuffer(
            self._map(ref.path),
            dtype=dtype,
            count=run_bytes // dtype.itemsize,
            offset=ref.offset_bytes,
        )
        if size_bytes is not None:
            return flat
        if ref.strides is not None:
            return flat.as_strided(ref.shape, ref.strides)
        return flat.view(ref.shape)

    def forget(self, ref: TensorRef, size_bytes: int) -> None:
        """Give back the pages of a run that starts at `ref`; a view of it reads them anew if used."""
        first = -(-ref.offset_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (ref.offset_bytes + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map(ref.path).madvise(mmap.MADV_DONTNEED, first, last - first)

    def _map(self, path: Path) -> mmap.mmap:
        with self._lock:
            return self._map_once(path)

    def _map_once(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            descriptor = _open(path)
            try:
                # Private and writable: torch wants writable memory, and the file never changes.
                self._maps[path] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            finally:
                os.close(descriptor)
        return self._maps[path]


class Arena:
    """Anonymous memory for weights that are copied, handed out piece by piece.

    Threads may ask for pieces at the same time.
    """

    def __init__(self, size_bytes: int, num_tensors: int) -> None:
        size = max(1, size_bytes + num_tensors * ALIGNMENT)
        # Private: pages that processes could share take a third longer to claim.
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._lock = threading.Lock()
        self._offset = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in the arena."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            offset = self._offset
            self._offset += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)


def read_run(ref: TensorRef, target: Tensor) -> None:
    """Fill `target` with the bytes from the start of `ref` on, as many as it has, unconverted."""
    read_bytes(ref, target.data_ptr(), target.nbytes)


def read_into(ref: TensorRef, target: Tensor) -> None:
    """Fill `target` (a contiguous CPU tensor of `ref`'s shape) from the file, converting its dtype."""
    if ref.size_bytes == 0:
        return
    dtype = dtype_of(ref)
    is_plain = ref.strides is None and dtype == target.dtype
    scratch = target if is_plain else torch.empty(ref.size_bytes // dtype.itemsize, dtype=dtype)
    read_bytes(ref, scratch.data_ptr(), ref.size_bytes)
    if not is_plain:
        strides = ref.strides
        shaped = (
            scratch.view(ref.shape) if strides is None else scratch.as_strided(ref.shape, strides)
        )
        target.copy_(shaped)
        if target.dtype is torch.float16:
            _check_range(ref, target)


def _check_range(ref: TensorRef, target: Tensor) -> None:
    """Refuse values that float16 cannot hold; each would make every score infinite."""
    least, most = torch.aminmax(target)
    if not (least.isfinite() and most.isfinite()):
        raise CheckpointError(
            f"{ref.path}: tensor {ref.name} has values beyond float16's 65,504, or that are no numbers. "
            "Compute in bfloat16 or float32 (dtype)."
        )


def read_parameter(tensors: Mapping[str, TensorRef], source: Source, target: Tensor) -> None:
    """Fill `target` (a contiguous CPU tensor of `source`'s shape) from the files, in our order."""
    refs = [tensors[name] for name in source.names]
    if source.layout == "rows":
        start = 0
        for ref, rows in zip(refs, source.rows, strict=True):
            read_into(ref, target[start : start + rows])
            start += rows
        return
    stored = torch.empty(source.file_shapes()[0], dtype=target.dtype)
    read_into(refs[0], stored)
    target.copy_(from_file_order(stored, source))


def read_bytes(ref: TensorRef, address: int, size_bytes: int) -> None:
    """Write the first `size_bytes` of a stored tensor to an address of this process."""
    view = memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")
    done, descriptor = 0, _open(ref.path)
    try:
        while done < size_bytes:
            count = os.preadv(descriptor, [view[done:]], ref.offset_bytes + done)
            if count == 0:
                raise CheckpointError(
                    f"{ref.path}: tensor {ref.name} needs {size_bytes} bytes at offset "
                    f"{ref.offset_bytes}, but the file ends after {done} of them."
                )
            done += count
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"{path} was there when loading began and cannot be opened any more: {error.strerror}. "
            "Restore the file and load again."
        ) from error


def from_file_order(stored: Tensor, source: Source) -> Tensor:
    """Return a stored matrix or bias in our order: (out, in), query, key and value rows in turn."""
    if source.layout == "columns":
        return stored.t() if stored.dim() == 2 else stored
    grouped = stored.view(-1, 3, source.head_rows, *stored.shape[1:])
    return grouped.transpose(0, 1).reshape(stored.shape)


def to_file_order(weight: Tensor, source: Source) -> Tensor:
    """Undo `from_file_order`."""
    if source.layout == "columns":
        return weight.t() if weight.dim() == 2 else weight
    grouped = weight.view(3, -1, source.head_rows, *weight.shape[1:])
    return grouped.transpose(0, 1).reshape(weight.shape)


def mean_row(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the mean of a matrix's rows, float32, and the standard deviation of its numbers.

    matrix: (rows, …), of any float dtype; widened a block of rows at a time.
    """
    total = torch.zeros(matrix.shape[1:], dtype=torch.float64)
    squares = 0.0
    for start in range(0, len(matrix), MEAN_ROWS):
        block = matrix[start : start + MEAN_ROWS].to("cpu", torch.float32)
        total += block.sum(0, dtype=torch.float64)
        squares += float(block.square().sum(dtype=torch.float64))
    mean = total / len(matrix)
    spread = max(0.0, squares / matrix.numel() - float(mean.mean()) ** 2) ** 0.5
    return mean.float(), spread
