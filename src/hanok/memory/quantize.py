"""Quantizes weights while they are read: rows go from the file through a small buffer into their place.

No weight is ever in memory twice: besides the quantized model a thread holds one chunk of CHUNK_BYTES,
or one tensor where a file keeps it in another order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from hanok.checkpoint.files import TensorRef
from hanok.errors import CheckpointError
from hanok.memory.needs import CHUNK_BYTES
from hanok.memory.tensors import DTYPE_NAMES, dtype_of, from_file_order, read_into
from hanok.models.decoder import Decoder
from hanok.models.family import Source
from hanok.models.linear import Embedding, Weighted
from hanok.quant.base import QuantMethod, StoredWeight, choose_layout
from hanok.quant.recipe import Recipe

CHUNK_MULTIPLE = 64  # rows; a multiple of what any layout keeps together


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedSource:
    """A weight that is quantized while it is read."""

    source: Source
    stored: StoredWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """What a decoder's weights become: quantized ones, and those that stay, by parameter."""

    quantized: tuple[QuantizedSource, ...]
    floats: Mapping[str, Source]


def swap(
    decoder: Decoder,
    table: Mapping[str, Source],
    recipe: Recipe | None,
    device_of: Callable[[str], torch.device],
    dtype: torch.dtype,
) -> Swapped:
    """Put quantized modules in the places that the recipe names, their memory claimed and empty.

    `device_of` says where a parameter will be.
    """
    if recipe is None:
        return Swapped(quantized=(), floats=table)
    quantized: list[QuantizedSource] = []
    floats: dict[str, Source] = {}
    is_tied = decoder.config.tie_embeddings

    def put(path: str, method: QuantMethod, source: Source) -> StoredWeight:
        rows, columns = source.shape
        device = device_of(path)
        stored = choose_layout(method.format, device).empty(
            method.format, (rows, columns), device, method
        )
        quantized.append(QuantizedSource(source=source, stored=stored))
        set_weight(decoder, path, stored, dtype)
        return stored

    for name, source in table.items():
        method = recipe.method_for(name, is_tied=is_tied)
        path = name.removesuffix(".weight")
        if method is None:
            floats[name] = source
        else:
            stored = put(path, method, source)
            if is_tied and path == "embed_tokens" and recipe.shares_embedding:
                set_weight(decoder, "lm_head", stored, dtype)
    if is_tied and not recipe.shares_embedding:
        source = table["embed_tokens.weight"]
        if recipe.head is not None:
            put("lm_head", recipe.head, source)
        elif recipe.embedding is not None:
            floats["lm_head.weight"] = source
    return Swapped(quantized=tuple(quantized), floats=floats)


def set_weight(decoder: Decoder, path: str, stored: StoredWeight, dtype: torch.dtype) -> None:
    """Let the module at `path` have this weight; an embedding's rows are looked up in `dtype`."""
    module = decoder.get_submodule(path)
    if isinstance(module, Embedding):
        module.like = module.like.to(dtype)
    if isinstance(module, Weighted):
        module.set_weight(stored)


def quantize_source(tensors: Mapping[str, TensorRef], item: QuantizedSource) -> int:
    """Read and quantize a weight into its place; return its bytes there."""
    source, stored = item.source, item.stored
    refs = [tensors[name] for name in source.names]
    if source.layout != "rows" or any(ref.strides is not None for ref in refs):
        stored.write_rows(0, _whole(refs, source))
    else:
        _quantize_rows(refs, source, stored)
    stored.finish()
    _check_range(refs, stored)
    return stored.nbytes


def _check_range(refs: list[TensorRef], stored: StoredWeight) -> None:
    """Refuse weights whose scales are infinite or no numbers: so would be every score."""
    scales = [part for part in stored.parts if part.dtype in (torch.float16, torch.float32)]
    if not all(bool(scale.isfinite().all()) for scale in scales):
        names = " and ".join(ref.name for ref in refs)
        name = "the codes" if stored.method is None else stored.method.name
        raise CheckpointError(
            f"{refs[0].path}: {names} have values too large for the {DTYPE_NAMES[scales[0].dtype]} "
            f"scales of {name}, or that are no numbers. Load without quant, or with a "
            "method that has float32 scales (fp8, nf4, int8-outlier)."
        )


def _whole(refs: list[TensorRef], source: Source) -> Tensor:
    """Return a weight in our order and the file's dtype, or float32 where files mix them."""
    dtype = _common_dtype(refs)
    parts = []
    for ref, shape in zip(refs, source.file_shapes(), strict=True):
        part = torch.empty(shape, dtype=dtype)
        read_into(ref, part)
        parts.append(part)
    if source.layout != "rows":
        return from_file_order(parts[0], source).contiguous()
    return torch.cat(parts)


def _quantize_rows(refs: list[TensorRef], source: Source, stored: StoredWeight) -> None:
    """Read as many rows at a time as fit the buffer, over the borders of the parts."""
    rows, columns = source.shape
    dtype = _common_dtype(refs)
    fitting = CHUNK_BYTES // max(1, columns * dtype.itemsize)
    count = max(1, fitting // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    buffer = torch.empty(min(count, rows), columns, dtype=dtype)
    ends = list(accumulate(source.rows))
    for first in range(0, rows, count):
        last = min(first + count, rows)
        for ref, end, size in zip(refs, ends, source.rows, strict=True):
            begin = end - size
            low, high = max(first, begin), min(last, end)
            if low < high:
                part = _rows_of(ref, low - begin, high - begin, columns)
                read_into(part, buffer[low - first : high - first])
        stored.write_rows(first, buffer[: last - first])


def _rows_of(ref: TensorRef, first: int, last: int, columns: int) -> TensorRef:
    """Return the place of some rows of a contiguous tensor."""
    row_bytes = columns * dtype_of(ref).itemsize
    return replace(
        ref,
        shape=(last - first, columns),
        offset_bytes=ref.offset_bytes + first * row_bytes,
        size_bytes=(last - first) * row_bytes,
    )


def _common_dtype(refs: list[TensorRef]) -> torch.dtype:
    """Return the dtype to read into: bfloat16 where all are, else float32, which holds the others."""
    is_bfloat16 = all(dtype_of(ref) is torch.bfloat16 for ref in refs)
    return torch.bfloat16 if is_bfloat16 else torch.float32
