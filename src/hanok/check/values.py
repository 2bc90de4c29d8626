"""The values of weights: NaN and infinity, rows that are all zero, constant, or the same as another.

Every byte is read once, in chunks that stay in a core's cache, by several threads. A chunk whose sum is
finite (in float32) has finite numbers only, since NaN and infinity survive every addition; the numbers
of any other chunk are looked at one by one. Rows are judged by a few of their columns; only those that
agree there are looked at whole.

Cost: one pass over the bytes. Memory: a buffer for each thread, and 32 bytes for each row of an
embedding.
"""

import math
import mmap
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path

import torch
from torch import Tensor

from hanok.checkpoint.files import read_tensor_bytes
from hanok.checkpoint.safetensors import DTYPE_BITS, TensorRef
from hanok.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CHUNK_BYTES = 2**22
PROBED_COLUMNS = 4
KEY_COLUMNS = 16
"""Of each row of an embedding, to find rows that may be the same."""
KEY_FACTORS = (1, 1_000_003, 998_244_353, 2_147_483_647)
MAX_COMPARED = 1000  # pairs of rows that are read to be compared


@dataclass(slots=True)
class TensorValues:
    """What was found in one tensor."""

    num_not_finite: int = 0
    first_not_finite: int | None = None
    """The index of the first such number, in C order."""
    zero_rows: list[int] = field(default_factory=list)
    constant_rows: list[int] = field(default_factory=list)
    twins: list[tuple[int, int]] = field(default_factory=list)
    """Rows that are the same as an earlier one: (earlier, later)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A piece of a tensor that is read at once: whole rows, or numbers of one row."""

    ref: TensorRef
    begin: int
    """The first number."""
    count: int
    columns: int
    """Of a row; 0 where rows are not looked at."""


def scan_values(
    refs: Sequence[TensorRef],
    *,
    with_rows: Collection[str],
    with_twins: Collection[str],
    threads: int,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, TensorValues]:
    """Read the tensors once and return what is in each, by name.

    Rows are looked at in `with_rows`, and compared with one another in `with_twins`. Tensors whose dtype
    is no float are left out. `progress` is called with the bytes read since its last call, from several
    threads. Raises CheckpointError where a file is shorter than it was when it was opened.
    """
    before = torch.get_num_threads()
    # Each thread computes by itself: chunks are too small to be distributed.
    pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))
    with ExitStack() as stack:
        stack.callback(lambda: torch.set_num_threads(before))
        stack.callback(lambda: pool.shutdown(cancel_futures=True))
        scan = _Scan(refs, with_rows, with_twins, progress)
        for path in {ref.path for ref in refs}:
            scan.files[path] = stack.enter_context(path.open("rb", buffering=0))
        for done in [pool.submit(scan.run) for _ in range(threads)]:
            done.result()
        pool.shutdown()
        scan.find_twins()
    return scan.found


def same_bytes(first: TensorRef, second: TensorRef) -> bool:
    """Return whether two tensors of one dtype and shape hold the same bytes."""
    if first.strides is not None or second.strides is not None:
        return read_tensor_bytes(first) == read_tensor_bytes(second)
    size = first.size_bytes
    if size != second.size_bytes:
        return False
    with first.path.open("rb") as one, second.path.open("rb") as other:
        one.seek(first.offset_bytes)
        other.seek(second.offset_bytes)
        for start in range(0, size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, size - start)
            if one.read(count) != other.read(count):
                return False
    return True


def scanned_bytes(refs: Sequence[TensorRef]) -> int:
    """Return how many bytes `scan_values` reads."""
    return sum(ref.dense_bytes for ref in refs if ref.dtype in DTYPES)


