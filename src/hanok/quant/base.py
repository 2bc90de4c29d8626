"""The quantization seam: one record of a quantized weight, its makers, and its layouts.

    method.quantize(weight) -> QuantizedWeight           what the numbers are
    layout.empty(format, shape, device) -> StoredWeight  where they live, in the order its kernels read
    stored.matmul(x, bias)                               how they are multiplied

A method is one file of this package that defines `METHOD`; a layout is one file of `quant/kernels` that
defines `LAYOUT`. The first layout of LAYOUT_ORDER that fits the device, the instruction set and the
format holds the weight; for each product it picks a kernel by dtype and number of tokens. Both choices
have a "why not". `reference`, which dequantizes and multiplies, is the oracle of every kernel.
Activations are bfloat16 or float32 outside.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hanok.errors import OptionError, UnsupportedError
from hanok.kernels.native import Quantizer
from hanok.quant.nested import NestedScale
from hanok.registry import discover, nearest_first

LAYOUT_ORDER = ("triton", "panels", "plain")

Kind = Literal["signed", "zero", "codebook", "float8"]
Activations = Literal["float", "int8", "outliers"]
GROUP_SIZES = (32, 64, 128)
BLOCK_ROWS = 1024  # dequantized at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Packer:
    """One of our compiled quantizers, which makes codes of floats in the order of panels at once.

    It does what `quantize` of its method does, with the same numbers (cpp/kernels.h, `Quantizer`).
    """

    name: Quantizer
    numbers: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What the codes of a weight are, however they were made.

    `kind`: "signed" codes are whole numbers around zero; "zero" ones are unsigned with a zero for each
    group; "codebook" ones are indices; "float8" ones are e4m3 numbers. `group_size`: columns that share
    a scale, None for a whole row. `scale` and `zero`: their dtypes; zeros in floats are those of formats
    that store a minimum (zero = minimum / scale). `activations`: what kernels may make of x; "float"
    wants it as it is, "int8" allows it to be rounded to int8 in groups of a row, "outliers" is
    LLM.int8()'s decomposition.
    """

    kind: Kind
    bits: int
    group_size: int | None
    activations: Activations
    codebook: tuple[float, ...] | None = None
    outlier_threshold: float | None = None
    has_nested_scale: bool = False
    scale: torch.dtype = torch.float32
    zero: torch.dtype = torch.uint8

    def num_groups(self, columns: int) -> int:
        """Return the groups of a row; the last one may be shorter."""
        return 1 if self.group_size is None else -(-columns // self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """The canonical record of a quantized weight, however it was made and is stored.

    w[n, k] = value(code[n, k]) * scale[n, group(k)], where value(c) is c, c - zero[n, group(k)] or
    codebook[c], and group(k) is k // group_size or order[k].
    """

    format: Format
    codes: Tensor  # (out, in) int8, uint8 or float8_e4m3fn, one code per weight
    scale: Tensor | NestedScale  # (out, groups)
    zero: Tensor | None = None  # (out, groups), kind "zero" only
    order: Tensor | None = None  # (in,) int64: the group of each column, where they are not in turn

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.codes.shape
        return rows, columns

    def float_scale(self) -> Tensor:
        """Return the scales, (out, groups) float32."""
        return (
            self.scale.dequantize() if isinstance(self.scale, NestedScale) else self.scale.float()
        )

    def dequantize(self) -> Tensor:
        """Return the weight, (out, in) float32."""
        values = self.codes.float()
        if self.format.codebook is not None:
            table = torch.tensor(self.format.codebook, device=self.codes.device)
            values = table[self.codes.long()]
        group = self.order if self.order is not None else self._groups_in_turn()
        if self.zero is not None:
            values = values - self.zero.float()[:, group]
        return values * self.float_scale()[:, group]

    def _groups_in_turn(self) -> Tensor:
        columns = self.codes.shape[1]
        size = self.format.group_size or max(1, columns)
        return torch.arange(columns, device=self.codes.device) // size


class QuantMethod(Protocol):
    """A way to make fewer bits of a weight: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def format(self) -> Format:
        """What its codes are."""

    def bits_per_weight(self, columns: int) -> float:
        """Return the bits for each weight of a row of `columns`, scales and zeros included."""

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Return the record of a weight (out, in), each row for itself; computed in float32.

        Scales come as they are; `quantize` nests them where the format says so.
        """


def packer_of(method: QuantMethod) -> Packer | None:
    """Return the compiled quantizer that a method asks for as its `packer`; most have none.

    A class that inherits the packer but quantizes or describes its codes itself has none either.
    """
    for kind in type(method).__mro__:
        if "packer" in vars(kind):
            found: Packer = getattr(method, "packer")  # noqa: B009  # in no Protocol
            return found
        if {"quantize", "format"} & vars(kind).keys():
            return None
    return None


class StoredWeight(nn.Module):
    """A quantized weight in memory, laid out for the kernels that read it: a `models.linear.Weight`.

    What it holds are buffers, so that it is saved, moved and copied as any module is; a change of dtype
    does not reach them. Columns whose groups are not in turn (`QuantizedWeight.order`) are permuted
    once, when they are written, and x at every product.
    """

    permutation: Tensor | None

    def __init__(self, format: Format, shape: tuple[int, int], method: QuantMethod | None) -> None:
        super().__init__()
        self.format = format
        self.shape = shape
        self.method = method
        """What made it; None where codes were given."""
        self._has_order_of_rows = False
        self.register_buffer("permutation", None)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, zeros and padding."""
        return sum(part.nbytes for part in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold it, so that they can be kept and filled again; () where they cannot."""
        return () if self.format.has_nested_scale else tuple(self.buffers())

    @property
    def exact_tokens(self) -> int | None:
        """How many tokens of a product are computed as each alone is; None: any number."""
        return None

    def why_not_static(self) -> str | None:
        """Return why a product needs the CPU to look at numbers, which a CUDA graph cannot; or None."""
        if self.format.activations == "outliers":
            return "outliers are looked for on the CPU"
        return None

    def write_rows(self, start: int, rows: Tensor) -> None:
        """Quantize float rows (count, in) into place; different rows may be written by threads."""
        if self.method is None:
            raise ValueError("no method is known that makes these codes of floats; write a record")
        self._write(start, self.method.quantize(rows.to(self.device)))

    def write(self, start: int, record: QuantizedWeight) -> None:
        """Put the rows of a record into place, from row `start` on.

        Raises ValueError for a record of another format, or whose columns are in another order than
        those written before: parts with orders of their own make a `quant.stacked.StackedWeight`.
        """
        rows, columns = record.shape
        if record.format != self.format or columns != self.shape[1]:
            raise ValueError(
                f"{record.format} of {columns} columns for {self.format}, {self.shape}"
            )
        if not 0 <= start <= start + rows <= self.shape[0]:
            raise ValueError(f"rows {start} to {start + rows} of {self.shape[0]}")
        self._take_order(record)
        if self.permutation is not None:
            record = replace(record, codes=record.codes[:, self.permutation], order=None)
        self._write(start, record)

    def _take_order(self, record: QuantizedWeight) -> None:
        if record.order is None:
            if self.permutation is not None:
                raise ValueError("rows before these have their columns in another order")
            self._has_order_of_rows = True
            return
        found = record.order.argsort(stable=True)
        in_turn = torch.arange(self.shape[1], device=found.device) // (self.format.group_size or 1)
        if self.format.group_size is None or not torch.equal(record.order[found], in_turn):
            raise ValueError(
                f"groups are not of {self.format.group_size} columns each, which kernels read"
            )
        found = found.to(self.device)
        if self.permutation is None and not self._has_order_of_rows:
            self.permutation = found
        elif self.permutation is None or not torch.equal(self.permutation, found):
            raise ValueError("rows before these have their columns in another order")

    def finish(self) -> None:
        """Quantize what needs all rows, nested scales; called once, after the last row is written."""

    def record(self) -> QuantizedWeight:
        """Return the canonical record, unpacked."""
        found = self._record()
        if self.permutation is None:
            return found
        back = self.permutation.argsort()
        order = back // (self.format.group_size or 1)
        return replace(found, codes=found.codes[:, back], order=order)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows dequantized, (ids, in): an embedding's lookup."""
        found = self._rows(ids, dtype)
        return found if self.permutation is None else found[:, self.permutation.argsort()]

    def kernel(self, num_tokens: int, dtype: torch.dtype) -> str:
        """Return what multiplies so many tokens."""
        raise NotImplementedError

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias in x's dtype: every product with a quantized weight.

        x: (tokens, in) bfloat16 or float32   bias: (out,)   returns: (tokens, out). With a gradient it
        is the same product; the weight is dequantized again, some rows at a time, on the way back.
        """
        if x.dim() != 2 or x.shape[1] != self.shape[1]:
            found, (rows, columns) = " x ".join(map(str, x.shape)), self.shape
            raise ValueError(f"x is {found}, the weight {rows} x {columns}")
        if self.permutation is not None:
            x = x[:, self.permutation]
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            product: Tensor = _Product.apply(x, bias, self)  # type: ignore[no-untyped-call]  # torch's
            return product
        return self._multiply(x, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "StoredWeight":
        """Move the buffers as torch asks for, but keep what they are made of."""
        for name, part in self._buffers.items():
            if part is not None:
                moved = fn(part)
                self._buffers[name] = moved if moved.dtype is part.dtype else part.to(moved.device)
        self._forget_addresses()
        return self

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Take buffers that only written weights have too; refuse numbers of another kind."""
        for name, part in self._buffers.items():
            found = state.get(prefix + name)
            if found is None:
                continue
            if part is None or (name == "scale" and self.format.has_nested_scale):
                self._buffers[name] = torch.empty_like(found, device=self.device)
            elif found.dtype is not part.dtype:
                lists[-1].append(f"{prefix}{name} is {found.dtype}, and {part.dtype} is held here.")
        super()._load_from_state_dict(state, prefix, metadata, strict, *lists)
        self._forget_addresses()

    def _forget_addresses(self) -> None:
        """Drop what was made of the buffers' addresses: they are others now."""

    def _write(self, start: int, record: QuantizedWeight) -> None:
        """Put a record's rows into place, its columns in their groups' order."""
        raise NotImplementedError

    def _record(self) -> QuantizedWeight:
        """Return the record with its columns in their groups' order."""
        raise NotImplementedError

    def _rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows likewise."""
        raise NotImplementedError

    def _block(self, start: int, count: int, into: Tensor | None = None) -> Tensor:
        """Return rows [start, start + count) likewise, (count, in) float32.

        `start` is a multiple of BLOCK_ROWS. `into` is what an earlier call gave, to be used again.
        """
        raise NotImplementedError

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Do what `matmul` says, with x of the right shape and order, and without gradients."""
        raise NotImplementedError


class _Product(torch.autograd.Function):
    """The product that serves, and its gradient: nothing is kept but the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        return weight._multiply(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight: StoredWeight = ctx.weight
        of_x = None
        if ctx.needs_input_grad[0]:
            found = torch.zeros(len(gradient), weight.shape[1], device=gradient.device)
            block: Tensor | None = None
            for start in range(0, weight.shape[0], BLOCK_ROWS):
                count = min(BLOCK_ROWS, weight.shape[0] - start)
                block = weight._block(start, count, block)
                found.addmm_(gradient[:, start : start + count].float(), block)
            of_x = found.to(gradient.dtype)
        return of_x, gradient.sum(0) if ctx.needs_input_grad[1] else None, None


class Layout(Protocol):
    """One order of a weight's bytes, and the kernels that read it."""

    name: str
    summary: str

    def why_not(self, format: Format, device: torch.device) -> str | None:
        """Return why it cannot hold weights of this format there, or None when it can."""

    def empty(
        self,
        format: Format,
        shape: tuple[int, int],
        device: torch.device,
        method: QuantMethod | None = None,
    ) -> StoredWeight:
        """Claim the memory of a weight that `write_rows`, which needs a method, or `write` will fill."""


def stored(record: QuantizedWeight) -> StoredWeight:
    """Return a record's weight as the kernels of its device read it."""
    device = record.codes.device
    weight = choose_layout(record.format, device).empty(record.format, record.shape, device)
    weight.write(0, record)
    weight.finish()
    return weight


def quantize(method: QuantMethod, weight: Tensor) -> QuantizedWeight:
    """Return the record that a method makes of a whole weight (out, in)."""
    record = method.quantize(weight)
    if record.format.has_nested_scale:
        return replace(record, scale=NestedScale.of(record.float_scale()))
    return record


def reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Dequantize and multiply in float32: the oracle. (tokens, in) -> (tokens, out) float32."""
    product = x.float() @ weight.dequantize().t()
    return product if bias is None else product + bias.float()


@cache
def methods() -> Mapping[str, type[QuantMethod]]:
    """Return every method's class by the name the user picks it by."""
    return {item.name: item for item in discover("hanok.quant", "METHOD").values()}


@cache
def layouts() -> Mapping[str, Layout]:
    """Return every layout by its name."""
    return {item.name: item for item in discover("hanok.quant.kernels", "LAYOUT").values()}


def why_not_table(format: Format, device: torch.device) -> dict[str, str | None]:
    """Return, for every layout in the order they are tried, why it does not fit (None: it does)."""
    return {name: layouts()[name].why_not(format, device) for name in LAYOUT_ORDER}


def choose_layout(format: Format, device: torch.device) -> Layout:
    """Return the first layout that can hold such weights there."""
    for name, reason in why_not_table(format, device).items():
        if reason is None:
            return layouts()[name]
    raise UnsupportedError(f"no layout holds {format} on {device}.")


def method_of(name: str, options: Mapping[str, str]) -> QuantMethod:
    """Return a method with its options read from text; OptionError where that cannot be."""
    if name not in methods():
        known = ", ".join(nearest_first(name, list(methods())))
        raise OptionError(f"quantization {name!r} is unknown. Choose one of: {known}.")
    kind = methods()[name]
    defaults = {item.name: item.default for item in fields(kind)}  # type: ignore[arg-type]  # no Protocol says "dataclass"
    for option in options:
        if option not in defaults:
            listed = ", ".join(nearest_first(option, list(defaults))) or "none"
            raise OptionError(f"{name} has no option {option!r}; its options: {listed}.")
    values = {
        option: _value(f"{name}:{option}", text, defaults[option])
        for option, text in options.items()
    }
    return kind(**values)


def _value(where: str, text: str, default: object) -> object:
    """Read an option's text as what its default is."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise OptionError(f"{where} is {text!r}; write true or false.")
        return text == "true"
    try:
        return int(text) if isinstance(default, int) else float(text)
    except ValueError:
        raise OptionError(f"{where} is {text!r}; write a number like {default}.") from None


def checked_group_size(name: str, size: int) -> None:
    """Raise OptionError unless kernels know groups of this size."""
    if size not in GROUP_SIZES:
        listed = ", ".join(map(str, GROUP_SIZES))
        raise OptionError(f"{name}: group_size is {size}; choose one of {listed}.")


def grouped(weight: Tensor, size: int) -> Tensor:
    """Return the weight's groups, (out, groups, size) float32; the last is filled up with zeros."""
    rows, columns = weight.shape
    groups = -(-columns // size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * size - columns))
    return padded.view(rows, groups, size)


def ungrouped(codes: Tensor, columns: int) -> Tensor:
    """Undo `grouped`, on codes: (out, groups, size) -> (out, in)."""
    return codes.flatten(1)[:, :columns].contiguous()
