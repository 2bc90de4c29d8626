"""Writes safetensors files with one tensor in memory at a time.

Headers follow from names, dtypes and shapes alone, so they are written first and each tensor is
asked for its bytes when its turn comes.

Invariant: a file appears under its name only when it is complete, on disk and verified, and the index
only after all its shards. Every file is written under a temporary name first (`aside.py`); an error or
an interrupt leaves the folder as it was.

Cost: one tensor of memory, one pass over the bytes, room on disk for all of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from hanok.checkpoint.aside import Batch
from hanok.checkpoint.safetensors import DTYPE_BITS, LENGTH_BYTES, count_elements
from hanok.errors import CheckpointError, OptionError

MAX_SHARD_BYTES = 5 * 10**9
METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""Older versions of transformers refuse a file without it."""
HEADER_ALIGNMENT = 8
CHUNK_BYTES = 2**24
OnShard = Callable[[Path, str], None]
"""Called with a complete file, where it is until all are renamed, and the name it will have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorData:
    """One tensor to be written; `read` is called once, and its bytes are dropped after writing."""

    name: str
    dtype: str
    """Spelled as in safetensors; a key of `DTYPE_BITS`."""
    shape: tuple[int, ...]
    read: Callable[[], bytes | bytearray | memoryview]
    """Returns the bytes in C order, little endian."""

    @property
    def size_bytes(self) -> int:
        """What `read` must return."""
        return count_elements(self.shape, repr(self.name)) * DTYPE_BITS[self.dtype] // 8


def write_safetensors(
    folder: Path,
    tensors: Sequence[TensorData],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] = METADATA,
    progress: Callable[[int], None] | None = None,
    verify: Callable[[Sequence[Path]], None] | None = None,
    on_shard: OnShard | None = None,
) -> tuple[Path, ...]:
    """Write the tensors to `folder` and return the files, the index last if there is one.

    Shards are filled in the given order; a tensor larger than `max_shard_bytes` gets one of its
    own. `progress` is called with the bytes written since its last call. `verify` gets the safetensors
    files before they are renamed; if it raises, nothing remains. `on_shard` gets each file once it is
    complete. Names given twice, an unknown dtype, or a `read` of another length are a CheckpointError.
    """
    if max_shard_bytes < 1:
        raise OptionError(f"max_shard_bytes is {max_shard_bytes}, and must be at least 1")
    _check_tensors(folder, tensors)
    shards = _fill_shards(tensors, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if (folder / "model.safetensors").exists():
            raise CheckpointError(
                f"{folder}: holds model.safetensors, which readers would take instead of the "
                f"{len(shards)} shards to be written; remove it or choose another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Batch() as batch:
            for name, shard in zip(names, shards, strict=True):
                with batch.open(folder / name) as file:
                    _write_shard(file, shard, metadata, progress)
                if on_shard is not None:
                    on_shard(batch.waiting[folder / name], name)
            if verify is not None:
                verify(tuple(batch.waiting.values()))
            if len(shards) > 1:
                with batch.open(folder / "model.safetensors.index.json") as file:
                    file.write(json_bytes(_index(names, shards)))
            return batch.publish()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error


def write_tensors(path: Path, tensors: Sequence[TensorData]) -> None:
    """Write the tensors to one file, all of them or nothing."""
    _check_tensors(path.parent, tensors)
    try:
        with Batch() as batch:
            with batch.open(path) as file:
                _write_shard(file, tensors, METADATA, None)
            batch.publish()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def in_reading_order(
    tensors: Sequence[TensorData], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[TensorData]:
    """Return the tensors in the order in which `write_safetensors` reads them."""
    return [
        tensor
        for shard in _fill_shards(tensors, max_shard_bytes)
        for tensor in _in_file_order(shard)
    ]


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, all of it or nothing."""
    write_bytes(path, json_bytes(value))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, all of it or nothing."""
    try:
        with Batch() as batch:
            with batch.open(path) as file:
                file.write(data)
            batch.publish()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def _check_tensors(folder: Path, tensors: Sequence[TensorData]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        where = f"{folder}: tensor {tensor.name!r} cannot be written:"
        if tensor.name in names or tensor.name == "__metadata__":
            raise CheckpointError(f"{where} the name is given twice or reserved by the format")
        names.add(tensor.name)
        if tensor.dtype not in DTYPE_BITS:
            raise CheckpointError(
                f"{where} dtype {tensor.dtype!r} is not one of {', '.join(DTYPE_BITS)}"
            )
        if any(extent < 0 for extent in tensor.shape):
            raise CheckpointError(f"{where} the shape {tensor.shape} has a negative extent")
        if count_elements(tensor.shape, where) * DTYPE_BITS[tensor.dtype] % 8:
            raise CheckpointError(
                f"{where} {tensor.dtype} of shape {tensor.shape} is not a whole number of bytes"
            )


def _fill_shards(tensors: Sequence[TensorData], max_shard_bytes: int) -> list[list[TensorData]]:
    """Return the tensors of each file, in the given order; without tensors, one empty file."""
    shards: list[list[TensorData]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if tensor.size_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size_bytes
    return shards


def _in_file_order(tensors: Sequence[TensorData]) -> list[TensorData]:
    """Widest elements first: then every tensor starts at a multiple of its element size."""
    return sorted(tensors, key=lambda tensor: (-DTYPE_BITS[tensor.dtype], tensor.name))


def _write_shard(
    file: BinaryIO,
    tensors: Sequence[TensorData],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None,
) -> None:
    ordered = _in_file_order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for tensor in ordered:
        end = begin + tensor.size_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % HEADER_ALIGNMENT)
    file.write(len(raw).to_bytes(LENGTH_BYTES, "little") + raw)
    for tensor in ordered:
        data = memoryview(tensor.read()).cast("B")
        if len(data) != tensor.size_bytes:
            raise CheckpointError(
                f"tensor {tensor.name!r} of dtype {tensor.dtype} and shape {tensor.shape} needs "
                f"{tensor.size_bytes} bytes, and its source gave {len(data)}; nothing was written"
            )
        for start in range(0, len(data), CHUNK_BYTES):
            count = file.write(data[start : start + CHUNK_BYTES])
            if progress is not None:
                progress(count)


def _index(names: Sequence[str], shards: Sequence[Sequence[TensorData]]) -> dict[str, Any]:
    pairs = [(t, name) for name, shard in zip(names, shards, strict=True) for t in shard]
    return {
        "metadata": {"total_size": sum(tensor.size_bytes for tensor, _ in pairs)},
        "weight_map": {
            tensor.name: name for tensor, name in sorted(pairs, key=lambda p: p[0].name)
        },
    }


def json_bytes(value: Any) -> bytes:
    """Return `value` as the indented JSON of these files."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
