"""Products with quantized weights on a GPU, in Triton. Importing this file imports triton.

A row of codes is made of units of 16 bytes, what one thread loads at once. In 8 bits a unit is 16
columns in turn; in 4 bits it is 32, columns 0 to 15 in the low halves of the bytes and 16 to 31 in the
high ones, so that both halves meet consecutive numbers of x and share their scale. Codes are unsigned.
Scales and zeros are (out, groups), row after row like the codes: neighbouring threads read neighbours.

A whole number u of b bits becomes a float without a conversion, which a GPU does at a quarter of the
speed of a sum: put at the top of the mantissa of 1.0 it reads 1 + u / 2^b. A weight is then
a * raw - b with a = scale * 2^b and b = scale * (2^b + zero), both once for each unit.

No sum depends on the order in which programs finish: partial sums of a product split over columns go to
separate memory and are added up in a fixed order.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT_BYTES = tl.constexpr(16)
NESTED_BLOCK = tl.constexpr(256)
LARGE_SHARED_BYTES = 2**17  # data-center GPUs since A100 have more, all others less

Kind = Literal["integer", "codebook", "float8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """Scales that are themselves codes: codebook[code] * absmax[block of 256] + offset."""

    codebook: Tensor  # (256,) float32
    absmax: Tensor  # (blocks,) float32
    offset: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight (out, in) as the kernels read it."""

    kind: Kind
    bits: int  # 4 or 8
    columns: int
    group_size: int  # columns that share a scale, a multiple of a unit's
    codes: Tensor  # (out, units * 16) uint8
    scale: Tensor  # (out, groups) float16 or float32; uint8 where `nested` is given
    middle: int  # the zero of all groups where there is no `zero`
    zero: Tensor | None = None  # (out, groups) uint8
    codebook: Tensor | None = None  # (16,) float32
    nested: Nested | None = None

    @property
    def rows(self) -> int:
        """Out features."""
        return self.codes.shape[0]

    @property
    def unit_columns(self) -> int:
        """Columns of 16 bytes of codes."""
        return 128 // self.bits

    @property
    def units(self) -> int:
        """Units of a row."""
        return self.codes.shape[1] // 16


@triton.jit
def _raw(codes, codebook, KIND: tl.constexpr, BITS: tl.constexpr):
    """Return the raw values, float32, that `_affine`'s factors turn into weights."""
    if KIND == "codebook":
        raw = tl.load(codebook + codes.to(tl.int32))
    elif KIND == "float8":
        # e4m3's fields at the places of float16's, whose exponents are 8 more: 2^-8 of the value.
        wide = codes.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        raw = half.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        mantissa = (codes.to(tl.uint32) << (23 - BITS)) | 0x3F800000
        raw = mantissa.to(tl.float32, bitcast=True)
    return raw