class _Scan:
    """One pass: what is to be read, and what was found so far."""

    def __init__(
        self,
        refs: Sequence[TensorRef],
        with_rows: Collection[str],
        with_twins: Collection[str],
        progress: Callable[[int], None],
    ) -> None:
        self._refs = {ref.name: ref for ref in refs if ref.dtype in DTYPES}
        self.found = {name: TensorValues() for name in self._refs}
        in_file_order = sorted(self._refs.values(), key=lambda ref: (ref.path, ref.offset_bytes))
        # An iterator is advanced by one thread at a time.
        self._left = iter([p for ref in in_file_order for p in _parts(ref, ref.name in with_rows)])
        self._keys = {
            name: torch.empty((_num_rows(self._refs[name]), 4), dtype=torch.int64)
            for name in with_twins
            if name in self._refs
            and self._refs[name].strides is None
            and _columns(self._refs[name]) >= KEY_COLUMNS
        }
        self.files: dict[Path, RawIOBase] = {}
        """Each opened once, for all threads: reads name their place."""
        self._progress = progress
        self._lock = threading.Lock()
        self._own = threading.local()

    def run(self) -> None:
        """Take parts until none is left; each thread does so."""
        try:
            for part in self._left:
                self._look(part)
        except BaseException:
            self._left = iter(())  # the other threads need not go on
            raise

    def _look(self, part: _Part) -> None:
        """Read one part and note what is in it."""
        values = self._read(part)
        where = None if _is_finite(values) else _not_finite(values)
        zeros: list[int] = []
        constants: list[int] = []
        first_row = 0
        if part.columns:
            rows = values.view(-1, part.columns)
            first_row = part.begin // part.columns
            zeros, constants = _even_rows(rows)
            if (keys := self._keys.get(part.ref.name)) is not None:
                keys[first_row : first_row + len(rows)] = _row_keys(rows)
        found = self.found[part.ref.name]
        with self._lock:
            if where is not None and len(where):
                at = part.begin + int(where[0])
                found.num_not_finite += len(where)
                before = found.first_not_finite
                found.first_not_finite = at if before is None else min(at, before)
            found.zero_rows += [first_row + row for row in zeros]
            found.constant_rows += [first_row + row for row in constants]
            self._progress(part.count * DTYPE_BITS[part.ref.dtype] // 8)

    def find_twins(self) -> None:
        """Compare the rows whose keys are the same, and put what was found into order."""
        for found in self.found.values():
            found.zero_rows.sort()
            found.constant_rows.sort()
        for name, keys in self._keys.items():
            found = self.found[name]
            zero = set(found.zero_rows)
            for group in _groups(keys)[:MAX_COMPARED]:
                first, *others = [row for row in group if row not in zero] or [-1]
                data = self._row(name, first) if others else b""
                found.twins += [(first, row) for row in others if self._row(name, row) == data]

    def _row(self, name: str, row: int) -> bytes:
        ref = self._refs[name]
        size = _columns(ref) * DTYPE_BITS[ref.dtype] // 8
        return os.pread(self.files[ref.path].fileno(), size, ref.offset_bytes + row * size)

    def _read(self, part: _Part) -> Tensor:
        """Return the numbers of a part, in this thread's buffer."""
        ref = part.ref
        dtype = DTYPES[ref.dtype]
        if ref.strides is not None:  # a view of a pickle, read whole
            return torch.frombuffer(read_tensor_bytes(ref), dtype=dtype)
        item = dtype.itemsize
        size = part.count * item
        data = self._buffer(size)[:size]
        done, start = 0, ref.offset_bytes + part.begin * item
        number = self.files[ref.path].fileno()
        while done < size and (count := os.preadv(number, [data[done:]], start + done)):
            done += count
        if done < size:
            raise CheckpointError(
                f"{ref.path}: tensor {ref.name!r} ends after {done} of {size} bytes; the file was "
                "changed while it was checked"
            )
        return torch.frombuffer(data, dtype=dtype)

    def _buffer(self, size: int) -> memoryview:
        buffer: mmap.mmap | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = mmap.mmap(-1, max(size, CHUNK_BYTES))  # aligned to a page
            self._own.buffer = buffer
        return memoryview(buffer)


def _parts(ref: TensorRef, has_rows: bool) -> list[_Part]:
    total = math.prod(ref.shape)
    if not total:
        return []
    columns = _columns(ref) if has_rows else 0
    if ref.strides is not None:
        return [_Part(ref=ref, begin=0, count=total, columns=columns)]
    fitting = CHUNK_BYTES * 8 // DTYPE_BITS[ref.dtype]
    if columns and columns <= fitting:
        step = fitting // columns * columns
    else:
        step, columns = fitting, 0
    return [
        _Part(ref=ref, begin=begin, count=min(step, total - begin), columns=columns)
        for begin in range(0, total, step)
    ]


def _columns(ref: TensorRef) -> int:
    return ref.shape[-1] if len(ref.shape) > 1 else 0


def _num_rows(ref: TensorRef) -> int:
    return math.prod(ref.shape[:-1])


def _is_finite(values: Tensor) -> bool:
    """Return whether the sum of some numbers is finite, and so is each of them."""
    if values.dtype.itemsize == 1:
        values = values.bfloat16()  # holds every number of both 8-bit formats
    # Accumulated in float32 either way. The second one is slower, and not rounded to the dtype of the
    # numbers, whose largest number a sum may exceed.
    return math.isfinite(values.sum().item()) or math.isfinite(
        values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32).item()
    )


def _not_finite(values: Tensor) -> Tensor:
    """Return the indices of numbers that are NaN or infinite."""
    wide = values.float() if values.dtype.itemsize == 1 else values
    return torch.isfinite(wide).logical_not_().nonzero().view(-1)


def _even_rows(rows: Tensor) -> tuple[list[int], list[int]]:
    """Return the rows of zeros, and the rows of one other number."""
    sample = _probed(rows, PROBED_COLUMNS).float()
    likely = (sample == sample[:, :1]).all(dim=1).nonzero().view(-1)
    if not len(likely):
        return [], []
    whole = rows[likely].float()
    is_even = (whole == whole[:, :1]).all(dim=1)
    is_zero = is_even & (whole[:, 0] == 0)
    return likely[is_zero].tolist(), likely[is_even & ~is_zero].tolist()


def _row_keys(rows: Tensor) -> Tensor:
    """Return 32 bytes of each row, (rows, 4) int64: KEY_COLUMNS columns, narrowed to 16 bits each."""
    narrow = torch.empty((len(rows), KEY_COLUMNS), dtype=torch.bfloat16)
    return narrow.copy_(_probed(rows, KEY_COLUMNS)).view(torch.int64)


def _probed(rows: Tensor, count: int) -> Tensor:
    """Return some columns of rows, spread evenly, as a view."""
    return rows[:, :: max(1, rows.shape[1] // count)][:, :count]


def _groups(keys: Tensor) -> list[list[int]]:
    """Return the rows whose keys are the same, in groups of two or more."""
    # Equal rows give equal sums; of others that do, the rows are compared.
    mixed = torch.zeros(len(keys), dtype=torch.int64)
    for place, factor in enumerate(KEY_FACTORS):
        mixed += keys[:, place] * factor
    order = torch.argsort(mixed, stable=True)
    is_same = mixed[order[1:]] == mixed[order[:-1]]
    groups: list[list[int]] = []
    previous = None
    for place in is_same.nonzero().view(-1).tolist():
        if previous == place - 1:
            groups[-1].append(int(order[place + 1]))
        else:
            groups.append([int(order[place]), int(order[place + 1])])
        previous = place
    return groups
