"""Norms, rotations and gates of the library against their formulas in float64.

Tolerances: what is computed in float32 errs by a few of its last bits, 1e-6 relative here and 1e-5 for
exponentials multiplied up; bfloat16 results are rounded once, by half of the last of 8 bits.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.kernels.native import GATE_ACTIVATIONS, Native

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-6},
}
quick = settings(max_examples=25)
sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100])


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(answer: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert answer.dtype is dtype
    torch.testing.assert_close(answer.double(), expected, equal_nan=True, **TOLERANCE[dtype])


def norm_formula(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x = x.double()
    rms = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x / rms * (weight.double() + offset)


@both_dtypes
@quick
@given(
    shape=st.lists(st.integers(0, 5), max_size=2),
    size=sizes,
    eps=st.sampled_from([1e-6, 1e-2]),
    unit_offset=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_norm_is_its_formula(
    kernels: Native,
    dtype: torch.dtype,
    shape: list[int],
    size: int,
    eps: float,
    unit_offset: bool,
    seed: int,
) -> None:
    x = random(*shape, size, seed=seed, dtype=dtype) * 3
    weight = random(size, seed=seed + 1, dtype=dtype)
    answer = kernels.rms_norm(x, weight, eps, unit_offset=unit_offset)
    assert answer.shape == x.shape
    assert_near(answer, norm_formula(x, weight, eps, 1.0 if unit_offset else 0.0), dtype)


@both_dtypes
@pytest.mark.parametrize("size", [5, 40])
def test_a_norm_leaves_no_number_in_its_own_row(
    kernels: Native, dtype: torch.dtype, size: int
) -> None:
    x = random(3, size, seed=1, dtype=dtype)
    x[1, size - 1] = NAN
    weight = random(size, seed=2, dtype=dtype)
    answer = kernels.rms_norm(x, weight, 1e-6, unit_offset=False)
    assert answer[1].isnan().all()
    assert_near(answer[::2], norm_formula(x[::2], weight, 1e-6, 0.0), dtype)
    x[1, size - 1] = INF
    assert kernels.rms_norm(x, weight, 1e-6, unit_offset=False)[1, size - 1].isnan()


@both_dtypes
def test_a_norm_of_strided_rows_is_that_of_the_rows(kernels: Native, dtype: torch.dtype) -> None:
    x, weight = random(4, 60, seed=1, dtype=dtype)[::2, 3:40:2], random(19, seed=2, dtype=dtype)
    expected = norm_formula(x, weight, 1e-5, 0.0)
    assert_near(kernels.rms_norm(x, weight, 1e-5, unit_offset=False), expected, dtype)


def test_a_norm_refuses_a_weight_that_does_not_fit(kernels: Native) -> None:
    x = torch.ones(2, 8)
    for weight in (torch.ones(7), torch.ones(8).bfloat16(), torch.ones(16)[::2], torch.ones(1, 8)):
        with pytest.raises(ValueError, match=r"x is torch\.float32 \(2, 8\), the weight"):
            kernels.rms_norm(x, weight, 1e-6, unit_offset=False)
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        kernels.rms_norm(x.half(), torch.ones(8).half(), 1e-6, unit_offset=False)


def rotation_formula(heads: Tensor, cos_sin: Tensor, is_interleaved: bool) -> Tensor:
    """Each pair as a complex number, for pairs whose two angles are the same."""
    rotated, (cos, sin) = heads.double().clone(), cos_sin.double()
    dim = cos.shape[-1]
    first = slice(0, dim, 2) if is_interleaved else slice(0, dim // 2)
    second = slice(1, dim, 2) if is_interleaved else slice(dim // 2, dim)
    number = torch.complex(rotated[..., first], rotated[..., second])
    number = number * torch.complex(cos[..., first], sin[..., first])
    rotated[..., first], rotated[..., second] = number.real, number.imag
    return rotated


def angles(tokens: int, dim: int, is_interleaved: bool, seed: int, dtype: torch.dtype) -> Tensor:
    half = random(tokens, 1, dim // 2, seed=seed, dtype=torch.float32) * 9
    whole = half.repeat_interleave(2, -1) if is_interleaved else torch.cat([half, half], -1)
    return torch.stack([whole.cos(), whole.sin()]).to(dtype)


@both_dtypes
@pytest.mark.parametrize("is_interleaved", [False, True])
@quick
@given(
    tokens=st.integers(0, 5),
    heads=st.integers(1, 4),
    half=st.sampled_from([1, 3, 8, 16, 20, 32]),
    rest=st.sampled_from([0, 0, 1, 16]),
    stride=st.sampled_from(["packed", "tokens apart", "rotated"]),
    seed=st.integers(0, 99),
)
def test_a_rotation_turns_each_pair_and_keeps_the_rest(
    kernels: Native,
    dtype: torch.dtype,
    is_interleaved: bool,
    tokens: int,
    heads: int,
    half: int,
    rest: int,
    stride: str,
    seed: int,
) -> None:
    dim = 2 * half + rest
    if stride == "rotated":
        x = random(heads, tokens, dim, seed=seed, dtype=dtype).transpose(0, 1)
    else:
        more = 2 if stride == "tokens apart" else 0
        x = random(tokens, heads + more, dim, seed=seed, dtype=dtype)[:, :heads]
    cos_sin = angles(tokens, 2 * half, is_interleaved, seed + 1, dtype)
    before = x.clone()
    answer = kernels.rotate(x, cos_sin, is_interleaved=is_interleaved)
    assert answer.is_contiguous()
    assert torch.equal(x, before)
    # Two products of the order of 1 may cancel: the error is that of one of them.
    tolerance = {"rtol": 2**-8, "atol": 1e-5 if dtype is torch.float32 else 1e-4}
    expected = rotation_formula(x, cos_sin, is_interleaved)
    torch.testing.assert_close(answer.double(), expected, **tolerance)
    if dtype is torch.float32:
        torch.testing.assert_close(answer.double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(answer[..., 2 * half :], x[..., 2 * half :])


@both_dtypes
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_a_rotation_spoils_no_more_than_the_pair(
    kernels: Native, dtype: torch.dtype, is_interleaved: bool
) -> None:
    x = random(2, 2, 40, seed=1, dtype=dtype)
    x[1, 0, 3] = NAN
    answer = kernels.rotate(
        x, angles(2, 40, is_interleaved, 2, dtype), is_interleaved=is_interleaved
    )
    pair = [2, 3] if is_interleaved else [3, 23]
    assert answer.isnan().nonzero().tolist() == [[1, 0, place] for place in pair]


@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 8), (2, 2, 1, 10), (2, 2, 8), (1, 2, 1, 8), (2, 2, 1, 7)]
)
def test_a_rotation_refuses_angles_that_do_not_fit(kernels: Native, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cosines and sines"):
        kernels.rotate(torch.ones(2, 1, 8), torch.ones(shape), is_interleaved=False)


def test_a_rotation_refuses_angles_of_another_dtype(kernels: Native) -> None:
    with pytest.raises(ValueError, match="cosines and sines"):
        kernels.rotate(torch.ones(2, 1, 8), torch.ones(2, 2, 1, 8).bfloat16(), is_interleaved=False)


def gate_formula(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    if activation == "silu":
        return gate / (1 + (-gate).exp()) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + inner.tanh()) * up


@both_dtypes
@pytest.mark.parametrize("activation", GATE_ACTIVATIONS)
@quick
@given(
    tokens=st.integers(0, 4),
    size=sizes | st.just(2050),
    scale=st.sampled_from([1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_a_gate_is_its_formula(
    kernels: Native,
    dtype: torch.dtype,
    activation: str,
    tokens: int,
    size: int,
    scale: float,
    seed: int,
) -> None:
    gate_up = random(tokens, 2 * size, seed=seed, dtype=dtype) * scale
    answer = kernels.gate(gate_up, activation)
    assert answer.dtype is dtype
    gate, up = gate_up.double().chunk(2, -1)
    # 1 + tanh, near -1, has the error of numbers around 1: relative to gate x up.
    allowed = 2**-8 if dtype is torch.bfloat16 else 1e-5
    expected = gate_formula(gate_up, activation)
    error = (answer.double() - expected).abs()
    assert (error <= allowed * expected.abs() + 3e-7 * (gate * up).abs()).all()


@pytest.mark.parametrize("activation", GATE_ACTIVATIONS)
def test_a_gate_at_the_ends_of_the_numbers(kernels: Native, activation: str) -> None:
    gates = [0.0, -0.0, 1e-30, -1e-30, 87.0, -87.0, -100.0, 1e4, -1e4, 3e38, INF, NAN, 1.0]
    ups = [1.0] * (len(gates) - 1) + [NAN]
    answer = kernels.gate(torch.tensor([gates + ups]), activation)[0]
    for gate, value in zip(gates, answer.tolist(), strict=True):
        if gate != gate or gate == 1.0:
            assert value != value
        elif gate > 1:
            assert value == pytest.approx(gate)
        else:
            assert abs(value) <= abs(gate) * 1.001 if gate > -1 else abs(value) < 1e-30
    assert not kernels.gate(torch.tensor([[-INF, 1.0]]), activation).isfinite().any()


def test_a_gate_refuses_what_has_no_halves(kernels: Native) -> None:
    with pytest.raises(ValueError, match="2 x 7"):
        kernels.gate(torch.ones(2, 7), "silu")


@both_dtypes
def test_any_number_of_threads_gives_the_same_bits(
    kernels: Native, with_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    """Of more numbers than are worth a second thread."""
    x, weight = random(41, 1003, seed=1, dtype=dtype), random(1003, seed=2, dtype=dtype)
    heads, cos_sin = random(41, 17, 64, seed=3, dtype=dtype), angles(41, 32, False, 4, dtype)
    gate_up = random(9, 9002, seed=5, dtype=dtype)

    def all_of_them() -> list[Tensor]:
        return [
            kernels.rms_norm(x, weight, 1e-6, unit_offset=True),
            kernels.rotate(heads, cos_sin, is_interleaved=False),
            kernels.rotate(heads, cos_sin, is_interleaved=True),
            *(kernels.gate(gate_up, activation) for activation in GATE_ACTIVATIONS),
        ]

    with_threads(1)
    alone = all_of_them()
    for count in (2, 3):
        with_threads(count)
        for answer, expected in zip(all_of_them(), alone, strict=True):
            assert torch.equal(answer, expected)


@both_dtypes
@quick
@given(shape=st.lists(st.integers(0, 40), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_sum_is_rounded_once_as_torch_does(
    kernels: Native, dtype: torch.dtype, shape: list[int], seed: int
) -> None:
    a, b = random(*shape, seed=seed, dtype=dtype), random(*shape, seed=seed + 1, dtype=dtype)
    if a.numel() > 2:
        a.view(-1)[:2] = torch.tensor([INF, NAN])
    assert torch.equal(kernels.add(a, b).nan_to_num(7.0), (a + b).nan_to_num(7.0))


def test_a_long_sum_is_shared_by_threads(kernels: Native) -> None:
    a, b = (
        random(50, 1001, seed=1, dtype=torch.bfloat16),
        random(50, 1001, seed=2, dtype=torch.bfloat16),
    )
    assert torch.equal(kernels.add(a, b), a + b)


def test_a_sum_of_what_differs_is_refused(kernels: Native) -> None:
    with pytest.raises(ValueError, match="differ"):
        kernels.add(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="differ"):
        kernels.add(torch.ones(3), torch.ones(3, dtype=torch.bfloat16))


@both_dtypes
def test_rows_that_stand_apart_are_copied_side_by_side(kernels: Native, dtype: torch.dtype) -> None:
    wide = random(5, 7, 3, seed=4, dtype=dtype)
    assert torch.equal(kernels.copy(wide[:, 2:5]), wide[:, 2:5])
    assert kernels.copy(wide[:, 2:5]).is_contiguous()
    assert kernels.copy(wide[:0, 2:5]).shape == (0, 3, 3)
    with pytest.raises(ValueError, match="in pieces"):
        kernels.copy(wide[:, :, 1:])


@quick
@given(shape=st.lists(st.integers(0, 50), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_widened_numbers_are_what_they_were(kernels: Native, shape: list[int], seed: int) -> None:
    x = random(*shape, seed=seed, dtype=torch.bfloat16)
    assert torch.equal(kernels.widen(x), x.float())
    assert torch.equal(kernels.widen(x.t() if x.dim() == 2 else x).sum(), x.float().sum())
    assert kernels.widen(x.float()).dtype is torch.float32


@quick
@given(rows=st.integers(1, 9), columns=st.integers(1, 90), seed=st.integers(0, 99))
def test_the_sum_of_exponentials_is_that_of_float64(
    kernels: Native, rows: int, columns: int, seed: int
) -> None:
    x = random(rows, columns, seed=seed, dtype=torch.float32) * 30
    x[:, columns // 2] = -INF if columns > 1 else 0.0  # excluded, and nothing else is lost
    totals, likeliest = kernels.log_sum_exp(x)
    # exponential() errs by 2e-7 of itself, and totals are of the order of 100.
    torch.testing.assert_close(totals.double(), x.double().logsumexp(-1), rtol=2e-7, atol=1e-5)
    assert torch.equal(likeliest, x.argmax(-1))


@pytest.mark.parametrize("columns", [3, 16, 40])
def test_of_equal_numbers_the_first_is_the_largest(kernels: Native, columns: int) -> None:
    x = torch.zeros(2, columns)
    x[1, 1:] = 7.0
    assert kernels.log_sum_exp(x)[1].tolist() == [0, 1]


@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_row_with_what_is_no_number_has_no_sum(kernels: Native, place: int) -> None:
    x = torch.zeros(4, 40)
    for row, value in enumerate((float("nan"), INF)):
        x[row, place] = value
    x[3] = -INF
    totals = kernels.log_sum_exp(x)[0]
    assert totals[0].isnan()
    assert totals[1:].tolist() == pytest.approx([INF, math.log(40), -INF], rel=1e-6)


def test_sums_of_many_rows_are_those_of_each(
    kernels: Native, with_threads: Callable[[int], None]
) -> None:
    x = random(20, 5003, seed=1, dtype=torch.float32)
    with_threads(1)
    alone = [kernels.log_sum_exp(row[None])[0] for row in x]
    for count in (1, 3):
        with_threads(count)
        assert torch.equal(kernels.log_sum_exp(x)[0], torch.cat(alone))


def test_sums_are_of_rows_of_float32(kernels: Native) -> None:
    for x in (torch.zeros(4), torch.zeros(2, 3).double(), torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="rows are"):
            kernels.log_sum_exp(x)
