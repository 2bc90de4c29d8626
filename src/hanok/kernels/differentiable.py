"""Norm, rotation and gate with gradients: forward by the kernels that serve, backward by torch.

So a pass that learns computes what a pass that serves computes, bit for bit. Nothing but the inputs is
kept; what backward needs is computed again from them, in float32.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Fused(Protocol):
    """Norm, rotation and gate, each in one kernel."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
        """Return x / rms(x) * weight, or * (1 + weight) with `unit_offset`: (…, size)."""

    def rotate(self, heads: Tensor, cos_sin: Tensor, *, is_interleaved: bool) -> Tensor:
        """Return heads (tokens, heads, head_dim) rotated; cos_sin: (2, tokens, 1, rotary_dim)."""

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """Return activation(gate) * up: (tokens, 2 size) -> (tokens, size)."""


class Differentiable:
    """Fused kernels for tensors of which some need a gradient; cosines and sines get none."""

    def __init__(self, kernels: Fused) -> None:
        self._kernels = kernels

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
        """See `Fused`."""
        y: Tensor = _RmsNorm.apply(x, weight, eps, unit_offset, self._kernels)  # type: ignore[no-untyped-call]  # torch's
        return y

    def rotate(self, heads: Tensor, cos_sin: Tensor, *, is_interleaved: bool) -> Tensor:
        """See `Fused`."""
        y: Tensor = _Rotate.apply(heads, cos_sin, is_interleaved, self._kernels)  # type: ignore[no-untyped-call]  # torch's
        return y

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """See `Fused`."""
        y: Tensor = _Gate.apply(gate_up, activation, self._kernels)  # type: ignore[no-untyped-call]  # torch's
        return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool, kernels: Fused
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.unit_offset = eps, unit_offset
        return kernels.rms_norm(x, weight, eps, unit_offset=unit_offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide, grown = x.float(), gradient.float()
        inverse = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normed = wide * inverse
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            factor = weight.float() + 1.0 if ctx.unit_offset else weight.float()
            scaled = grown * factor
            along = (scaled * normed).mean(-1, keepdim=True)
            of_x = ((scaled - normed * along) * inverse).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (grown * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return of_x, of_weight, None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, cos_sin: Tensor, is_interleaved: bool, kernels: Fused
    ) -> Tensor:
        ctx.save_for_backward(cos_sin)
        ctx.is_interleaved, ctx.kernels = is_interleaved, kernels
        return kernels.rotate(heads, cos_sin, is_interleaved=is_interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Rotated back, by the opposite angle.
        cos, sin = ctx.saved_tensors[0]
        back = torch.stack([cos, -sin])
        rotated = ctx.kernels.rotate(gradient.contiguous(), back, is_interleaved=ctx.is_interleaved)
        return rotated, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str, kernels: Fused) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return kernels.gate(gate_up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.float().chunk(2, dim=-1)
        grown = gradient.float()
        if ctx.activation == "silu":
            active = F.silu(gate)
            of_gate = torch.ops.aten.silu_backward(grown * up, gate)
        else:
            active = F.gelu(gate, approximate="tanh")
            of_gate = torch.ops.aten.gelu_backward(grown * up, gate, approximate="tanh")
        return torch.cat([of_gate, grown * active], dim=-1).to(gate_up.dtype), None, None
