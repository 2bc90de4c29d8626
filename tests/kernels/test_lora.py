"""What adapters add, by our kernel: against float64, and each token as if it were alone.

Tolerances: sums in float32 of at most 300 products err by a few of its last bits; a bfloat16 result is
rounded once.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.kernels.lora import LoraTable, TablePart, add_differentiably, by_columns
from hanok.kernels.native import ADD_LORA, Native, Step, recording

DTYPES = (torch.float32, torch.bfloat16)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-4},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-4},
}


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(
    ranks: Sequence[int], rows: Sequence[int], columns: int, dtype: torch.dtype, number: int = 0
) -> list[TablePart]:
    """The parts of an adapter; a rank of 0 leaves one out."""
    found, first = [], 0
    for index, (rank, count) in enumerate(zip(ranks, rows, strict=True)):
        if rank:
            seed = 100 * number + index
            a = random(rank, columns, seed=seed, dtype=dtype)
            b = by_columns(random(count, rank, seed=seed + 50, dtype=dtype))
            found.append(TablePart(number, first, a, b, 0.3 + index))
        first += count
    return found


def formula(parts: Sequence[TablePart], x: Tensor, chosen: Tensor, product: Tensor) -> Tensor:
    found = product.double().clone()
    for part in parts:
        mine = chosen == part.number
        delta = x[mine].double() @ part.a.double().t() @ part.b.double().t()
        found[mine, part.first_row : part.first_row + len(part.b)] += part.scale * delta
    return found


def result(kernels: Native, table: LoraTable, x: Tensor, chosen: Tensor, product: Tensor) -> Tensor:
    found = product.clone()
    table.add(kernels, x, chosen, found)
    return found


@both_dtypes
@settings(max_examples=40)
@given(
    tokens=st.integers(1, 40),
    columns=st.integers(1, 150),
    rows=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    ranks=st.lists(st.integers(0, 18), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_each_token_gets_what_its_own_adapter_adds_as_if_it_were_alone(
    kernels: Native,
    dtype: torch.dtype,
    tokens: int,
    columns: int,
    rows: list[int],
    ranks: list[int],
    seed: int,
) -> None:
    parts = drawn(ranks[: len(rows)], rows, columns, dtype, 7)
    parts += drawn(ranks[3 : 3 + len(rows)], rows, columns, dtype, 2)
    table = LoraTable(parts, sum(rows), columns)
    x = random(tokens, columns, seed=seed, dtype=dtype)
    product = random(tokens, sum(rows), seed=seed + 1, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor([-1, 2, 7])[torch.randint(3, (tokens,), generator=generator)]
    found = result(kernels, table, x, chosen, product)
    expected = formula(parts, x, chosen, product)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE[dtype])
    assert torch.equal(found[chosen == -1], product[chosen == -1])
    alone = [
        result(kernels, table, x[i : i + 1], chosen[i : i + 1], product[i : i + 1])
        for i in range(tokens)
    ]
    assert torch.equal(found, torch.cat(alone))


@both_dtypes
@pytest.mark.parametrize("tokens", [8, 100])
def test_any_number_of_threads_gives_the_same_bits(
    kernels: Native, with_threads: Callable[[int], None], dtype: torch.dtype, tokens: int
) -> None:
    """Over several pieces of ranks, rows and tokens."""
    parts = [
        part for number in range(3) for part in drawn((9, 0, 64), (2100, 5, 77), 300, dtype, number)
    ]
    table = LoraTable(parts, 2182, 300)
    x = random(tokens, 300, seed=1, dtype=dtype)
    product = random(tokens, 2182, seed=2, dtype=dtype)
    chosen = torch.arange(tokens) % 4 - 1
    with_threads(1)
    alone = result(kernels, table, x, chosen, product)
    torch.testing.assert_close(
        alone.double(), formula(parts, x, chosen, product), rtol=2**-8, atol=1e-3
    )
    for count in (2, 3):
        with_threads(count)
        assert torch.equal(result(kernels, table, x, chosen, product), alone)


@both_dtypes
def test_a_recorded_call_reads_the_tokens_adapters_when_it_is_replayed(
    kernels: Native, dtype: torch.dtype
) -> None:
    parts = [*drawn((4,), (33,), 40, dtype, 5), *drawn((8,), (33,), 40, dtype, 6)]
    table = LoraTable(parts, 33, 40)
    x, chosen = random(3, 40, seed=1, dtype=dtype), torch.tensor([5, 6, -1])
    product = torch.zeros(3, 33, dtype=dtype)
    with recording() as found:
        table.add(kernels, x, chosen, product)
    assert [step.operation for step in found.steps] == [ADD_LORA]
    for numbers in ([6, 6, 5], [-1, -1, -1], [5, -1, 6]):
        before = random(3, 33, seed=3, dtype=dtype)
        expected = result(kernels, table, x, torch.tensor(numbers), before)
        product.copy_(before)
        chosen.copy_(torch.tensor(numbers))
        kernels.run((Step * 1)(*found.steps))
        assert torch.equal(product, expected)


def test_no_number_and_infinity_stay_with_their_token(kernels: Native) -> None:
    parts = drawn((3,), (20,), 35, torch.float32, 1)
    table = LoraTable(parts, 20, 35)
    x = random(4, 35, seed=1, dtype=torch.float32)
    product, chosen = torch.zeros(4, 20), torch.tensor([1, 1, -1, 1])
    expected = result(kernels, table, x, chosen, product)
    x[0, 34], x[2, 0] = float("nan"), float("nan")
    found = result(kernels, table, x, chosen, product)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], expected[1:])


@both_dtypes
def test_a_gradient_is_that_of_torch(kernels: Native, dtype: torch.dtype) -> None:
    """In the dtype of x; A and B are float32, as they are while they learn."""
    x, base = (random(6, size, seed=size, dtype=dtype) for size in (40, 50))
    a = random(7, 40, seed=2, dtype=torch.float32).requires_grad_()
    bs = [random(20, 3, seed=3, dtype=torch.float32), random(25, 4, seed=4, dtype=torch.float32)]
    weights = [a, *(b.requires_grad_() for b in bs)]
    first_rows, scales, upstream = (0, 25), (0.5, 2.0), random(6, 50, seed=5, dtype=dtype)

    def gradients(output: Tensor, given: Tensor, product: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(output, [given, product, *weights], upstream))

    given, product = x.clone().requires_grad_(), base.clone().requires_grad_()
    ours = add_differentiably(kernels, given, product * 1, a, bs, first_rows, scales)
    found = gradients(ours, given, product)
    wide, wide_product = x.double().requires_grad_(), base.double().requires_grad_()
    inner = wide @ a.to(dtype).double().t()
    output = wide_product + torch.cat(
        [
            inner[:, :3] @ bs[0].to(dtype).double().t() * 0.5,
            torch.zeros(6, 5),
            inner[:, 3:] @ bs[1].to(dtype).double().t() * 2.0,
        ],
        dim=1,
    )
    torch.testing.assert_close(ours.double(), output, **TOLERANCE[dtype])
    upstream = upstream.double()
    expected = gradients(output, wide, wide_product)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-5
    for own, exact in zip(found, expected, strict=True):
        assert (own.double() - exact).norm() <= tolerance * exact.norm()


def test_what_would_be_read_out_of_bounds_is_refused(kernels: Native) -> None:
    parts = drawn((3,), (20,), 35, torch.float32)
    table = LoraTable(parts, 20, 35)
    x, product, chosen = torch.ones(2, 35), torch.ones(2, 20), torch.zeros(2, dtype=torch.int64)
    for wrong in ((x[:, 1:], chosen, product), (x, chosen[1:], product), (x, chosen, product[:1])):
        with pytest.raises(ValueError, match="the adapters are of a weight 20 x 35"):
            table.add(kernels, *wrong)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16, the product torch\.float32"):
        table.add(kernels, x.bfloat16(), chosen, product)
    with pytest.raises(ValueError, match="not int64"):
        table.add(kernels, x, chosen.int(), product)
    with pytest.raises(ValueError, match="x and the adapters differ"):
        table.add(kernels, x.bfloat16(), chosen, product.bfloat16())
    with pytest.raises(ValueError, match=r"A is torch\.float32 \(3, 35\) and B"):
        LoraTable([parts[0]._replace(b=parts[0].b[:, 1:])], 20, 35)
    with pytest.raises(ValueError, match="rows 1 to 21 of 20"):
        LoraTable([parts[0]._replace(first_row=1)], 20, 35)
