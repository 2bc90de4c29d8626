"""The Triton layout against `reference`: without a GPU in Triton's interpreter, else on the GPU.

Tolerances are shares of the sum of magnitudes. One token: exact codes and float32 sums, whose error is a
few units of 2^-24, times 12 where the products carry the 1 that is taken off again. Tiles round the
weights to x's dtype, every product its result: 2^-8 each in bfloat16, 2^-11 in float16.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.quant import base
from hanok.quant.base import Format, QuantMethod, choose_layout, layouts, reference, why_not_table
from hanok.quant.fp8 import Fp8
from hanok.quant.int4 import Int4
from hanok.quant.int8 import Int8
from hanok.quant.int8_outlier import Int8Outlier
from hanok.quant.kernels import triton as module
from hanok.quant.kernels.triton import TritonWeight, packed, unpacked
from hanok.quant.nested import NestedScale
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

grid = settings(
    max_examples=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
shapes = st.tuples(st.sampled_from([1, 3, 16, 70]), st.sampled_from([1, 5, 32, 33, 96, 200]))
dtypes = st.sampled_from(list(ROUNDING))


def stored_of(method: QuantMethod, weight: Tensor, device: torch.device) -> TritonWeight:
    rows, columns = weight.shape
    stored = TritonWeight(method, (rows, columns), device)
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
    answer = base.matmul(x, stored, bias)
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
