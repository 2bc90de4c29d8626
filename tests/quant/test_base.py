"""The seam: layouts and their choice, the plain one against the record, and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.errors import UnsupportedError
from hanok.quant import base
from hanok.quant.base import (
    Format,
    choose_layout,
    layouts,
    methods,
    quantize,
    reference,
    why_not_table,
)
from hanok.quant.kernels import plain as plain_module
from hanok.quant.kernels.plain import packed, torch_multiplies_bytes, unpacked, whole_product
from hanok.quant.recipe import read_recipe

CPU = torch.device("cpu")
RECIPES = (
    *("int8", "int8:group_size=0", "int4", "int4:symmetric=false,group_size=64"),
    *("nf4", "nf4:double_quant=true", "fp8", "int8-outlier"),
)
SETTINGS = settings(max_examples=40)


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(text: str, weight: Tensor) -> base.StoredWeight:
    rows, columns = weight.shape
    method = read_recipe(text).linears
    stored = layouts()["plain"].empty(method.format, (rows, columns), CPU, method)
    for start in range(0, rows, 64):
        stored.write_rows(start, weight[start : start + 64])
    stored.finish()
    return stored


@SETTINGS
@given(
    text=st.sampled_from([item for item in RECIPES if item != "int8-outlier"]),
    tokens=st.integers(0, 5),
    rows=st.integers(1, 130),
    columns=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_bias=st.booleans(),
)
def test_the_plain_layout_is_the_reference(
    text: str, tokens: int, rows: int, columns: int, dtype: torch.dtype, has_bias: bool
) -> None:
    weight = random(rows, columns)
    stored = plain(text, weight)
    record = quantize(stored.method, weight)
    assert torch.equal(stored.record().dequantize(), record.dequantize())
    x = random(tokens, columns, seed=2, dtype=dtype)
    bias = random(rows, seed=3, dtype=dtype) if has_bias else None
    found, exact = stored.matmul(x, bias), reference(x, record, bias)
    assert found.dtype is dtype
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-2}
    )
    torch.testing.assert_close(found.float(), exact, **tolerance)
    ids = torch.tensor([0, rows - 1])
    assert torch.equal(stored.rows(ids, torch.float32), record.dequantize()[ids])


@pytest.mark.parametrize("has_outliers", [False, True])
def test_outlying_columns_are_multiplied_in_floating_point(has_outliers: bool) -> None:
    """LLM.int8(), written out: columns of x with a value of 6 or more stay; the rest is int8 x int8."""
    weight, x = random(17, 40), random(5, 40, seed=2).clamp(-3, 3)
    if has_outliers:
        x[2, 7], x[4, 30] = 6.0, -60.0
    stored = plain("int8-outlier", weight)
    wide = stored.record().dequantize().double()
    is_outlier = (x.abs() >= 6).any(0)
    assert is_outlier.sum() == (2 if has_outliers else 0)
    usual = torch.where(is_outlier, torch.zeros(()), x).double()
    largest = usual.abs().amax(1, keepdim=True)
    rounded = (usual * 127 / largest).round() * largest / 127
    exact = rounded @ wide.t() + torch.where(is_outlier, x, torch.zeros(())).double() @ wide.t()
    torch.testing.assert_close(stored.matmul(x).double(), exact, rtol=1e-4, atol=1e-3)
    assert "outliers apart" in stored.kernel(1, torch.float32)


@pytest.mark.parametrize("is_exact", [True, False])
def test_products_of_the_largest_codes_are_exact(
    monkeypatch: pytest.MonkeyPatch, is_exact: bool
) -> None:
    """Also where torch would add pairs of them in 16 bits, which do not hold 2 x 127 x 255."""
    if is_exact and not torch_multiplies_bytes():
        pytest.skip("torch's own products are not exact here")
    monkeypatch.setattr(plain_module, "torch_multiplies_bytes", lambda: is_exact)
    for tokens, rows, columns in ((5, 17, 40), (1, 1030, 64), (40, 33, 300)):
        x = torch.full((tokens, columns), 127, dtype=torch.int8)
        x[:, ::3] = -127
        weight = torch.full((rows, columns), 127, dtype=torch.int8)
        exact = x.double() @ weight.double().t()
        assert torch.equal(whole_product(x, weight).double(), exact)


def test_all_zero_tokens_are_no_reason_to_divide_by_zero() -> None:
    stored = plain("int8-outlier", random(3, 8))
    assert torch.equal(stored.matmul(torch.zeros(2, 8)), torch.zeros(2, 3))


@SETTINGS
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), is_signed=st.booleans())
def test_packing_is_undone(rows: int, columns: int, is_signed: bool) -> None:
    generator = torch.Generator().manual_seed(rows * 10 + columns)
    low, high = (-8, 8) if is_signed else (0, 16)
    codes = torch.randint(low, high, (rows, columns), generator=generator)
    codes = codes.to(torch.int8 if is_signed else torch.uint8)
    bytes_ = packed(codes)
    assert bytes_.shape == (rows, -(-columns // 2))
    assert torch.equal(unpacked(bytes_, columns, is_signed=is_signed), codes)
    assert int(bytes_[0, 0]) & 15 == int(codes[0, 0]) & 15  # the even column is the low half


@pytest.mark.parametrize("text", RECIPES)
def test_x_gets_the_gradient_of_the_dequantized_weight(text: str) -> None:
    weight = random(6, 40)
    method = read_recipe(text).linears
    stored = choose_layout(method.format, CPU).empty(method.format, (6, 40), CPU, method)
    stored.write_rows(0, weight)
    stored.finish()
    x = random(3, 40, seed=2).requires_grad_()
    upstream = random(3, 6, seed=3)
    stored.matmul(x, random(6, seed=4)).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ stored.record().dequantize())


def test_every_layout_says_why_or_holds_it() -> None:
    for name in methods():
        form = read_recipe(name).linears.format
        for device in (CPU, torch.device("cuda")):
            table = why_not_table(form, device)
            assert set(table) == set(base.LAYOUT_ORDER) == set(layouts())
            chosen = choose_layout(form, device).name
            assert table[chosen] is None
            tried = base.LAYOUT_ORDER[: base.LAYOUT_ORDER.index(chosen)]
            assert all(table[item] for item in tried)
            assert table["plain"] is None


def test_where_no_layout_fits_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LAYOUT_ORDER", ("panels",))
    form = Format(kind="signed", bits=3, group_size=7, activations="float")
    with pytest.raises(UnsupportedError, match="no layout holds"):
        choose_layout(form, CPU)


def test_an_x_of_another_width_is_refused() -> None:
    stored = plain("int8", random(4, 8))
    for shape in ((2, 7), (8,), (1, 2, 8)):
        with pytest.raises(ValueError, match="the weight"):
            stored.matmul(torch.ones(shape))
