"""Weights given as codes: what comes from elsewhere is held exactly, and multiplied by our kernels."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hanok
from hanok.engine.passes import WeightVersion
from hanok.kernels.native import why_not
from hanok.quant import base
from hanok.quant.base import (
    Format,
    QuantizedWeight,
    StoredWeight,
    choose_layout,
    layouts,
    methods,
    reference,
    stored,
)
from hanok.quant.int4 import Int4
from hanok.quant.kernels.panels import rounds_x
from hanok.quant.nested import NestedScale
from hanok.quant.nf4 import CODEBOOK, Nf4
from hanok.quant.recipe import read_recipe
from hanok.quant.stacked import StackedWeight

CPU = torch.device("cpu")
LAYOUTS = [name for name in ("panels", "plain") if name == "plain" or why_not() is None]
SETTINGS = settings(max_examples=30)
AWQ = Format(kind="zero", bits=4, group_size=128, activations="float", scale=torch.float16)
FORMATS = {
    "awq": AWQ,
    "gptq, 8 bits with zeros": replace(AWQ, bits=8),
    "minimum and scale of 32": replace(AWQ, group_size=32, scale=torch.float32, zero=torch.float32),
    "bfloat16 scales": replace(AWQ, kind="signed", bits=8, scale=torch.bfloat16),
    "codebook": Format(
        kind="codebook", bits=4, group_size=64, activations="float", codebook=CODEBOOK
    ),
    "blocks of fp8": Format(kind="float8", bits=8, group_size=128, activations="float"),
    "whole rows of 4 bits": Format(kind="signed", bits=4, group_size=None, activations="float"),
}


def drawn(form: Format, shape: tuple[int, int], seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = form.num_groups(columns)
    codes = torch.randint(0, 2**form.bits, shape, generator=generator, dtype=torch.uint8)
    if form.kind == "signed":
        codes = (codes.short() - 2 ** (form.bits - 1)).char()
    elif form.kind == "float8":
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    zero = None
    if form.kind == "zero":
        whole = torch.randint(0, 2**form.bits, (rows, groups), generator=generator)
        parts = torch.rand(rows, groups, generator=generator) if form.zero.is_floating_point else 0
        zero = (whole + parts).to(form.zero)
    scale = (0.01 + torch.rand(rows, groups, generator=generator)).to(form.scale)
    return QuantizedWeight(format=form, codes=codes, scale=scale, zero=zero)


def held(record: QuantizedWeight, layout: str) -> StoredWeight:
    weight = layouts()[layout].empty(record.format, record.shape, CPU)
    weight.write(0, record)
    weight.finish()
    return weight


def are_equal(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert found.format == expected.format
    for name in ("codes", "scale", "zero", "order"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            assert ours.dtype is theirs.dtype, name
            assert torch.equal(ours.float(), theirs.float()), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
@SETTINGS
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    tokens=st.integers(0, 11),
    seed=st.integers(0, 9),
)
def test_codes_come_back_and_multiply_x_as_it_is(
    layout: str, name: str, rows: int, columns: int, tokens: int, seed: int
) -> None:
    """Were x rounded to int8, the error would be some tenths of a percent, not of a millionth."""
    record = drawn(FORMATS[name], (rows, columns), seed)
    weight = held(record, layout)
    are_equal(weight.record(), record)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    exact = reference(x, record)
    size = x.abs() @ record.dequantize().abs().t()
    assert bool(((weight.matmul(x) - exact).abs() <= 3e-6 * size + 1e-6).all())
    ids = torch.tensor([rows - 1, 0])
    assert torch.equal(weight.rows(ids, torch.float32), record.dequantize()[ids])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_format_that_allows_it_may_have_x_rounded(layout: str) -> None:
    record = drawn(replace(AWQ, activations="int8"), (32, 256))
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    exact = reference(x, record)
    error = float((held(record, layout).matmul(x) - exact).norm() / exact.norm())
    is_rounded = layout == "panels" and rounds_x(record.format)
    assert error < 2e-2
    assert (error > 1e-4) == is_rounded


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["awq", "minimum and scale of 32"])
def test_columns_whose_groups_are_not_in_turn_are_permuted_once(layout: str, name: str) -> None:
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    order = (torch.arange(256) // (form.group_size or 1))[torch.randperm(256, generator=generator)]
    record = replace(drawn(form, (48, 256)), order=order)
    weight = held(record, layout)
    are_equal(weight.record(), record)
    x = torch.randn(3, 256, generator=generator)
    torch.testing.assert_close(weight.matmul(x), reference(x, record), atol=1e-3, rtol=1e-5)
    ids = torch.tensor([5, 0])
    assert torch.equal(weight.rows(ids, torch.float32), record.dequantize()[ids])
    x.requires_grad_()
    upstream = torch.randn(3, 48, generator=generator)
    weight.matmul(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ record.dequantize(), atol=1e-3, rtol=1e-5)
    other = replace(record, order=order.flip(0))
    with pytest.raises(ValueError, match="another order"):
        weight.write(0, other)
    with pytest.raises(ValueError, match="groups are not of"):
        held(replace(record, order=order.clamp(max=0)), layout)
    longer = layouts()[layout].empty(form, (96, 256), CPU)
    longer.write(0, replace(record, order=None))
    with pytest.raises(ValueError, match="another order"):
        longer.write(48, record)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_brings_the_order_of_columns_along(layout: str) -> None:
    order = (torch.arange(256) // 128).flip(0)
    record = replace(drawn(AWQ, (32, 256)), order=order)
    other = layouts()[layout].empty(AWQ, (32, 256), CPU)
    other.load_state_dict(held(record, layout).state_dict())
    are_equal(other.record(), record)


def test_scales_that_are_codes_already_are_held_exactly() -> None:
    """Those of two files' tensors have blocks and offsets of their own: parts of one weight."""
    form = replace(FORMATS["codebook"], has_nested_scale=True)
    records = []
    for seed, rows in enumerate((20, 12)):
        plain = drawn(FORMATS["codebook"], (rows, 256), seed)
        scale = replace(NestedScale.of(plain.float_scale()), offset=0.1 + seed)
        records.append(replace(plain, format=form, scale=scale))
    for record in records:
        weight = stored(record)
        again = layouts()["plain"].empty(form, record.shape, CPU)
        again.load_state_dict(weight.state_dict())
        for found in (weight.record(), again.record()):
            assert isinstance(found.scale, NestedScale)
            assert isinstance(record.scale, NestedScale)
            assert found.scale.codes.dtype is torch.uint8
            assert torch.equal(found.scale.codes, record.scale.codes)
            assert torch.equal(found.scale.absmax, record.scale.absmax)
            assert found.scale.offset == record.scale.offset
    whole = torch.cat([record.dequantize() for record in records])
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    both = StackedWeight([stored(record) for record in records])
    torch.testing.assert_close(both.matmul(x), x @ whole.t(), atol=2e-3, rtol=1e-5)
    together = layouts()["plain"].empty(form, (32, 256), CPU)
    with pytest.raises(ValueError, match="scales of 20 rows are quantized together"):
        together.write(0, records[0])
    strange = replace(records[0].scale, codebook=torch.linspace(-1, 1, 256))
    with pytest.raises(ValueError, match="another map"):
        stored(replace(records[0], scale=strange))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_of_another_format_is_refused(layout: str) -> None:
    """Shapes alone do not tell int4 from nf4 in groups of 64."""
    ours, theirs = Int4(group_size=64).format, Nf4().format
    weight = layouts()[layout].empty(theirs, (32, 128), CPU)
    state = layouts()[layout].empty(ours, (32, 128), CPU).state_dict()
    with pytest.raises(RuntimeError, match=r"scale is torch\.float16"):
        weight.load_state_dict(state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_that_is_assigned_is_multiplied(layout: str) -> None:
    """torch then puts other tensors in the buffers' place: addresses that were kept are others'."""
    first, second = drawn(AWQ, (32, 256), 0), drawn(AWQ, (32, 256), 1)
    weight, x = held(first, layout), torch.ones(1, 256)
    before = weight.matmul(x)
    weight.load_state_dict(held(second, layout).state_dict(), assign=True)
    assert not torch.equal(weight.matmul(x), before)
    assert torch.equal(weight.matmul(x), held(second, layout).matmul(x))


def test_parts_in_formats_of_their_own_are_one_weight() -> None:
    records = [
        drawn(FORMATS[name], (rows, 256), seed)
        for seed, (name, rows) in enumerate((("awq", 20), ("codebook", 7), ("blocks of fp8", 9)))
    ]
    weight = StackedWeight([stored(record) for record in records])
    whole = torch.cat([record.dequantize() for record in records])
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bias = torch.arange(36.0)
    found = weight.matmul(x, bias)
    torch.testing.assert_close(found, x @ whole.t() + bias, atol=2e-3, rtol=1e-5)
    found.backward(torch.ones_like(found))
    torch.testing.assert_close(x.grad, torch.ones(3, 36) @ whole, atol=2e-3, rtol=1e-5)
    ids = torch.tensor([35, 0, 22])
    assert torch.equal(weight.rows(ids, torch.float32), whole[ids])
    assert weight.nbytes == sum(stored(record).nbytes for record in records)


def test_records_of_another_format_or_place_are_refused() -> None:
    record = drawn(AWQ, (16, 256))
    weight = layouts()["plain"].empty(AWQ, (16, 256), CPU)
    with pytest.raises(ValueError, match="rows 8 to 24 of 16"):
        weight.write(8, record)
    with pytest.raises(ValueError, match="of 256 columns for"):
        weight.write(0, drawn(replace(AWQ, bits=8), (16, 256)))
    with pytest.raises(ValueError, match="no method is known"):
        weight.write_rows(0, torch.ones(16, 256))


RECIPES = ["int8", "int4", "int4:symmetric=false", "nf4", "nf4:double_quant=true", "fp8"]


@pytest.mark.parametrize("quant", RECIPES)
def test_a_quantized_decoder_is_saved_moved_and_copied_as_any_module(quant: str) -> None:
    model = hanok.load(hanok.BUNDLED, quant=quant, dtype="float32")
    expected = model.logits([5, 9, 200])
    state = {name: part.clone() for name, part in model.decoder.state_dict().items()}
    assert any(name.endswith("qkv_proj.weight.codes") for name in state)
    twin = copy.deepcopy(model.decoder)
    for name, part in model.decoder.state_dict().items():
        part.zero_() if part.dtype is not torch.float8_e4m3fn else part.view(torch.uint8).zero_()
        assert not bool(part.float().any()), name
    # What changed in place is noticed: no key of the old weights is left in a cache.
    assert not torch.equal(model.logits([5, 9, 200]), expected)
    texts = [model.generate([5, 9, 200], max_new_tokens=5).token_ids]
    model.decoder.load_state_dict(state)
    texts.append(model.generate([5, 9, 200], max_new_tokens=5).token_ids)
    assert (
        texts[1]
        == hanok.load(hanok.BUNDLED, quant=quant, dtype="float32")
        .generate([5, 9, 200], max_new_tokens=5)
        .token_ids
    )
    assert texts[0] != texts[1]
    assert torch.equal(model.logits([5, 9, 200]), expected)
    ours = dict(model.decoder.named_buffers())
    for name, part in twin.named_buffers():
        assert part.data_ptr() != ours[name].data_ptr() or not part.numel(), name
    model.decoder = twin
    assert torch.equal(model.logits([5, 9, 200]), expected)
    moved = twin.to(torch.bfloat16)
    for name, part in moved.named_buffers():
        assert part.dtype is ours[name].dtype or name.endswith("like"), name
    assert all(part.is_meta for part in moved.to("meta").state_dict().values())


def test_codes_that_change_in_place_make_other_weights() -> None:
    """So that no key of the old ones is used again."""
    decoder = hanok.load(hanok.BUNDLED, quant="int4", dtype="float32").decoder
    version = WeightVersion(decoder)
    first = version.number()
    assert version.number() == first
    decoder.layers[0].mlp.down_proj.weight.scale.mul_(2)
    assert version.number() != first


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A method that nobody knows but one file would define: multiples of 1/2, a scale for each row."""
    calls: list[tuple[int, ...]] = []

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Halves:
        name: ClassVar[str] = "halves"
        summary: ClassVar[str] = "multiples of a half"

        @property
        def format(self) -> Format:
            return Format(kind="signed", bits=8, group_size=64, activations="float")

        def bits_per_weight(self, columns: int) -> float:
            return 8 + 32 * self.format.num_groups(columns) / columns

        def quantize(self, weight: Tensor) -> QuantizedWeight:
            calls.append(tuple(weight.shape))
            scale = torch.full((len(weight), self.format.num_groups(weight.shape[1])), 0.5)
            codes = (weight.float() * 2).round().clamp(-128, 127).char()
            return QuantizedWeight(format=self.format, codes=codes, scale=scale)

    monkeypatch.setattr(base, "methods", lambda: {**methods(), "halves": Halves})
    return calls


def test_a_new_method_needs_nothing_but_its_file(halves: list[tuple[int, ...]]) -> None:
    assert read_recipe("halves").linears.name == "halves"
    model = hanok.load(hanok.BUNDLED, quant="halves:head=none", dtype="float32")
    assert halves
    plain = hanok.load(hanok.BUNDLED, dtype="float32").decoder
    weight = model.decoder.layers[0].mlp.down_proj.weight
    expected = (plain.layers[0].mlp.down_proj.weight * 2).round() / 2
    assert torch.equal(weight.record().dequantize(), expected)
    x = torch.randn(2, expected.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight.matmul(x), x @ expected.t(), atol=1e-4, rtol=1e-5)


def test_a_method_that_inherits_a_packer_and_quantizes_itself_is_asked() -> None:
    calls = []

    class Counted(Int4):
        def quantize(self, weight: Tensor) -> QuantizedWeight:
            calls.append(len(weight))
            return super().quantize(weight)

    class Wide(Int4):
        @property
        def format(self) -> Format:
            return replace(super().format, scale=torch.float32)

        def quantize(self, weight: Tensor) -> QuantizedWeight:
            found = super().quantize(weight)
            return replace(found, scale=found.float_scale())

    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for method in (Int4(), Counted(), Wide()):
        layout = choose_layout(method.format, CPU)
        made = layout.empty(method.format, (32, 64), CPU, method)
        made.write_rows(0, weight)
        expected = method.quantize(weight).dequantize()
        assert float((made.record().dequantize() - expected).norm()) < 0.02 * float(expected.norm())
    assert calls == [32, 32]


@pytest.mark.parametrize("quant", ["int8", "int4", "nf4", "fp8", None])
def test_training_keeps_no_second_copy_of_a_weight(quant: str | None) -> None:
    """With a gradient the product is that which serves, bit for bit; the weight is all it keeps."""
    model = hanok.load(hanok.BUNDLED, quant=quant, dtype="float32")
    layer = model.decoder.layers[0].mlp.gate_up_proj
    columns = model.config.hidden_size
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        served = layer(x)
    own = {part.untyped_storage().data_ptr() for part in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def keep(part: Tensor) -> Tensor:
        place = part.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = part.untyped_storage().nbytes()
        return part

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
        trained = layer(x)
    assert torch.equal(trained, served)
    assert sum(kept.values()) == 0
    upstream = torch.randn(trained.shape, generator=torch.Generator().manual_seed(1))
    trained.backward(upstream)
    weight = layer.weight
    floats = weight if isinstance(weight, Tensor) else weight.record().dequantize()
    torch.testing.assert_close(x.grad, upstream @ floats, atol=1e-4, rtol=1e-5)
