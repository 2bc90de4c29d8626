"""RMSNorm (arXiv 1910.07467) on a GPU in one pass, with the residual added before it. Imports triton.

One program reads a row once: x, perhaps the residual, their sum out, the normed sum out. Sums are
float32. The sum is rounded to x's dtype before it is normed, as it is where the two run apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SIZE = 2**16  # of a row: it is held in registers


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    added,
    output,
    x_stride,
    residual_stride,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        other = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(added + row * size + column, value, mask=mask)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    result = (wide * scale * factor).to(output.dtype.element_ty)
    tl.store(output + row * size + column, result, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Return x / rms(x) * weight, or * (1 + weight) with `unit_offset`.

    x: (…, size) of any strides   weight: (size,)   returns: (…, size) in x's dtype
    """
    return _normed(x, None, weight, eps, unit_offset=unit_offset)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Return rms_norm(x + residual), and x + residual, each as `rms_norm` returns it."""
    if residual.shape != x.shape or residual.dtype is not x.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}"
        )
    return _normed(x, residual, weight, eps, unit_offset=unit_offset)


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    if weight.shape != (size,) or size > MAX_SIZE:
        raise ValueError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; a row has up to {MAX_SIZE} numbers"
        )
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    added = x if residual is None else torch.empty_like(output)
    rows = _rows(x, size)
    other = rows if residual is None else _rows(residual, size)
    if output.numel():
        block = triton.next_power_of_2(size)
        with torch.cuda.device_of(x):
            _rms_norm[(len(rows),)](
                rows,
                other,
                weight,
                added,
                output,
                rows.stride(0),
                other.stride(0),
                size,
                eps,
                HAS_RESIDUAL=residual is not None,
                UNIT_OFFSET=unit_offset,
                BLOCK=block,
                num_warps=max(1, min(16, block // 512)),
                enable_fp_fusion=True,
            )
    return output, added


def _rows(x: Tensor, size: int) -> Tensor:
    """Return x as (rows, size), its numbers side by side: a view where that can be."""
    rows = x.reshape(-1, size)
    return rows if rows.stride(1) == 1 else rows.contiguous()
