"""Panels against the record and its `reference`, on every instruction set.

x rounded to int8 is part of the answer, so the oracle rounds it too, plainly; what is left is the order
of float32 sums.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.kernels.native import (
    Native,
    built_instruction_sets,
    emulated_amx,
    has_wrong_tiles,
    why_not,
)
from hanok.quant.base import Format, QuantizedWeight, QuantMethod, method_of, reference
from hanok.quant.kernels import panels as module
from hanok.quant.kernels.panels import LAYOUT, PanelWeight
from hanok.quant.recipe import read_recipe

WHOLE = (
    *("int8", "int8:group_size=64", "int8:group_size=128", "int4", "int4:group_size=64"),
    *("int4:group_size=128", "int4:symmetric=false", "nf4"),
    "int4:symmetric=false,group_size=128",
)
FLOAT = ("int8:group_size=0", "fp8")
SETTINGS = settings(max_examples=30)
CPU = torch.device("cpu")


def method(text: str) -> QuantMethod:
    return read_recipe(text).linears


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(kernels: Native, text: str, weight: Tensor) -> PanelWeight:
    rows, columns = weight.shape
    made = PanelWeight(method(text).format, (rows, columns), method(text), kernels)
    made.write_rows(0, weight)
    made.finish()
    return made


def rounded(x: Tensor, group_size: int) -> Tensor:
    """Round each group of a row: its largest magnitude becomes 127."""
    wide = x.float()
    groups = torch.nn.functional.pad(wide, (0, -wide.shape[1] % group_size))
    groups = groups.view(len(x), -(-x.shape[1] // group_size), group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)
    codes = (groups * inverse).round()
    return (codes * (largest / 127)).flatten(1)[:, : x.shape[1]]


def as_multiplied(record: QuantizedWeight) -> QuantizedWeight:
    """The codebook as the kernels multiply it: in steps of 1 / 127."""
    from dataclasses import replace

    if record.format.codebook is None:
        return record
    steps = tuple(round(value * 127) / 127 for value in record.format.codebook)
    return replace(record, format=replace(record.format, codebook=steps))


@SETTINGS
@given(
    text=st.sampled_from(WHOLE),
    tokens=st.integers(0, 9),
    rows=st.integers(1, 50),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_bias=st.booleans(),
    is_strided=st.booleans(),
)
def test_products_of_whole_numbers_are_those_of_the_reference(
    kernels: Native,
    text: str,
    tokens: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    has_bias: bool,
    is_strided: bool,
) -> None:
    weight = stored(kernels, text, random(rows, columns, seed=2))
    x = random(2 * tokens, columns + 1, dtype=dtype)[::2, 1:] if is_strided else None
    x = random(tokens, columns, dtype=dtype) if x is None else x
    bias = random(rows, seed=3, dtype=dtype) if has_bias else None
    found = weight.matmul(x, bias)
    size = weight.format.group_size
    assert size is not None
    exact = reference(rounded(x, size), as_multiplied(weight.record()), bias)
    assert found.dtype is dtype
    # A tie of x may round to the other side where a division is fused: one code of a group of many.
    tolerance = (
        {"rtol": 1e-4, "atol": 2e-2} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 5e-2}
    )
    torch.testing.assert_close(found.float(), exact, **tolerance)
    if found.numel() and dtype is torch.float32:
        assert float((found - exact).norm() / exact.norm().clamp(min=1e-6)) < 5e-3
        # Rounding x to 8 bits costs about 1 / (127 * sqrt(12) / 3) of its size.
        loose = reference(x, weight.record(), bias)
        assert float((found - loose).norm()) < 0.03 * float(loose.norm()) + 0.1


@SETTINGS
@given(
    text=st.sampled_from(FLOAT),
    tokens=st.integers(0, 19),
    rows=st.integers(1, 50),
    columns=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_bias=st.booleans(),
)
def test_products_with_x_as_it_is_are_those_of_the_reference(
    kernels: Native,
    text: str,
    tokens: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    has_bias: bool,
) -> None:
    weight = stored(kernels, text, random(rows, columns, seed=2))
    x = random(tokens, columns, dtype=dtype)
    bias = random(rows, seed=3, dtype=dtype) if has_bias else None
    exact = reference(x, weight.record(), bias)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-2}
    )
    torch.testing.assert_close(weight.matmul(x, bias).float(), exact, **tolerance)


@SETTINGS
@given(
    text=st.sampled_from([*WHOLE, *FLOAT]),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_zeros=st.booleans(),
)
def test_packed_is_what_the_method_quantizes(
    kernels: Native, text: str, rows: int, columns: int, dtype: torch.dtype, has_zeros: bool
) -> None:
    weight = random(rows, columns, dtype=dtype)
    if has_zeros:
        weight[:, : columns // 2] = 0
        weight[rows // 2] = 0
    made = PanelWeight(method(text).format, (rows, columns), method(text), kernels)
    for start in range(0, rows, 64):
        made.write_rows(start, weight[start : start + 64])
    found, wanted = made.record(), made.method.quantize(weight)
    assert found.format == wanted.format
    assert found.codes.dtype is wanted.codes.dtype
    assert found.float_scale().shape == wanted.float_scale().shape
    if text.startswith("int4") and "symmetric" not in text:
        # Two scales of equal error may win either way, as sums are added in another order.
        assert (found.codes == wanted.codes).float().mean() > 0.95
        errors = [(item.dequantize() - weight.float()).norm() for item in (found, wanted)]
        torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=1e-6)
        return
    assert torch.equal(found.codes.float(), wanted.codes.float())
    assert torch.equal(found.float_scale(), wanted.float_scale())
    if wanted.zero is not None:
        assert found.zero is not None
        assert torch.equal(found.zero, wanted.zero)


@SETTINGS
@given(text=st.sampled_from([*WHOLE, *FLOAT]), rows=st.integers(1, 70), columns=st.integers(1, 140))
def test_rows_are_the_records(kernels: Native, text: str, rows: int, columns: int) -> None:
    weight = stored(kernels, text, random(rows, columns))
    wide = weight.record().dequantize()
    ids = torch.tensor([rows - 1, 0, rows // 2, rows - 1])
    torch.testing.assert_close(weight.rows(ids, torch.float32), wide[ids], rtol=1e-6, atol=0)
    narrow = weight.rows(ids, torch.bfloat16)
    torch.testing.assert_close(narrow.float(), wide[ids], rtol=2**-8, atol=0)
    start = rows // 32 * 16
    part = kernels.unpack(weight._panels, start, rows - start)
    torch.testing.assert_close(part, wide[start:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", [*WHOLE, *FLOAT])
def test_a_token_alone_is_the_token_in_company(kernels: Native, text: str) -> None:
    """Also over the border of 512 tokens, and where columns go in chunks."""
    columns = 1100
    weight = stored(kernels, text, random(45, columns, seed=2))
    counts = (2, 3, 4, 5, 6, 7, 8, 17, 70, 515) if text in WHOLE else (2, 3, 4, 7, 8)
    if kernels.instruction_set == "portable":
        counts = counts[:8]
    x = random(max(counts), columns)
    for count in counts:
        together = weight.matmul(x[:count], None)
        for token in {0, 1, count // 2, count - 1}:
            assert torch.equal(together[token], weight.matmul(x[token : token + 1], None)[0])


@pytest.mark.parametrize("tokens", [1, 5, 30])
@pytest.mark.parametrize("text", [*WHOLE, *FLOAT])
def test_threads_change_no_bit(
    kernels: Native, text: str, tokens: int, with_threads: Callable[[int], None]
) -> None:
    if text in FLOAT and tokens > 8:
        tokens = 8
    weight = stored(kernels, text, random(2600, 400, seed=2))  # more than one thread does alone
    x, answers = random(tokens, 400), []
    for count in (1, 2, 3):
        with_threads(count)
        answers.append(weight.matmul(x, None))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("text", [*WHOLE, *FLOAT])
def test_what_is_no_number_stays_in_its_token(kernels: Native, text: str, value: float) -> None:
    weight, x = stored(kernels, text, random(20, 140, seed=2)), random(3, 140)
    expected = weight.matmul(x, None)
    x[1, 133] = value
    found = weight.matmul(x, None)
    assert not found[1].isfinite().any()
    assert torch.equal(found[::2], expected[::2])


@pytest.mark.parametrize("text", ["int8", "nf4", "fp8", "int8:group_size=0"])
def test_a_weight_that_is_no_number_is_not_made_one(kernels: Native, text: str) -> None:
    weight = random(20, 140)
    weight[3, 7] = float("nan")
    product = stored(kernels, text, weight).matmul(random(1, 140), None)
    assert product[0, 3].isnan()
    assert product[0, 4:].isfinite().all()


def test_a_zero_row_of_x_and_of_the_weight_give_zero(kernels: Native) -> None:
    for text in (*WHOLE, *FLOAT):
        weight = random(18, 70)
        weight[17] = 0
        made = stored(kernels, text, weight)
        assert torch.equal(made.matmul(torch.zeros(2, 70), None), torch.zeros(2, 18))
        assert made.matmul(random(1, 70), None)[0, 17] == 0


@pytest.mark.parametrize("text", WHOLE)
def test_numbers_too_small_to_be_divided_by_do_not_become_others(
    kernels: Native, text: str
) -> None:
    """127 over the largest magnitude of such a group is infinite."""
    weight = stored(kernels, text, random(16, 40))
    assert weight.matmul(torch.full((1, 40), 1e-39), None).abs().max() < 1e-36


def test_what_would_be_read_out_of_bounds_is_refused(kernels: Native) -> None:
    weight = stored(kernels, "int8", random(20, 140))
    with pytest.raises(ValueError, match="x is 1 x 139, the weight 20 x 140"):
        weight.matmul(random(1, 139), None)
    with pytest.raises(ValueError, match="the bias has shape"):
        weight.matmul(random(1, 140), random(19))
    with pytest.raises(ValueError, match="kernels take float32 and bfloat16"):
        weight.matmul(random(1, 140).half(), None)
    for start, count in ((8, 4), (16, 5), (32, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            weight.write_rows(start, random(count, 140))
    with pytest.raises(ValueError, match="do not fit"):
        weight.write_rows(0, random(4, 141))
    for ids in ([20], [-1], [3, 20]):
        with pytest.raises(IndexError):
            weight.rows(torch.tensor(ids), torch.float32)
    assert weight.rows(torch.tensor([], dtype=torch.int64), torch.float32).shape == (0, 140)
    with pytest.raises(ValueError, match="are not those of"):
        kernels.unpack(weight._panels, 16, 5)
    rows = stored(kernels, "fp8", random(20, 140))
    with pytest.raises(ValueError, match="at most 8"):
        kernels.product(random(9, 140), rows._panels, None)


def test_bytes_are_what_the_bits_say(kernels: Native) -> None:
    for text in (*WHOLE, *FLOAT):
        made = PanelWeight(method(text).format, (64, 256), method(text), kernels)
        assert made.nbytes * 8 == 64 * 256 * made.method.bits_per_weight(256)
        assert made.device == CPU


def test_the_kernel_is_named_by_method_and_tokens(kernels: Native) -> None:
    name = kernels.instruction_set
    whole = PanelWeight(method("int4").format, (16, 32), method("int4"), kernels)
    rows = PanelWeight(method("fp8").format, (16, 32), method("fp8"), kernels)
    assert whole.kernel(1, torch.float32) == whole.kernel(512, torch.bfloat16)
    assert whole.kernel(1, torch.float32) == f"hanok {name}, x rounded to int8"
    assert rows.kernel(8, torch.float32) == f"hanok {name}, x as it is"
    assert rows.kernel(9, torch.float32).startswith("torch")


def test_what_panels_do_not_hold_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = method("int8").format
    assert "run on a CPU (found: cuda)" in str(LAYOUT.why_not(plain, torch.device("cuda")))
    odd = Format(kind="signed", bits=4, group_size=48, activations="int8")
    odd_bits = Format(kind="signed", bits=3, group_size=None, activations="float")
    if why_not() is None:
        assert LAYOUT.why_not(plain, CPU) is None
        nested = method_of("nf4", {"double_quant": "true"}).format
        assert "quantized themselves" in str(LAYOUT.why_not(nested, CPU))
        assert "outlying columns" in str(LAYOUT.why_not(method("int8-outlier").format, CPU))
        assert "groups of 48" in str(LAYOUT.why_not(odd, CPU))
        assert "codes of 3 bits in groups of whole rows" in str(LAYOUT.why_not(odd_bits, CPU))
    monkeypatch.setattr(module, "native", lambda: None)
    assert "the kernels are" in str(LAYOUT.why_not(plain, CPU))
    with pytest.raises(ValueError, match="panels were chosen where they do not fit"):
        LAYOUT.empty(method("int8").format, (16, 32), CPU, method("int8"))


@pytest.mark.parametrize("text", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_give_the_bits_of_vectors(
    text: str, dtype: torch.dtype, with_threads: Callable[[int], None]
) -> None:
    """AMX's steps, with loops in place of its tiles: no machine of the tests need have them."""
    tiles = emulated_amx()
    if tiles is None:
        pytest.skip("its other steps are AVX-512's, which this processor does not have")
    vectors = next(item for item in built_instruction_sets() if item.key == "avx512")
    for rows, columns in ((45, 1100), (16, 128), (1, 33), (130, 520)):
        weight, bias = random(rows, columns, seed=2), random(rows, seed=3).to(dtype)
        ours, theirs = stored(tiles, text, weight), stored(vectors, text, weight)
        for tokens in (1, 16, 17, 63, 64, 65, 128, 200):
            x = random(tokens, columns, dtype=dtype)
            x[tokens // 2] = 0.0
            for count in (1, 2):
                with_threads(count)
                assert torch.equal(ours.matmul(x, bias), theirs.matmul(x, bias))


def test_a_processors_tiles_are_used_where_they_agree() -> None:
    assert not has_wrong_tiles()
