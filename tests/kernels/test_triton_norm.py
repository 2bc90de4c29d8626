"""RMSNorm in Triton against its formula in float64: in the interpreter, or on a GPU.

Results are rounded once to x's dtype: 2^-8 in bfloat16, 2^-11 in float16, and twice that in the
interpreter, which cuts bfloat16 off; float32 sums of at most 300 squares stay within 1e-5. What is
rounded before it is normed is compared by itself, and its answer to the norm of what was given out.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

grid = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def formula(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * scale * (weight.double() + unit_offset)


@given(
    rows=st.sampled_from([0, 1, 2, 5]),
    size=st.sampled_from([1, 3, 64, 96, 300]),
    dtype=st.sampled_from(list(ROUNDING)),
    eps=st.sampled_from([1e-6, 1e-2]),
    unit_offset=st.booleans(),
    has_residual=st.booleans(),
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
    has_residual: bool,
    is_strided: bool,
    seed: int,
    kernel_device: torch.device,
) -> None:
    from hanok.kernels.triton_norm import add_rms_norm, rms_norm

    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, 2 * size, generator=generator).to(kernel_device, dtype)
    x = wide[:, size:] if is_strided else wide[:, size:].contiguous()
    residual = torch.randn(rows, size, generator=generator).to(kernel_device, dtype)
    weight = torch.randn(size, generator=generator).to(kernel_device, dtype)
    if has_residual:
        answer, added = add_rms_norm(x, residual, weight, eps, unit_offset=unit_offset)
        torch.testing.assert_close(added, x + residual, atol=0, rtol=ROUNDING[dtype])
    else:
        answer, added = rms_norm(x, weight, eps, unit_offset=unit_offset), x
    expected = formula(added, weight, eps, unit_offset=unit_offset)
    assert answer.dtype == dtype
    assert answer.shape == x.shape
    torch.testing.assert_close(answer.double(), expected, atol=1e-6, rtol=ROUNDING[dtype])


def test_more_axes_than_two_are_rows(kernel_device: torch.device) -> None:
    from hanok.kernels.triton_norm import rms_norm

    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    weight = torch.ones(8, device=kernel_device)
    answer = rms_norm(x.transpose(0, 1), weight, 1e-6)
    expected = formula(x.transpose(0, 1), weight, 1e-6, unit_offset=False)
    torch.testing.assert_close(answer.double(), expected, atol=1e-5, rtol=0)


def test_shapes_that_do_not_fit_are_refused(kernel_device: torch.device) -> None:
    from hanok.kernels.triton_norm import add_rms_norm, rms_norm

    x = torch.ones(2, 8, device=kernel_device)
    with pytest.raises(ValueError, match=r"weight \(4,\)"):
        rms_norm(x, torch.ones(4, device=kernel_device), 1e-6)
    with pytest.raises(ValueError, match=r"residual \(1, 8\)"):
        add_rms_norm(x, x[:1], torch.ones(8, device=kernel_device), 1e-6)
