"""Norms, rotations and gates against their formulas in float64, on every instruction set."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.kernels.native import Native, instruction_sets, why_not

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(scope="module", params=["AVX-512 VNNI", "AVX2", "NEON dot product", "portable"])
def kernels(request: pytest.FixtureRequest) -> Native:
    """Every instruction set that this processor has."""
    for found in instruction_sets():
        if found.instruction_set == request.param:
            return found
    pytest.skip(f"{request.param}: {why_not() or 'not an instruction set of this processor'}")


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """The sums are in float32; bfloat16 keeps 8 bits of them."""
    tolerance = 2e-6 if found.dtype is torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=2e-6)


@SETTINGS
@given(rows=st.integers(0, 5), size=st.integers(1, 70), unit_offset=st.booleans(), dtype=DTYPES)
def test_rms_norm_is_its_formula(
    kernels: Native, rows: int, size: int, unit_offset: bool, dtype: torch.dtype
) -> None:
    x, weight = random(rows, size, dtype=dtype), random(size, dtype=dtype, seed=2)
    found = kernels.rms_norm(x, weight, 1e-5, unit_offset=unit_offset)
    wide = x.double()
    scale = weight.double() + (1.0 if unit_offset else 0.0)
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale
    assert found.dtype is dtype
    assert_rounded_once(found, exact)


def test_heads_are_normed_each_for_itself_also_where_they_are_strided(kernels: Native) -> None:
    packed, weight = random(3, 10, 16, dtype=torch.float32), random(16, dtype=torch.float32)
    heads = packed[:, 2:6]
    assert not heads.is_contiguous()
    found = kernels.rms_norm(heads, weight, 1e-6, unit_offset=False)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(heads, (16,), weight, 1e-6))


def test_a_norm_keeps_what_is_no_number(kernels: Native) -> None:
    x = torch.ones(3, 40)
    x[0, 3], x[1, 39] = float("nan"), float("inf")
    found = kernels.rms_norm(x, torch.ones(40), 1e-5, unit_offset=False)
    assert found[0].isnan().all()
    assert found[1, 39].isnan()
    assert found[2].isfinite().all()


def turned(heads: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Rotate pairs as complex numbers would be: the two angles of a pair are equal."""
    dim = cos.shape[-1]
    pairs = heads[..., :dim].double()
    if is_interleaved:
        first, second, c, s = pairs[..., ::2], pairs[..., 1::2], cos[..., ::2], sin[..., ::2]
    else:
        (first, second), half = pairs.chunk(2, -1), dim // 2
        c, s = cos[..., :half], sin[..., :half]
    c, s = c.double()[:, None], s.double()[:, None]
    parts = [first * c - second * s, second * c + first * s]
    merged = torch.stack(parts, -1).flatten(-2) if is_interleaved else torch.cat(parts, -1)
    return torch.cat([merged, heads[..., dim:].double()], -1)


@SETTINGS
@given(
    tokens=st.integers(0, 4),
    num_heads=st.integers(1, 5),
    half=st.integers(1, 40),
    kept=st.integers(0, 9),
    is_interleaved=st.booleans(),
    dtype=DTYPES,
)
def test_rotation_is_its_formula(
    kernels: Native,
    tokens: int,
    num_heads: int,
    half: int,
    kept: int,
    is_interleaved: bool,
    dtype: torch.dtype,
) -> None:
    # A slice of wider rows, as query and key heads are of a packed projection.
    heads = random(tokens, num_heads + 2, 2 * half + kept, dtype=dtype)[:, :num_heads]
    angles = random(tokens, half, dtype=torch.float32, seed=2)
    angles = angles.repeat_interleave(2, -1) if is_interleaved else torch.cat([angles] * 2, -1)
    cos_sin = torch.stack([angles.cos(), angles.sin()])[:, :, None].to(dtype)
    found = kernels.rotate(heads, cos_sin, is_interleaved=is_interleaved)
    exact = turned(heads, cos_sin[0, :, 0], cos_sin[1, :, 0], is_interleaved=is_interleaved)
    assert found.dtype is dtype
    assert_rounded_once(found, exact)


def test_angles_of_another_shape_are_refused(kernels: Native) -> None:
    heads = torch.ones(2, 3, 8)
    for shape in ((2, 1, 1, 8), (2, 2, 1, 10), (1, 2, 1, 8)):
        with pytest.raises(ValueError, match="angles"):
            kernels.rotate(heads, torch.ones(shape), is_interleaved=False)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu_tanh": lambda x: x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()),
}


@SETTINGS
@given(
    rows=st.integers(0, 4),
    size=st.integers(1, 70),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    activation=st.sampled_from(sorted(GATES)),
    dtype=DTYPES,
)
def test_gates_are_their_formulas(
    kernels: Native, rows: int, size: int, scale: float, activation: str, dtype: torch.dtype
) -> None:
    gate_up = random(rows, 2 * size, dtype=torch.float32).mul(scale).to(dtype)
    found = kernels.gate(gate_up, activation)
    gate, up = gate_up.double().chunk(2, -1)
    exact = GATES[activation](gate) * up
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=1e-5 * scale**2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gates_keep_what_is_no_number(kernels: Native, value: float) -> None:
    gate_up = torch.ones(2, 34)
    gate_up[0, 2] = value
    for activation in GATES:
        found = kernels.gate(gate_up, activation)
        assert not found[0, 2].isfinite()
        assert found[1].isfinite().all()


def test_threads_change_no_bit(kernels: Native, with_threads: Callable[[int], None]) -> None:
    x, weight = random(40, 1030, dtype=torch.bfloat16), random(1030, dtype=torch.bfloat16)
    heads = random(70, 9, 64, dtype=torch.bfloat16)
    cos_sin = random(2, 70, 1, 64, dtype=torch.bfloat16)
    gate_up = random(3, 30000, dtype=torch.bfloat16)
    answers = []
    for count in (1, 2, 3):
        with_threads(count)
        answers.append(
            (
                kernels.rms_norm(x, weight, 1e-5, unit_offset=False),
                kernels.rotate(heads, cos_sin, is_interleaved=False),
                kernels.gate(gate_up, "silu"),
            )
        )
    for other in answers[1:]:
        assert all(map(torch.equal, answers[0], other))
