"""The compiled kernels: exact sums, rounding, threads, and a machine that could not build them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.errors import OptionError
from hanok.kernels import native as module
from hanok.kernels.native import Native, instruction_sets, native, native_for, why_not
from hanok.kernels.processor import CAP, INSTRUCTION_SETS, has_bfloat16_instructions

ROOT = Path(__file__).parents[2]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: every sum of their products is exact in float32 in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).bfloat16()


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    has_bias=st.booleans(),
)
def test_an_exact_sum_is_rounded_as_torch_rounds_it(
    kernels: Native, tokens: int, rows: int, columns: int, has_bias: bool
) -> None:
    tokens = min(tokens, kernels.dense_tokens)
    x, weight = whole_numbers(tokens, columns, seed=1), whole_numbers(rows, columns, seed=2)
    bias = whole_numbers(rows, seed=3) if has_bias else None
    exact = x.double() @ weight.double().t()
    if bias is not None:
        exact = exact + bias.double()
    assert torch.equal(exact, exact.float().double())
    assert torch.equal(kernels.dense(x, weight, bias), exact.float().bfloat16())
    wide_bias = None if bias is None else bias.float()
    assert torch.equal(kernels.dense(x.float(), weight.float(), wide_bias), exact.float())


@pytest.mark.parametrize("columns", [2, 64])  # outside and inside the vectors
def test_rounding_is_to_nearest_and_ties_go_to_even(kernels: Native, columns: int) -> None:
    # Above 256 bfloat16 has every second number, above 512 every fourth.
    sums = [257, 258, 259, 261, 263, 514, 513, 515, 518, 522, -257, -259, -261]
    weight = torch.zeros(len(sums), columns)
    weight[:, 0] = torch.tensor(sums) // 2 * 2 // 2  # at most 261: a whole number of 8 bits
    weight[:, 1] = torch.tensor(sums) - 2 * weight[:, 0]
    weight = weight.bfloat16()
    x = torch.zeros(1, columns).bfloat16()
    x[0, :2] = torch.tensor([2.0, 1.0])
    exact = (x.double() @ weight.double().t()).float()
    answer = kernels.dense(x, weight, None)
    assert torch.equal(answer, exact.bfloat16())
    assert answer[0, :5].tolist() == [256.0, 258.0, 260.0, 260.0, 264.0]


@pytest.mark.parametrize("column", [0, 1, 31, 32, 65, 69])
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_nan_and_infinity_stay_what_they_are(kernels: Native, tokens: int, column: int) -> None:
    x, weight = torch.ones(tokens, 70).bfloat16(), torch.ones(5, 70).bfloat16()
    for row, value in enumerate([float("nan"), float("inf"), float("-inf"), 3e38]):
        weight[row, column] = value
    answer = kernels.dense(x, weight, None)
    assert answer[:, 0].isnan().all()
    assert answer[:, 1].tolist() == [float("inf")] * tokens
    assert answer[:, 2].tolist() == [float("-inf")] * tokens
    assert answer[:, 3].isfinite().all()
    assert answer[:, 4].tolist() == [70.0] * tokens
    x[0, column] = float("nan")
    poisoned = kernels.dense(x, weight, None)
    assert poisoned[0].isnan().all()
    assert torch.equal(poisoned[1:, 4], answer[1:, 4])


def test_a_sum_too_large_for_bfloat16_is_infinite(kernels: Native) -> None:
    x = torch.full((1, 1), 3e38).bfloat16()
    weight = torch.tensor([[1.0], [1.25], [-2.0]]).bfloat16()
    answer = kernels.dense(x, weight, None)
    assert answer.tolist() == [[x.item(), float("inf"), float("-inf")]]


@both_dtypes
@pytest.mark.parametrize("tokens", [*range(1, 9), 40, 200])
def test_any_number_of_threads_gives_the_same_bits(
    kernels: Native, with_threads: Callable[[int], None], tokens: int, dtype: torch.dtype
) -> None:
    if tokens > kernels.dense_tokens:
        pytest.skip(f"these kernels take {kernels.dense_tokens} tokens at the most")
    weight = random(2100, 301, seed=2).to(dtype)  # more than one thread does alone
    x, bias = random(tokens, 301, seed=1).to(dtype), random(2100, seed=3).to(dtype)
    with_threads(1)
    alone = kernels.dense(x, weight, bias)
    for count in (2, 3):
        with_threads(count)
        assert torch.equal(kernels.dense(x, weight, bias), alone)


@both_dtypes
@pytest.mark.parametrize(("rows", "columns"), [(45, 700), (130, 33), (64, 256)])
def test_where_any_number_of_tokens_is_taken_each_is_what_it_is_alone(
    kernels: Native, dtype: torch.dtype, rows: int, columns: int
) -> None:
    """In tiles of any size, over blocks of tokens, and where columns are no whole chains."""
    if kernels.dense_tokens < 1000:
        pytest.skip(f"these kernels take {kernels.dense_tokens} tokens at the most")
    x, weight = random(400, columns, seed=1).to(dtype), random(rows, columns, seed=2).to(dtype)
    bias = random(rows, seed=3).to(dtype)
    alone = torch.cat([kernels.dense(row[None], weight, bias) for row in x])
    for count in (2, 3, 5, 6, 7, 8, 13, 191, 192, 193, 400):
        assert torch.equal(kernels.dense(x[:count], weight, bias), alone[:count]), count


def test_a_strided_x_is_read_in_its_own_order(kernels: Native) -> None:
    weight = random(9, 40, seed=2)
    transposed, skipping = random(40, 3, seed=1).t(), random(6, 80, seed=1)[::2, ::2]
    for x in (transposed, skipping):
        assert not x.is_contiguous()
        expected = kernels.dense(x.clone(memory_format=torch.contiguous_format), weight, None)
        assert torch.equal(kernels.dense(x, weight, None), expected)


def test_what_would_be_read_out_of_bounds_is_refused(kernels: Native) -> None:
    weight = random(4, 16, seed=1)
    too_many = min(kernels.dense_tokens + 1, 1000)  # which some kernels take, of the right columns
    columns_then = 16 if too_many < 1000 else 15
    for tokens, columns in ((0, 16), (too_many, columns_then), (1, 15), (1, 17)):
        with pytest.raises(ValueError, match=f"x is {tokens} x {columns}, the weight 4 x 16"):
            kernels.dense(random(tokens, columns, seed=2), weight, None)
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        kernels.dense(torch.ones(1, 16), weight, None)
    with pytest.raises(ValueError, match="the bias has shape"):
        kernels.dense(random(1, 16, seed=2), weight, random(5, seed=3))
    with pytest.raises(ValueError, match="kernels take float32 and bfloat16"):
        kernels.dense(torch.ones(1, 16).half(), weight.half(), None)


@pytest.fixture
def another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for a library that is not the package's own."""
    path = tmp_path / "libhanok_kernels.so"
    monkeypatch.setattr(module, "LIBRARY", path)
    caches = (module._library, module.built_instruction_sets, instruction_sets)
    for found in caches:
        found.cache_clear()
    yield path
    for found in caches:
        found.cache_clear()  # the patch is undone after this, and nothing is asked between


