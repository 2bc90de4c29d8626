"""Norm, rotation and gate in Triton against their formulas in float64: in the interpreter, or on a GPU.

Results are rounded once to x's dtype: 2^-8 in bfloat16, 2^-11 in float16, and twice that in the
interpreter, which cuts bfloat16 off; float32 sums of at most 300 squares stay within 1e-5.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hanok.kernels.fused import Fused
from hanok.models.config import Rope
from hanok.models.rotary import Rotary

ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

grid = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from(list(ROUNDING))


@pytest.fixture
def fused(kernel_device: torch.device) -> Fused:
    from hanok.kernels.triton_elementwise import FUSED

    return FUSED


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def formula(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * scale * (weight.double() + unit_offset)


@given(
    rows=st.sampled_from([0, 1, 2, 5]),
    size=st.sampled_from([1, 3, 64, 96, 300]),
    dtype=dtypes,
    eps=st.sampled_from([1e-6, 1e-2]),
    unit_offset=st.booleans(),
    is_strided=st.booleans(),
    seed=st.integers(0, 99),
)
@grid
def test_rows_are_normed_by_the_formula(
    rows: int,
    size: int,
    dtype: torch.dtype,
    eps: float,
    unit_offset: bool,
    is_strided: bool,
    seed: int,
    kernel_device: torch.device,
    fused: Fused,
) -> None:
    wide = drawn((rows, 2 * size), dtype, kernel_device, seed)
    x = wide[:, size:] if is_strided else wide[:, size:].contiguous()
    weight = drawn((size,), dtype, kernel_device, seed + 1)
    answer = fused.rms_norm(x, weight, eps, unit_offset=unit_offset)
    expected = formula(x, weight, eps, unit_offset=unit_offset)
    assert answer.dtype == dtype
    assert answer.shape == x.shape
    torch.testing.assert_close(answer.double(), expected, atol=1e-6, rtol=ROUNDING[dtype])


def test_more_axes_than_two_are_rows(kernel_device: torch.device, fused: Fused) -> None:
    x = drawn((3, 2, 8), torch.float32, kernel_device, 0).transpose(0, 1)
    weight = torch.ones(8, device=kernel_device)
    answer = fused.rms_norm(x, weight, 1e-6, unit_offset=False)
    expected = formula(x, weight, 1e-6, unit_offset=False)
    torch.testing.assert_close(answer.double(), expected, atol=1e-5, rtol=0)


@given(
    tokens=st.sampled_from([0, 1, 3]),
    num_heads=st.sampled_from([1, 3, 9]),
    head_dim=st.sampled_from([8, 24, 64]),
    part=st.sampled_from([1, 2, 4]),
    dtype=dtypes,
    is_interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
@grid
def test_heads_are_rotated_as_the_plain_rotation_does(
    tokens: int,
    num_heads: int,
    head_dim: int,
    part: int,
    dtype: torch.dtype,
    is_interleaved: bool,
    seed: int,
    kernel_device: torch.device,
    fused: Fused,
) -> None:
    packed = drawn((tokens, num_heads + 2, head_dim), dtype, kernel_device, seed)
    heads = packed[:, 1:-1]  # as query and key heads lie beside those of values
    rotary_dim = head_dim // part
    angles = drawn((tokens, rotary_dim // 2), torch.float32, torch.device("cpu"), seed + 1)
    angles = angles.repeat_interleave(2, -1) if is_interleaved else torch.cat([angles] * 2, -1)
    cos_sin = torch.stack([angles.cos(), angles.sin()])[:, :, None].to(kernel_device, dtype)
    answer = fused.rotate(heads, cos_sin, is_interleaved=is_interleaved)
    rope = Rope(theta=10000.0, rotary_dim=rotary_dim, is_interleaved=is_interleaved)
    expected = Rotary(rope).rotate(heads.double(), cos_sin.double())
    assert answer.dtype == dtype
    # A component is a sum of two products, each of which may be larger than it.
    torch.testing.assert_close(answer.double(), expected, atol=8 * ROUNDING[dtype], rtol=0)
    assert torch.equal(answer[..., rotary_dim:], heads[..., rotary_dim:])


@given(
    tokens=st.sampled_from([0, 1, 3]),
    size=st.sampled_from([1, 40, 1500]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
@grid
def test_the_gate_is_the_activation_times_up(
    tokens: int,
    size: int,
    activation: str,
    dtype: torch.dtype,
    seed: int,
    kernel_device: torch.device,
    fused: Fused,
) -> None:
    gate_up = 3 * drawn((tokens, 2 * size), dtype, kernel_device, seed)
    gate, up = gate_up.double().chunk(2, -1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    answer = fused.gate(gate_up, activation)
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.double(), active * up, atol=1e-5, rtol=2 * ROUNDING[dtype])


def test_what_does_not_fit_is_refused(kernel_device: torch.device, fused: Fused) -> None:
    x = torch.ones(2, 8, device=kernel_device)
    with pytest.raises(ValueError, match=r"weight \(4,\)"):
        fused.rms_norm(x, torch.ones(4, device=kernel_device), 1e-6, unit_offset=False)
    with pytest.raises(ValueError, match=r"cos_sin \(2, 2, 1, 16\)"):
        fused.rotate(
            x[:, None], torch.ones(2, 2, 1, 16, device=kernel_device), is_interleaved=False
        )
    with pytest.raises(ValueError, match="'relu' has no kernel"):
        fused.gate(x, "relu")
