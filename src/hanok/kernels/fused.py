"""Fused kernels for norm, rotation and gate: our CPU library's or our GPU kernels, where they fit."""

from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from hanok.kernels.native import native_for

GPU_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Fused(Protocol):
    """Norm, rotation and gate; none of them is differentiable."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
        """Return x / rms(x) * weight, or * (1 + weight) with `unit_offset`: (…, size)."""

    def rotate(self, heads: Tensor, cos_sin: Tensor, *, is_interleaved: bool) -> Tensor:
        """Return heads (tokens, heads, head_dim) rotated; cos_sin: (2, tokens, 1, rotary_dim)."""

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """Return activation(gate) * up: (tokens, 2 size) -> (tokens, size)."""


def fused_for(*tensors: Tensor) -> Fused | None:
    """Return the kernels for these tensors; None where none fit, or where a gradient is needed."""
    first = tensors[0]
    if first.is_cpu:
        return native_for(*tensors)
    if not first.is_cuda or torch.compiler.is_compiling():
        return None
    records = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor.dtype not in GPU_FLOATS or (records and tensor.requires_grad):
            return None
    return _triton()


@cache
def _triton() -> Fused | None:
    if find_spec("triton") is None:
        return None
    from hanok.kernels.triton_elementwise import FUSED

    return FUSED
