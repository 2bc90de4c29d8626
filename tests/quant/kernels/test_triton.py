"""The Triton layout against `reference`: without a GPU in Triton's interpreter, else on the GPU.

Tolerances are shares of the sum of magnitudes. One token: exact codes and float32 sums, whose error is a
few units of 2^-24, times 12 where the products carry the 1 that is taken off again. Tiles round the
weights to x's dtype, every product its result: 2^-8 each in bfloat16, 2^-11 in float16.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.quant import base
from hanok.quant.base import QuantMethod, choose_layout, layouts, reference, why_not_table
from hanok.quant.fp8 import Fp8
from hanok.quant.int4 import Int4
from hanok.quant.int8 import Int8
from hanok.quant.int8_outlier import Int8Outlier
from hanok.quant.kernels import triton as module
from hanok.quant.kernels.triton import TritonWeight, packed, unpacked
from hanok.quant.nf4 import Nf4

METHODS: list[QuantMethod] = [
    Int8(),
    Int8(group_size=32),
    Int8(group_size=0),
    Int4(),
    Int4(group_size=64),
    Int4(group_size=128, symmetric=False),
    Nf4(),
    Nf4(double_quant=True),
    Fp8(),
]
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.1 * 2.0**-11, torch.bfloat16: 2.1 * 2.0**-8}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

grid = settings(max_examples=14, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = st.tuples(st.sampled_from([1, 3, 16, 70]), st.sampled_from([1, 5, 32, 33, 96, 200]))
dtypes = st.sampled_from(list(ROUNDING))


def stored_of(method: QuantMethod, weight: Tensor, device: torch.device) -> TritonWeight:
    rows, columns = weight.shape
    stored = TritonWeight(method.format, (rows, columns), device, method)
    middle = rows // 2
    stored.write_rows(middle, weight[middle:])
    if middle:
        stored.write_rows(0, weight[:middle])
    stored.finish()
    return stored


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def assert_product(x: Tensor, stored: TritonWeight, bias: Tensor | None) -> None:
    """The error is measured against the sum of magnitudes, which bounds what rounding can do."""
    record = stored.record()
    answer = stored.matmul(x, bias)
    expected = reference(x, record, bias)
    magnitudes = x.float().abs() @ record.dequantize().abs().t() + 1e-6
    assert answer.dtype == x.dtype
    assert answer.shape == expected.shape
    error = (answer.float() - expected).abs() / (magnitudes + expected.abs())
    assert error.numel() == 0 or float(error.max()) < ROUNDING[x.dtype]


@pytest.mark.parametrize("method", METHODS, ids=str)
@given(
    shape=shapes,
    tokens=st.sampled_from([0, 1, 1, 2, 16, 19]),
    dtype=dtypes,
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@grid
def test_products_are_those_of_the_reference(
    method: QuantMethod,
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    has_bias: bool,
    seed: int,
    kernel_device: torch.device,
) -> None:
    rows, columns = shape
    stored = stored_of(method, drawn(rows, columns, seed).to(kernel_device), kernel_device)
    x = drawn(tokens, columns, seed + 1).to(kernel_device, dtype)
    bias = drawn(1, rows, seed + 2)[0].to(kernel_device, dtype) if has_bias else None
    assert_product(x, stored, bias)


@pytest.mark.parametrize("method", METHODS, ids=str)
@given(shape=shapes, seed=st.integers(0, 99))
@settings(grid, max_examples=6)
def test_the_record_is_what_the_method_made(
    method: QuantMethod, shape: tuple[int, int], seed: int
) -> None:
    weight = drawn(*shape, seed)
    expected = base.quantize(method, weight)
    record = stored_of(method, weight, CPU).record()
    assert record.format == expected.format
    assert record.codes.dtype == expected.codes.dtype
    assert torch.equal(record.codes.float(), expected.codes.float())
    assert torch.equal(record.float_scale(), expected.float_scale())
    assert (record.zero is None) == (expected.zero is None)
    assert record.zero is None or torch.equal(record.zero, expected.zero)


def test_bytes_are_where_the_kernels_read_them() -> None:
    """4 bits: columns 0 to 15 of a unit in the low halves, 16 to 31 in the high ones."""
    codes = torch.arange(40, dtype=torch.uint8)[None] % 16
    form = Int4(symmetric=False).format
    stored = packed(form, codes)
    assert stored.shape == (1, 32)
    assert [byte & 15 for byte in stored[0, :16].tolist()] == codes[0, :16].tolist()
    assert [byte >> 4 for byte in stored[0, :16].tolist()] == codes[0, 16:32].tolist()
    assert stored[0, 16:24].tolist() == codes[0, 32:].tolist()
    assert stored[0, 24:].tolist() == [0] * 8
    assert torch.equal(unpacked(form, stored, 40), codes)
    signed = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert packed(Int8().format, signed)[0, :4].tolist() == [0, 127, 128, 255]


def test_sizes_are_what_the_method_says() -> None:
    for method in METHODS:
        stored = stored_of(method, drawn(64, 256, 0), CPU)
        expected = method.bits_per_weight(256) * 64 * 256 / 8
        tables = 64 + 1024 if method.format.codebook is not None else 0
        assert expected <= stored.nbytes <= expected + tables


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_rows_are_looked_up(method: QuantMethod, kernel_device: torch.device) -> None:
    stored = stored_of(method, drawn(9, 70, 3).to(kernel_device), kernel_device)
    ids = torch.tensor([8, 0, 3, 3], device=kernel_device)
    expected = stored.record().dequantize()[ids]
    torch.testing.assert_close(stored.rows(ids, torch.float32), expected, atol=1e-6, rtol=1e-6)
    assert stored.rows(ids[:0], torch.bfloat16).shape == (0, 70)


@pytest.mark.parametrize("method", [Int8(), Int4(), Nf4()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_tokens_are_multiplied_block_by_block(
    method: QuantMethod,
    dtype: torch.dtype,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 70 * 5)  # not a divisor of the rows
    monkeypatch.setattr(module, "TILE_TOKENS", 2)
    stored = stored_of(method, drawn(13, 70, 1).to(kernel_device), kernel_device)
    x = drawn(5, 70, 2).to(kernel_device, dtype)
    assert_product(x, stored, drawn(1, 13, 3)[0].to(kernel_device, dtype))


def test_long_rows_are_split_and_added_up_in_turn(kernel_device: torch.device) -> None:
    """Few rows and many columns: several programs share a row, and give the same bits each time."""
    stored = stored_of(Int4(), drawn(3, 4500, 1).to(kernel_device), kernel_device)
    for tokens in (1, 3):
        x = drawn(tokens, 4500, 2).to(kernel_device)
        assert_product(x, stored, drawn(1, 3, 3)[0].to(kernel_device))
        assert torch.equal(stored.matmul(x, None), stored.matmul(x, None))


def test_x_may_be_a_view(kernel_device: torch.device) -> None:
    stored = stored_of(Int8(), drawn(5, 40, 1).to(kernel_device), kernel_device)
    wide = drawn(3, 80, 2).to(kernel_device)
    assert_product(wide[:, 40:], stored, None)
    assert_product(wide[:1, ::2], stored, None)


def test_each_number_of_tokens_has_a_kernel() -> None:
    stored = TritonWeight(Int4().format, (16, 64), CPU, Int4())
    names = [stored.kernel(tokens, torch.bfloat16) for tokens in (1, 2, 16, 17, 256, 257)]
    assert names[1] == names[2]
    assert names[3] == names[4]
    assert len(set(names)) == 4
    assert names[-1].startswith("torch")


def test_other_dtypes_of_x_are_refused(kernel_device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        TritonWeight(Int4().format, (16, 64), CPU, Int4()).matmul(torch.ones(1, 64).double(), None)


def test_the_layout_is_for_gpus_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layouts()["triton"]
    assert layout.why_not(Int4().format, CPU) == "needs a CUDA device (found: cpu)"
    assert choose_layout(Int4().format, CPU).name != "triton"
    assert "rounds no activations" in str(layout.why_not(Int8Outlier().format, CUDA))
    odd = replace(Int4().format, group_size=48)
    assert "multiple of 32 columns" in str(layout.why_not(odd, CUDA))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install triton" in str(layout.why_not(Int4().format, CUDA))
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    for method in METHODS:
        assert why_not_table(method.format, CUDA)["triton"] is None
        assert choose_layout(method.format, CUDA) is layout


def test_choosing_a_layout_imports_no_triton() -> None:
    code = (
        "import sys, torch\n"
        "from hanok.quant.base import choose_layout, methods\n"
        "from hanok.attention.base import backends\n"
        "for kind in methods().values():\n"
        "    choose_layout(kind().format, torch.device('cpu'))\n"
        "backends()\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("tokens", "shared_bytes"), [(70, 0), (130, 0), (130, 2**18)])
@pytest.mark.parametrize("method", [Int8(), Nf4()], ids=str)
def test_larger_tiles_are_those_of_the_reference(
    method: QuantMethod,
    tokens: int,
    shared_bytes: int,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of 64, 128 and 256 tokens, as GPUs with little or much shared memory get them."""
    if kernel_device.type == "cpu":
        from hanok.kernels import triton_linear

        monkeypatch.setattr(triton_linear, "_shared_bytes", lambda device: shared_bytes)
    stored = stored_of(method, drawn(150, 90, 1).to(kernel_device), kernel_device)
    assert_product(drawn(tokens, 90, 2).to(kernel_device, torch.float16), stored, None)
