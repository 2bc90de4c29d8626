"""Elementwise kernels between products on a GPU, one pass over the data each: norm, rotation, gate.

torch needs five kernels for a rotation, two for a gate, and a block of threads per row for a norm; for
one token their launches take longer than reading the data. All compute in float32 and round once, so a
result may differ from torch's, which rounds in between, by a unit in the last place. Imports triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SIZE = 2**16  # of a row to normalize: it is held in registers
TILE = 1024  # numbers of one program of `_gate`
ROTATED_HEADS = 8  # heads of one program of `_rotate`


@triton.jit
def _rms_norm(
    x,
    weight,
    output,
    x_stride,
    size,
    eps,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    wide = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    result = (wide * scale * factor).to(output.dtype.element_ty)
    tl.store(output + row * size + column, result, mask=mask)


@triton.jit
def _rotate(
    heads,
    cos,
    sin,
    output,
    token_stride,
    num_heads,
    cos_stride,
    ROTARY_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Some heads of one token; components from ROTARY_DIM on are copied."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_DIM)
    mask = (head < num_heads)[:, None] & (dim < HEAD_DIM)[None, :]
    is_rotated = dim < ROTARY_DIM
    # Each component's partner; its product with the sine is subtracted for the first of a pair.
    if IS_INTERLEAVED:
        is_first = dim % 2 == 0
        pair = tl.where(is_first, dim + 1, dim - 1)
    else:
        is_first = dim < ROTARY_DIM // 2
        pair = tl.where(is_first, dim + ROTARY_DIM // 2, dim - ROTARY_DIM // 2)
    row = heads + token * token_stride + head[:, None] * HEAD_DIM
    value = tl.load(row + dim[None, :], mask=mask, other=0.0)
    other = tl.load(row + pair[None, :], mask=mask & is_rotated[None, :], other=0.0)
    angle = token * cos_stride + dim
    cosine = tl.load(cos + angle, mask=is_rotated, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=is_rotated, other=0.0).to(tl.float32)
    sine = tl.where(is_first, -sine, sine)
    rotated = value.to(tl.float32) * cosine[None, :] + other.to(tl.float32) * sine[None, :]
    place = output + (token * num_heads + head[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(place, rotated.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoid(x):
    shrunk = tl.exp(-tl.abs(x))  # of both signs: no exponential overflows
    return tl.where(x >= 0, 1.0, shrunk) / (1.0 + shrunk)


@triton.jit
def _gate(
    gate_up,
    output,
    size,
    IS_SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """activation(gate) * up of a part of one row; gate and up are its halves."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=mask, other=0.0).to(tl.float32)
    if IS_SILU:
        active = gate * _sigmoid(gate)
    else:  # GELU by tanh: (1 + tanh(y)) / 2 is the sigmoid of 2 y
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * _sigmoid(2.0 * inner)
    tl.store(output + row * size + column, (active * up).to(output.dtype.element_ty), mask=mask)


class TritonElementwise:
    """See `hanok.kernels.fused.Fused`."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
        """Return x / rms(x) * weight, or * (1 + weight) with `unit_offset` (arXiv 1910.07467).

        x: (…, size) of any strides   weight: (size,)   returns: (…, size) in x's dtype
        """
        size = x.shape[-1]
        if weight.shape != (size,) or size > MAX_SIZE:
            raise ValueError(
                f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; a row has up to {MAX_SIZE} "
                "numbers"
            )
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows = x.reshape(-1, size)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        block = triton.next_power_of_2(size)
        numbers = (rows, weight, output, rows.stride(0), size, eps)
        warps = max(1, min(16, block // 512))
        constants = {"UNIT_OFFSET": unit_offset, "BLOCK": block}
        _launch(_rms_norm, (len(rows),), numbers, constants, warps)
        return output

    def rotate(self, heads: Tensor, cos_sin: Tensor, *, is_interleaved: bool) -> Tensor:
        """Return heads rotated by their positions' angles; components past rotary_dim are kept.

        heads: (tokens, heads, head_dim), dense but for the tokens' stride
        cos_sin: (2, tokens, 1, rotary_dim)   returns: as heads, dense
        """
        tokens, num_heads, head_dim = heads.shape
        if cos_sin.shape[:3] != (2, tokens, 1) or cos_sin.shape[3] > head_dim:
            raise ValueError(f"heads are {tuple(heads.shape)}, cos_sin {tuple(cos_sin.shape)}")
        if heads.stride()[1:] != (head_dim, 1):
            heads = heads.contiguous()
        if cos_sin.stride(3) != 1:
            cos_sin = cos_sin.contiguous()
        output = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        block = min(ROTATED_HEADS, triton.next_power_of_2(num_heads))
        cos, sin = cos_sin
        numbers = (heads, cos, sin, output, heads.stride(0), num_heads, cos.stride(0))
        constants = {"ROTARY_DIM": cos.shape[2], "HEAD_DIM": head_dim, "BLOCK_HEADS": block}
        constants |= {
            "IS_INTERLEAVED": is_interleaved,
            "BLOCK_DIM": triton.next_power_of_2(head_dim),
        }
        _launch(_rotate, (tokens, triton.cdiv(num_heads, block)), numbers, constants, warps=4)
        return output

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """Return activation(gate) * up, (tokens, size), of gate and up side by side: (tokens, 2 size).

        `activation` is "silu" or "gelu_tanh".
        """
        if activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation {activation!r} has no kernel")
        gate_up = gate_up.contiguous()
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        output = gate_up.new_empty(tokens, size)
        constants = {"IS_SILU": activation == "silu", "BLOCK": TILE}
        _launch(
            _gate, (tokens, triton.cdiv(size, TILE)), (gate_up, output, size), constants, warps=4
        )
        return output


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
) -> None:
    if 0 in grid:
        return
    with torch.cuda.device_of(numbers[0]):
        kernel[grid](*numbers, **constants, num_warps=warps, enable_fp_fusion=True)


FUSED = TritonElementwise()
