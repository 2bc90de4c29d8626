"""The quantization seam: one record of a quantized weight, its makers, and its layouts.

    method.quantize(weight) -> QuantizedWeight          what the numbers are
    layout.empty(method, shape) -> StoredWeight         where they live, in the order its kernels read
    stored.matmul(x, bias)                              how they are multiplied

A method is one file of this package that defines `METHOD`; a layout is one file of `quant/kernels` that
defines `LAYOUT`. The first layout of LAYOUT_ORDER that fits the device, the instruction set and the
format holds the weight; for each product it picks a kernel by dtype and number of tokens. Both choices
have a "why not". `reference`, which dequantizes and multiplies, is the oracle of every kernel.
Activations are bfloat16 or float32 outside.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from hanok.errors import OptionError, UnsupportedError
from hanok.quant.nested import NestedScale
from hanok.registry import discover, nearest_first

LAYOUT_ORDER = ("triton", "panels", "plain")

Kind = Literal["signed", "zero", "codebook", "float8"]
Activations = Literal["float", "int8", "outliers"]
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What the codes of a method are, without any weight.

    `kind`: "signed" codes are whole numbers around zero; "zero" ones are unsigned with a zero for each
    group; "codebook" ones are indices; "float8" ones are e4m3 numbers. `group_size`: columns that share
    a scale, None for a whole row. `activations`: what kernels may make of x; "int8" allows it to be
    rounded to int8 in groups of a row, "outliers" is LLM.int8()'s decomposition.
    """

    kind: Kind
    bits: int
    group_size: int | None
    activations: Activations
    codebook: tuple[float, ...] | None = None
    outlier_threshold: float | None = None
    has_nested_scale: bool = False

    def num_groups(self, columns: int) -> int:
        """Return the groups of a row; the last one may be shorter."""
        return 1 if self.group_size is None else -(-columns // self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """The canonical record: what a quantized weight is, whoever made it and however it is stored.

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


class StoredWeight(nn.Module):
    """A quantized weight in memory, laid out for the kernels that read it: a `models.linear.Weight`.

    What a subclass holds are buffers, so that the weight goes wherever a module does.
    """

    def __init__(self, method: QuantMethod, shape: tuple[int, int]) -> None:
        super().__init__()
        self.method = method
        self.shape = shape

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, zeros and padding."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it is."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold it, so that they can be kept and filled again; () where they cannot."""
        raise NotImplementedError

    @property
    def exact_tokens(self) -> int | None:
        """How many tokens of a product are computed as each alone is; None: any number."""
        return None

    def why_not_static(self) -> str | None:
        """Return why a product needs the CPU to look at numbers, which a CUDA graph cannot; or None."""
        if self.method.format.activations == "outliers":
            return f"{self.method.name} looks for outliers on the CPU"
        return None

    def write_rows(self, start: int, rows: Tensor) -> None:
        """Quantize float rows (count, in) into place; different rows may be written by threads."""
        raise NotImplementedError

    def finish(self) -> None:
        """Quantize what needs all rows, nested scales; called once, after the last row is written."""

    def record(self) -> QuantizedWeight:
        """Return the canonical record, unpacked."""
        raise NotImplementedError

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows dequantized, (ids, in): an embedding's lookup."""
        raise NotImplementedError

    def kernel(self, num_tokens: int, dtype: torch.dtype) -> str:
        """Return what multiplies so many tokens."""
        raise NotImplementedError

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias in x's dtype: every product with a quantized weight.

        x: (tokens, in) bfloat16 or float32   bias: (out,)   returns: (tokens, out)
        """
        if x.dim() != 2 or x.shape[1] != self.shape[1]:
            found, (rows, columns) = " x ".join(map(str, x.shape)), self.shape
            raise ValueError(f"x is {found}, the weight {rows} x {columns}")
        if torch.is_grad_enabled() and x.requires_grad:
            return torch.nn.functional.linear(
                x,
                self.record().dequantize().to(x.dtype),
                None if bias is None else bias.to(x.dtype),
            )
        return self._multiply(x, bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Do what `matmul` says, with x of the right shape and without gradients."""
        raise NotImplementedError


class Layout(Protocol):
    """One order of a weight's bytes, and the kernels that read it."""

    name: str
    summary: str

    def why_not(self, format: Format, device: torch.device) -> str | None:
        """Return why it cannot hold weights of this format there, or None when it can."""

    def empty(
        self, method: QuantMethod, shape: tuple[int, int], device: torch.device
    ) -> StoredWeight:
        """Claim the memory of a weight that `write_rows` will fill."""


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