@triton.jit
def _affine(
    scale,
    zero,
    nested_codebook,
    absmax,
    offset,
    index,
    mask,
    MIDDLE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_NESTED: tl.constexpr,
):
    """Return a and b of w = a * raw - b for the groups at `index` of (out, groups)."""
    if IS_NESTED:
        code = tl.load(scale + index, mask=mask, other=0).to(tl.int32)
        largest = tl.load(absmax + index // NESTED_BLOCK, mask=mask, other=0.0)
        factor = tl.load(nested_codebook + code) * largest + offset
    else:
        factor = tl.load(scale + index, mask=mask, other=0.0).to(tl.float32)
    if KIND == "codebook":
        a, b = factor, tl.zeros_like(factor)
    elif KIND == "float8":
        a, b = factor * 256.0, tl.zeros_like(factor)
    else:
        steps: tl.constexpr = 1 << BITS
        a, b = factor * steps, factor * (MIDDLE + steps)
        if HAS_ZERO:
            b += factor * tl.load(zero + index, mask=mask, other=0).to(tl.float32)
    return a, b


@triton.jit
def _field(words, SHIFT: tl.constexpr, codebook, KIND: tl.constexpr, BITS: tl.constexpr):
    """Return `_raw` of the codes SHIFT bits above the low end of each word."""
    if KIND == "integer":
        left: tl.constexpr = 23 - BITS - SHIFT
        mask: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
        moved = words << left if left >= 0 else words >> -left
        raw = ((moved & mask) | 0x3F800000).to(tl.float32, bitcast=True)
    else:
        raw = _raw((words >> SHIFT) & ((1 << BITS) - 1), codebook, KIND, BITS)
    return raw


@triton.jit
def _gemv(
    x,
    words,
    scale,
    zero,
    codebook,
    nested_codebook,
    absmax,
    offset,
    bias,
    output,
    rows,
    columns,
    units,
    groups,
    group_units,
    units_per_split,
    MIDDLE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """One token: some rows, some of their columns. output: (splits, out). A word is 4 bytes of codes."""
    unit_columns: tl.constexpr = 128 // BITS
    halves: tl.constexpr = 8 // BITS
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = tl.arange(0, 4)
    byte = tl.arange(0, UNIT_BYTES)
    row_mask = row < rows
    start = row.to(tl.int64) * units * 4
    first = tl.program_id(1) * units_per_split
    last = tl.minimum(first + units_per_split, units)
    total = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    for block in range(first, last, BLOCK_UNITS):
        unit = block + tl.arange(0, BLOCK_UNITS)
        unit_mask = unit < last
        mask = row_mask[:, None] & unit_mask[None, :]
        place = start[:, None, None] + unit[None, :, None] * 4 + word[None, None, :]
        code = tl.load(words + place, mask=mask[:, :, None], other=0)
        products = tl.zeros((BLOCK_ROWS, BLOCK_UNITS, 4), tl.float32)
        x_sum = tl.zeros((BLOCK_UNITS,), tl.float32)
        for half in tl.static_range(halves):
            column = unit[:, None] * unit_columns + half * UNIT_BYTES + byte[None, :]
            x_mask = unit_mask[:, None] & (column < columns)
            part = tl.load(x + column, mask=x_mask, other=0.0).to(tl.float32)
            x_sum += tl.sum(part, 1)
            # The numbers of x that meet each of the four bytes of a word, (units, 4) each.
            even, odd = tl.split(tl.reshape(part, (BLOCK_UNITS, 4, 2, 2)))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            products += _field(code, 4 * half, codebook, KIND, BITS) * x0[None, :, :]
            products += _field(code, 8 + 4 * half, codebook, KIND, BITS) * x1[None, :, :]
            products += _field(code, 16 + 4 * half, codebook, KIND, BITS) * x2[None, :, :]
            products += _field(code, 24 + 4 * half, codebook, KIND, BITS) * x3[None, :, :]
        index = row[:, None] * groups + (unit // group_units)[None, :]
        a, b = _affine(
            scale,
            zero,
            nested_codebook,
            absmax,
            offset,
            index,
            mask,
            MIDDLE,
            KIND,
            BITS,
            HAS_ZERO,
            IS_NESTED,
        )
        total += a * tl.sum(products, 2) - b * x_sum[None, :]
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)
    place = output + tl.program_id(1) * rows + row
    tl.store(place, result.to(output.dtype.element_ty), mask=row_mask)


@triton.jit
def _tiles(
    x,
    x_stride,
    codes,
    scale,
    zero,
    codebook,
    nested_codebook,
    absmax,
    offset,
    bias,
    output,
    tokens,
    rows,
    columns,
    units,
    groups,
    group_units,
    units_per_split,
    MIDDLE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Some rows by some tokens, over some columns. output: (splits, tokens, out).

    The weights are the left factor: tensor cores take that from registers, where they are made.
    """
    unit_columns: tl.constexpr = 128 // BITS
    size: tl.constexpr = BLOCK_UNITS * UNIT_BYTES
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    byte = tl.arange(0, UNIT_BYTES)
    flat = tl.arange(0, size)
    row_mask, token_mask = row < rows, token < tokens
    start = row.to(tl.int64) * units * UNIT_BYTES
    x_start = token.to(tl.int64) * x_stride
    first = tl.program_id(2) * units_per_split
    last = tl.minimum(first + units_per_split, units)
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for block in range(first, last, BLOCK_UNITS):
        unit = block + tl.arange(0, BLOCK_UNITS)
        mask = row_mask[:, None] & (unit < last)[None, :]
        place = start[:, None, None] + unit[None, :, None] * UNIT_BYTES + byte[None, None, :]
        code = tl.load(codes + place, mask=mask[:, :, None], other=0)
        index = row[:, None] * groups + (unit // group_units)[None, :]
        a, b = _affine(
            scale,
            zero,
            nested_codebook,
            absmax,
            offset,
            index,
            mask,
            MIDDLE,
            KIND,
            BITS,
            HAS_ZERO,
            IS_NESTED,
        )
        column = (block + flat // UNIT_BYTES) * unit_columns + flat % UNIT_BYTES
        end = tl.minimum(last * unit_columns, columns)
        low = code & 15 if BITS == 4 else code
        weight = a[:, :, None] * _raw(low, codebook, KIND, BITS) - b[:, :, None]
        weight = tl.reshape(weight, (BLOCK_ROWS, size)).to(x.dtype.element_ty)
        x_mask = (column < end)[:, None] & token_mask[None, :]
        right = tl.load(x + x_start[None, :] + column[:, None], mask=x_mask, other=0.0)
        total = tl.dot(weight, right, total, input_precision=PRECISION)
        if BITS == 4:
            weight = a[:, :, None] * _raw(code >> 4, codebook, KIND, BITS) - b[:, :, None]
            weight = tl.reshape(weight, (BLOCK_ROWS, size)).to(x.dtype.element_ty)
            column += UNIT_BYTES
            x_mask = (column < end)[:, None] & token_mask[None, :]
            right = tl.load(x + x_start[None, :] + column[:, None], mask=x_mask, other=0.0)
            total = tl.dot(weight, right, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    result = tl.trans(total).to(output.dtype.element_ty)
    place = (tl.program_id(2) * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(output + place, result, mask=token_mask[:, None] & row_mask[None, :])


@triton.jit
def _merge(partial, bias, output, size, rows, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up partial sums (splits, size) in order; `size` is tokens * out."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    part = partial + place
    for _ in range(splits):
        total += tl.load(part, mask=mask, other=0.0)
        part += size
    if HAS_BIAS:
        total += tl.load(bias + place % rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize(
    ids,
    first,
    codes,
    scale,
    zero,
    codebook,
    nested_codebook,
    absmax,
    offset,
    output,
    count,
    columns,
    units,
    groups,
    group_units,
    MIDDLE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_NESTED: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Rows `ids`, or `count` rows from `first` on. output: (count, in)."""
    unit_columns: tl.constexpr = 128 // BITS
    to = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = to < count
    row = tl.load(ids + to, mask=row_mask, other=0) if HAS_IDS else first + to
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    byte = tl.arange(0, UNIT_BYTES)
    mask = row_mask[:, None] & (unit < units)[None, :]
    start = row.to(tl.int64) * units * UNIT_BYTES
    place = start[:, None, None] + unit[None, :, None] * UNIT_BYTES + byte[None, None, :]
    code = tl.load(codes + place, mask=mask[:, :, None], other=0)
    index = row[:, None] * groups + (unit // group_units)[None, :]
    a, b = _affine(
        scale,
        zero,
        nested_codebook,
        absmax,
        offset,
        index,
        mask,
        MIDDLE,
        KIND,
        BITS,
        HAS_ZERO,
        IS_NESTED,
    )
    column = (unit[:, None] * unit_columns + byte[None, :])[None, :, :]
    target = output + to.to(tl.int64)[:, None, None] * columns + column
    low = code & 15 if BITS == 4 else code
    weight = a[:, :, None] * _raw(low, codebook, KIND, BITS) - b[:, :, None]
    inside = mask[:, :, None] & (column < columns)
    tl.store(target, weight.to(output.dtype.element_ty), mask=inside)
    if BITS == 4:
        weight = a[:, :, None] * _raw(code >> 4, codebook, KIND, BITS) - b[:, :, None]
        inside = mask[:, :, None] & (column + UNIT_BYTES < columns)
        tl.store(target + UNIT_BYTES, weight.to(output.dtype.element_ty), mask=inside)


def gemv(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """(1, in) -> (1, out): every row is read once, by threads that add up in float32."""
    # A thread holds half a unit of each row. Measured on an H200: eight rows of bytes are slower by a
    # third, addresses of looked-up values need twice the registers.
    block_rows = 8 if weight.kind == "integer" and weight.bits == 4 else 4
    block_units = min(64, triton.next_power_of_2(weight.units))
    blocks = triton.cdiv(weight.rows, block_rows)
    splits, units_per_split = _split(weight, blocks, block_units, x.device)
    output = x.new_empty(1, weight.rows)
    partial = output if splits == 1 else _partial(x, splits, weight.rows)
    with torch.cuda.device_of(x):
        words, *rest = _pointers(weight)
        _gemv[(blocks, splits)](
            x,
            words.view(torch.int32),
            *rest,
            bias if bias is not None else x,
            partial,
            weight.rows,
            weight.columns,
            weight.units,
            weight.scale.shape[1],
            weight.group_size // weight.unit_columns,
            units_per_split,
            **_constants(weight),
            HAS_BIAS=bias is not None and splits == 1,
            BLOCK_ROWS=block_rows,
            BLOCK_UNITS=block_units,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output if splits == 1 else _merged(partial, splits, bias, output)


def tiles(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """(tokens, in) -> (tokens, out) on tensor cores, the weights rounded to x's dtype first."""
    tokens = x.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    tile = _tile(x, weight)
    blocks = triton.cdiv(weight.rows, tile.rows)
    token_blocks = triton.cdiv(tokens, tile.tokens)
    splits, units_per_split = _split(weight, blocks * token_blocks, tile.units, x.device)
    output = x.new_empty(tokens, weight.rows)
    partial = output if splits == 1 else _partial(x, splits, output.numel())
    with torch.cuda.device_of(x):
        _tiles[(blocks, token_blocks, splits)](
            x,
            x.stride(0),
            *_pointers(weight),
            bias if bias is not None else x,
            partial,
            tokens,
            weight.rows,
            weight.columns,
            weight.units,
            weight.scale.shape[1],
            weight.group_size // weight.unit_columns,
            units_per_split,
            **_constants(weight),
            HAS_BIAS=bias is not None and splits == 1,
            PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
            BLOCK_ROWS=tile.rows,
            BLOCK_TOKENS=tile.tokens,
            BLOCK_UNITS=tile.units,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return output if splits == 1 else _merged(partial, splits, bias, output)


def dequantize(weight: PackedWeight, first: int, output: Tensor) -> None:
    """Write rows from `first` on to `output`, (count, in) of any float dtype."""
    _write_dequantized(weight, None, first, output)


def dequantize_rows(weight: PackedWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows by their ids, (ids, in)."""
    output = torch.empty(len(ids), weight.columns, dtype=dtype, device=ids.device)
    _write_dequantized(weight, ids.contiguous(), 0, output)
    return output


def _write_dequantized(
    weight: PackedWeight, ids: Tensor | None, first: int, output: Tensor
) -> None:
    if output.numel() == 0:
        return
    block_rows, block_units = 4, min(64, triton.next_power_of_2(weight.units))
    grid = (triton.cdiv(len(output), block_rows), triton.cdiv(weight.units, block_units))
    with torch.cuda.device_of(output):
        _dequantize[grid](
            ids if ids is not None else weight.codes,
            first,
            *_pointers(weight),
            output,
            len(output),
            weight.columns,
            weight.units,
            weight.scale.shape[1],
            weight.group_size // weight.unit_columns,
            **_constants(weight),
            HAS_IDS=ids is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_UNITS=block_units,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _pointers(weight: PackedWeight) -> tuple[Any, ...]:
    """Return codes, scale, zero, codebook, nested codebook, absmax and offset.

    A kernel never reads what the weight does not have, so any tensor serves as a placeholder.
    """
    nested, absent = weight.nested, weight.scale
    return (
        weight.codes,
        weight.scale,
        weight.zero if weight.zero is not None else absent,
        weight.codebook if weight.codebook is not None else absent,
        nested.codebook if nested is not None else absent,
        nested.absmax if nested is not None else absent,
        nested.offset if nested is not None else 0.0,
    )


def _constants(weight: PackedWeight) -> dict[str, object]:
    return {
        "MIDDLE": weight.middle,
        "KIND": weight.kind,
        "BITS": weight.bits,
        "HAS_ZERO": weight.zero is not None,
        "IS_NESTED": weight.nested is not None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """What one program of `_tiles` computes, and with which resources."""

    rows: int
    tokens: int
    units: int
    warps: int
    stages: int  # of loads in flight


def _tile(x: Tensor, weight: PackedWeight) -> _Tile:
    """Return the tile for these tokens: the largest that fits registers and shared memory.

    Every block of tokens dequantizes the weight again, so few large ones are best. Float32 needs twice
    the registers, and looked-up values pass through shared memory.
    """
    is_large = _shared_bytes(x.device) >= LARGE_SHARED_BYTES
    is_small = x.dtype is torch.float32 or (weight.kind == "codebook" and not is_large)
    if len(x) <= 64 or is_small:
        most = 32 if x.dtype is torch.float32 else 64
        size = min(most, max(16, triton.next_power_of_2(len(x))))
        return _Tile(rows=64, tokens=size, units=4, warps=4, stages=3)
    if len(x) <= 128 or not is_large:
        return _Tile(rows=128, tokens=128, units=4, warps=8, stages=2)
    return _Tile(rows=128, tokens=256, units=2, warps=8, stages=3)


def _shared_bytes(device: torch.device) -> int:
    """Return the shared memory of a GPU's multiprocessor."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def _split(
    weight: PackedWeight, programs: int, block_units: int, device: torch.device
) -> tuple[int, int]:
    """Return how many parts the columns are cut into, and the units of each: enough to be busy."""
    is_gpu = device.type == "cuda"
    # A few programs stand for a whole GPU in the interpreter, so that it takes the same paths.
    cores = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 4
    blocks = triton.cdiv(weight.units, block_units)
    blocks_per_split = triton.cdiv(blocks, max(1, min(blocks, 2 * cores // programs)))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split * block_units


def _partial(x: Tensor, splits: int, size: int) -> Tensor:
    return torch.empty(splits, size, dtype=torch.float32, device=x.device)


def _merged(partial: Tensor, splits: int, bias: Tensor | None, output: Tensor) -> Tensor:
    size, block = output.numel(), 512
    with torch.cuda.device_of(output):
        _merge[(triton.cdiv(size, block),)](
            partial,
            bias if bias is not None else partial,
            output,
            size,
            output.shape[1],
            splits,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output
