"""Adapters of one product as our kernel takes them, and its gradient.

With gradients the kernel runs forward, as it serves; backward torch multiplies, in float32 where that is
faster. Nothing but x is kept: A x is computed again.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hanok.kernels.native import FLOATS, LoraCall, LoraPart, Native
from hanok.kernels.processor import multiplies


class TablePart(NamedTuple):
    """What one adapter adds to some rows of a product: scale x B A.

    a: (rank, in)   b: (rows, rank), its columns one after the other in memory (`by_columns`).
    """

    number: int
    first_row: int
    a: Tensor
    b: Tensor
    scale: float


def by_columns(b: Tensor) -> Tensor:
    """Return a matrix with its columns one after the other in memory; itself if they are."""
    return b if b.t().is_contiguous() else b.t().contiguous().t()


class LoraTable:
    """The adapters of one product with a weight (rows, columns), for `Native.add_lora`.

    All parts of an adapter follow one another, and all numbers are of one dtype.
    """

    def __init__(self, parts: Sequence[TablePart], rows: int, columns: int) -> None:
        for part in parts:
            _check(part, parts[0].a.dtype, rows, columns)
        self._dtype = parts[0].a.dtype if parts else None
        self._kept = parts
        self._parts = (LoraPart * len(parts))(*map(_described, parts))
        self._call = LoraCall(ctypes.addressof(self._parts), len(parts), rows, columns)

    def add(self, kernels: Native, x: Tensor, chosen: Tensor, product: Tensor) -> None:
        """Add to the product of x what its tokens' adapters add; see `Native.add_lora`."""
        if self._dtype not in (None, x.dtype) and x.dtype == product.dtype:
            raise ValueError(f"x and the adapters differ: {x.dtype} and {self._dtype}")
        kernels.add_lora(self._call, x, chosen, product, self._kept, self._parts)


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """Return why the kernel does not take these numbers, or None when it does."""
    for item in tensors:
        if type(item) not in (Tensor, nn.Parameter):
            return f"a {type(item).__name__} is no plain tensor"
        if item.dtype not in FLOATS or not item.is_cpu:
            return f"it multiplies bfloat16 and float32 on a CPU, not {item.dtype} on {item.device}"
    return None


def _check(part: TablePart, dtype: torch.dtype, rows: int, columns: int) -> None:
    a, b = part.a, part.b
    is_one = a.dtype == b.dtype == dtype and a.is_contiguous() and by_columns(b) is b
    if not is_one or a.shape != (b.shape[1], columns):
        raise ValueError(f"A is {a.dtype} {tuple(a.shape)} and B {b.dtype} {tuple(b.shape)}")
    if not 0 <= part.first_row <= rows - len(b):
        raise ValueError(f"rows {part.first_row} to {part.first_row + len(b)} of {rows}")


def _described(part: TablePart) -> LoraPart:
    rows, rank = part.b.shape
    places = part.a.data_ptr(), part.b.data_ptr()
    return LoraPart(*places, part.number, part.first_row, rows, rank, part.scale)


def add_differentiably(
    kernels: Native,
    x: Tensor,
    product: Tensor,
    a: Tensor,
    bs: Sequence[Tensor],
    first_rows: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """Return the product, changed in place, with what one adapter adds to every token; differentiable.

    x: (tokens, in)   product: (tokens, out)   a: (ranks, in), the parts' A   bs: (rows, rank) of each
    part, which is for the rows from `first_rows` on.
    """
    found: Tensor = _AddLora.apply(x, product, kernels, first_rows, scales, a, *bs)  # type: ignore[no-untyped-call]  # torch's
    return found


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        product: Tensor,
        kernels: Native,
        first_rows: Sequence[int],
        scales: Sequence[float],
        a: Tensor,
        *bs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, a, *bs)
        ctx.mark_dirty(product)
        ctx.first_rows, ctx.scales = first_rows, scales
        inner = a.to(x.dtype).split([b.shape[1] for b in bs])  # type: ignore[no-untyped-call]  # torch's
        parts = [
            TablePart(0, first_row, part, by_columns(b.to(x.dtype)), scale)
            for first_row, part, b, scale in zip(first_rows, inner, bs, scales, strict=True)
        ]
        table = LoraTable(parts, product.shape[1], x.shape[1])
        table.add(kernels, x, x.new_zeros(len(x), dtype=torch.int64), product)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, a, *bs = ctx.saved_tensors
        dtype = x.dtype if multiplies(x.dtype, x.device) else torch.float32
        wide, fast_x, fast_a = gradient.to(dtype), x.to(dtype), a.to(dtype)
        ranks = [b.shape[1] for b in bs]
        inner = (fast_x @ fast_a.t()).split(ranks, dim=1)
        of_inner, of_bs = torch.empty(len(x), len(a), dtype=dtype), []
        for index, part in enumerate(of_inner.split(ranks, dim=1)):  # type: ignore[no-untyped-call]  # torch's
            b, first, scale = bs[index], ctx.first_rows[index], ctx.scales[index]
            mine = wide[:, first : first + b.shape[0]]
            torch.mul(mine @ b.to(dtype), scale, out=part)
            of_bs.append(((mine.t() @ inner[index]) * scale).to(b.dtype))
        of_x = (of_inner @ fast_a).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_a = (of_inner.t() @ fast_x).to(a.dtype)
        return of_x, gradient, None, None, None, of_a, *of_bs
