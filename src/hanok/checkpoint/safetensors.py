"""The safetensors file format: where each tensor lies, known from the header alone.

A file is an 8-byte little-endian length, a JSON header of that length and one byte buffer. The
header gives every tensor a dtype, a shape and a byte range of the buffer.

Invariant: a `TensorRef` returned from here lies inside its file, its byte count is that of its
dtype and shape, and the ranges of a file cover the buffer exactly once. Whatever breaks this is a
`CheckpointError`; a damaged header raises nothing else.

Cost: one read of the header; no tensor data is touched. Format: github.com/huggingface/safetensors.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanok.errors import CheckpointError

DTYPE_BITS: Mapping[str, int] = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits of one element, by safetensors dtype name."""

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 2**63
LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """One tensor inside a file, not read yet."""

    name: str
    dtype: str
    """Spelled as in safetensors, such as "BF16"; a key of `DTYPE_BITS`."""
    shape: tuple[int, ...]
    path: Path
    offset_bytes: int
    """Of the first element, counted from the start of the file."""
    size_bytes: int
    """From the first element to the end of the last one used."""
    strides: tuple[int, ...] | None = None
    """In elements, or None for C order without gaps."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensor once written in C order without gaps."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def read_header(path: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Return the tensors of one safetensors file in header order, and its metadata.

    Any damage is a CheckpointError that names the file, the tensor and the byte counts.
    """
    raw, file_bytes = _read_raw_header(path)
    header = parse_json_object(raw, f"{path}: the safetensors header", is_strict=True)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is what the library reads as none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: __metadata__ of the safetensors header is not a map from strings to strings; "
            "the file was not written by a safetensors library, get it again"
        )
    start = LENGTH_BYTES + len(raw)
    tensors = {name: _tensor_ref(path, name, entry, start) for name, entry in header.items()}
    _check_layout(path, tensors.values(), start, file_bytes)
    return tensors, metadata


def parse_json_object(raw: bytes, what: str, *, is_strict: bool = False) -> dict[str, Any]:
    """Return the JSON object in `raw`; `what` starts the message of every CheckpointError.

    With `is_strict`, one name given twice in an object is an error; otherwise the last one wins.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(
                    f"{what} gives the name {name!r} twice, so it is not clear which one counts"
                )
            found[name] = value
        return found

    if raw.startswith(LFS_MARK):
        raise CheckpointError(
            f"{what} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`"
        )
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique if is_strict else None)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8 text: {error}; the file is damaged") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}; the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is JSON, but a {type(value).__name__} and not an object")
    return value


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    """Return the header bytes and the length of the file in bytes."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            prefix = file.read(LENGTH_BYTES)
            header_bytes = int.from_bytes(prefix, "little")
            is_pointer = prefix == LFS_MARK[:LENGTH_BYTES]
            fits = LENGTH_BYTES + header_bytes <= file_bytes and header_bytes <= MAX_HEADER_BYTES
            raw = file.read(header_bytes) if fits and len(prefix) == LENGTH_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if is_pointer:
        raise CheckpointError(
            f"{path}: is a Git LFS pointer of {file_bytes} bytes and not the weights; "
            "fetch them with `git lfs pull`"
        )
    if file_bytes < LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: holds {file_bytes} bytes, fewer than the {LENGTH_BYTES} of the length that "
            "starts a safetensors file; get the file again"
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: announces a header of {header_bytes} bytes, above the limit of "
            f"{MAX_HEADER_BYTES}; the file is damaged or no safetensors file"
        )
    if not fits or len(raw) != header_bytes:
        raise CheckpointError(
            f"{path}: announces a header of {header_bytes} bytes, but the file ends after "
            f"{file_bytes} bytes; a download was probably cut off, get the file again"
        )
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the safetensors header is not JSON: it starts with {raw[:8]!r} and not "
            "with '{'; the file is damaged or no safetensors file"
        )
    return raw, file_bytes


def _tensor_ref(path: Path, name: str, entry: Any, start: int) -> TensorRef:
    """Return the checked entry of one tensor; `start` is the first byte of the buffer."""
    where = f"{path}: tensor {name!r}"
    if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise CheckpointError(f"{where} has a name with half a surrogate pair, which is not text")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise CheckpointError(
            f"{where} must have dtype, shape and data_offsets, and has {found}; the file is damaged"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        near = difflib.get_close_matches(str(dtype), DTYPE_BITS, n=3) or list(DTYPE_BITS)
        raise CheckpointError(
            f"{where} has the unknown dtype {dtype!r}; near names are {', '.join(near)}"
        )
    if not _is_naturals(shape):
        raise CheckpointError(f"{where} has the shape {shape!r}, not a list of integers >= 0")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has the data_offsets {offsets!r}, not [begin, end] with 0 <= begin <= end"
        )
    bits = count_elements(shape, where) * DTYPE_BITS[dtype]
    size_bytes = offsets[1] - offsets[0]
    if bits != 8 * size_bytes:
        raise CheckpointError(
            f"{where} of dtype {dtype} and shape {shape} needs {bits / 8:.16g} bytes, but "
            f"data_offsets {offsets} give it {size_bytes}"
        )
    return TensorRef(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        path=path,
        offset_bytes=start + offsets[0],
        size_bytes=size_bytes,
    )


def count_elements(shape: Iterable[int], where: str) -> int:
    """Return the product of `shape`; one of 2**63 or more is a CheckpointError."""
    count, largest = 1, 0
    for extent in shape:
        count *= extent
        largest = max(largest, extent, count)
        if largest >= MAX_ELEMENTS:
            raise CheckpointError(
                f"{where} has the shape {list(shape)!r:.200}, which is 2**63 elements or more"
            )
    return count


def _is_naturals(value: Any) -> bool:
    # bool is an int to Python and `true` is not one to the format.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, refs: Iterable[TensorRef], start: int, file_bytes: int) -> None:
    """Refuse ranges past the end of the file, overlaps and bytes that belong to no tensor."""
    ordered = sorted(refs, key=lambda ref: (ref.offset_bytes, ref.size_bytes))
    needed = max((ref.offset_bytes + ref.size_bytes for ref in ordered), default=start)
    reached, previous = start, "the header"
    for ref in ordered:
        end = ref.offset_bytes + ref.size_bytes
        if end > file_bytes:
            raise CheckpointError(
                f"{path}: tensor {ref.name!r} ends at byte {end}, but the file holds {file_bytes} "
                f"of the {needed} bytes that its header promises; a download was probably cut "
                "off, get the file again"
            )
        if ref.offset_bytes < reached:
            raise CheckpointError(
                f"{path}: tensor {ref.name!r} starts at byte {ref.offset_bytes} and overlaps "
                f"{previous}, which ends at byte {reached}; the file is damaged"
            )
        if ref.offset_bytes > reached:
            raise CheckpointError(
                f"{path}: a hole of {ref.offset_bytes - reached} bytes lies between {previous}, "
                f"which ends at byte {reached}, and tensor {ref.name!r}; the file is damaged"
            )
        reached, previous = end, f"tensor {ref.name!r}"
    if reached != file_bytes:
        raise CheckpointError(
            f"{path}: a hole of {file_bytes - reached} bytes follows {previous}: the header "
            f"promises {reached} bytes and the file holds {file_bytes}; the file is damaged"
        )
