"""Kernels with gradients: forward the same bits as without, backward what autograd finds in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hanok.kernels.differentiable import Differentiable
from hanok.kernels.fused import fused_for
from hanok.kernels.native import native

pytestmark = pytest.mark.skipif(native() is None, reason="the kernels are not built")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(
    dtype: torch.dtype,
    run: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    *inputs: Tensor,
) -> None:
    """Compare with the kernel without gradients, and with the gradients of a formula in float64."""
    narrow = [item.to(dtype) for item in inputs]
    with torch.no_grad():
        expected = run(*narrow)
    leaves = [item.clone().requires_grad_() for item in narrow]
    found = run(*leaves)
    assert found.requires_grad
    assert torch.equal(found.detach(), expected)
    weights = drawn(*found.shape, seed=9).to(dtype)
    found.backward(weights)
    exact = [item.double().requires_grad_() for item in narrow]
    formula(*exact).backward(weights.double())
    for leaf, wide in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert wide.grad is not None
        difference = (leaf.grad.double() - wide.grad).norm()
        assert difference <= TOLERANCES[dtype] * wide.grad.norm()


def kernels_of(*tensors: Tensor) -> Differentiable:
    found = fused_for(*tensors)
    assert found is not None
    assert isinstance(found, Differentiable) == (
        torch.is_grad_enabled() and any(item.requires_grad for item in tensors)
    )
    return found  # type: ignore[return-value]  # both have its methods


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("unit_offset", [True, False])
def test_a_norm(dtype: torch.dtype, unit_offset: bool) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return kernels_of(x, weight).rms_norm(x, weight, 1e-5, unit_offset=unit_offset)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (24,), weight + 1 if unit_offset else weight, 1e-5)

    check(dtype, run, formula, drawn(7, 24), drawn(24, seed=1))
    check(dtype, run, formula, drawn(3, 2, 24), drawn(24, seed=1))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_a_rotation(dtype: torch.dtype, is_interleaved: bool, rotary_dim: int) -> None:
    angles = drawn(5, 1, rotary_dim // 2, seed=1)
    angles = angles.repeat_interleave(2, -1) if is_interleaved else torch.cat([angles, angles], -1)
    cos_sin = torch.stack([angles.cos(), angles.sin()]).to(dtype)

    def run(heads: Tensor) -> Tensor:
        return kernels_of(heads, cos_sin).rotate(heads, cos_sin, is_interleaved=is_interleaved)

    def formula(heads: Tensor) -> Tensor:
        part = heads[..., :rotary_dim]
        if is_interleaved:
            half = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
        else:
            half = torch.cat([-part[..., rotary_dim // 2 :], part[..., : rotary_dim // 2]], -1)
        cos, sin = cos_sin.double()
        return torch.cat([part * cos + half * sin, heads[..., rotary_dim:]], -1)

    check(dtype, run, formula, drawn(5, 3, 16))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gate(dtype: torch.dtype, activation: str) -> None:
    def formula(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    check(dtype, lambda x: kernels_of(x).gate(x, activation), formula, drawn(6, 40))


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight = drawn(3, 8).requires_grad_(), drawn(8)
    kernels_of(x, weight).rms_norm(x, weight, 1e-5, unit_offset=False).sum().backward()
    assert x.grad is not None
    weight.requires_grad_()
    frozen = drawn(3, 8)
    kernels_of(frozen, weight).rms_norm(frozen, weight, 1e-5, unit_offset=False).sum().backward()
    assert weight.grad is not None