def test_without_the_library_it_says_that_no_compiler_was_found(another_library: Path) -> None:
    assert native() is None
    reason = why_not()
    assert reason is not None
    assert "no C++ compiler could compile them" in reason


def test_a_library_for_another_system_is_told_from_an_absent_one(another_library: Path) -> None:
    another_library.write_bytes(b"this is no library")
    assert native() is None
    reason = why_not()
    assert reason is not None
    assert "libhanok_kernels.so does not load, it was built for another system" in reason


def test_where_the_library_is_there_is_nothing_to_say(kernels: Native) -> None:
    assert why_not() is None
    assert native() is instruction_sets()[0]


def test_the_kernels_are_offered_for_what_they_can_compute_and_nothing_else() -> None:
    if native() is None:
        pytest.skip(f"the kernels are {why_not()}")
    wide, narrow = torch.ones(2), torch.ones(2).bfloat16()
    assert native_for(wide, narrow) is native()
    for other in (wide.half(), wide.double(), wide.to("meta"), wide.clone().requires_grad_()):
        assert native_for(wide, other) is None
    with torch.no_grad():
        assert native_for(wide.clone().requires_grad_()) is native()


@pytest.fixture
def capped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Sequence[Native]]]:
    """Returns the instruction sets that are used under a cap."""

    def under(cap: str) -> Sequence[Native]:
        monkeypatch.setenv(CAP, cap)
        instruction_sets.cache_clear()
        return instruction_sets()

    yield under
    monkeypatch.undo()
    instruction_sets.cache_clear()


def test_a_cap_leaves_what_is_less(capped: Callable[[str], Sequence[Native]]) -> None:
    all_of_them = [item.key for item in module.built_instruction_sets()]
    assert [item.key for item in capped("")] == all_of_them  # an empty variable is none
    for cap in INSTRUCTION_SETS:
        allowed = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(cap) + 1]
        assert [item.key for item in capped(cap)] == [x for x in all_of_them if x in allowed]


def test_a_cap_that_is_no_instruction_set_is_refused(
    capped: Callable[[str], Sequence[Native]],
) -> None:
    with pytest.raises(
        OptionError, match=r"HANOK_ISA=sse9 is not an instruction set\. Write one of port"
    ):
        capped("sse9")


def test_under_a_cap_there_are_no_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    has_them = has_bfloat16_instructions.__wrapped__
    monkeypatch.delenv(CAP, raising=False)
    assert has_them()
    monkeypatch.setenv(CAP, "avx2")
    assert not has_them()
