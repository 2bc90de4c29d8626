"""Panels of 16 rows for our own CPU kernels (`hanok.kernels`), which read them at the speed of memory.

`kernels/cpp/kernels.h` has the order of bytes. Where the format allows it, x is rounded to int8
group by group and multiplied as whole numbers; else it stays as it is, and many tokens are multiplied
with a block of rows converted back to float32.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hanok.kernels.native import (
    FLOAT_TOKENS,
    FLOATS,
    ITEM_TYPES,
    PANEL_KINDS,
    Native,
    PanelKind,
    Panels,
    native,
    why_not,
)
from hanok.quant.base import (
    BLOCK_ROWS,
    Format,
    QuantizedWeight,
    QuantMethod,
    StoredWeight,
    packer_of,
)

PANEL = 16  # rows
BLOCK = 32  # columns
ROUNDED_GROUPS = (32, 64, 128)
SCALES = (torch.float16, torch.bfloat16, torch.float32)
ZEROS = (torch.uint8, torch.float32)
KINDS: dict[tuple[str, int], PanelKind] = {
    ("signed", 8): "bytes",
    ("signed", 4): "nibbles",
    ("zero", 4): "zero nibbles",
    ("codebook", 4): "table",
    ("zero", 8): "zero bytes",
    ("float8", 8): "float8",
}


def kind_of(format: Format) -> PanelKind | None:
    """Return what the library calls weights of this format; None: it does not know them."""
    if format.has_nested_scale or format.activations == "outliers":
        return None
    is_known = (format.group_size or BLOCK) % BLOCK == 0 and format.scale in SCALES
    return KINDS.get((format.kind, format.bits)) if is_known and format.zero in ZEROS else None


def rounds_x(format: Format) -> bool:
    """Return whether x is rounded to int8: where the format allows it and whole numbers can be used."""
    kind = kind_of(format)
    scale = torch.float32 if kind == "table" else torch.float16
    return (
        format.activations == "int8"
        and format.group_size in ROUNDED_GROUPS
        and kind in ("bytes", "nibbles", "zero nibbles", "table")
        and (format.scale, format.zero) == (scale, torch.uint8)
    )


class PanelWeight(StoredWeight):
    """See `StoredWeight`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None

    def __init__(
        self,
        format: Format,
        shape: tuple[int, int],
        method: QuantMethod | None = None,
        kernels: Native | None = None,
    ) -> None:
        if kind_of(format) is None:
            raise ValueError(f"panels do not hold {format}")
        super().__init__(format, shape, method)
        if kernels is not None:
            self._kernels = kernels
        rows, columns = shape
        panels = -(-rows // PANEL)
        self._group = format.group_size or -(-columns // BLOCK) * BLOCK
        groups = -(-columns // self._group) if columns else 0
        blocks = groups * self._group // BLOCK
        codes = torch.empty(panels, blocks, BLOCK * PANEL * format.bits // 8, dtype=torch.uint8)
        has_zero = format.kind == "zero"
        zero = torch.empty(panels, groups, PANEL, dtype=format.zero) if has_zero else None
        table = None if format.codebook is None else torch.tensor(format.codebook)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.empty(panels, groups, PANEL, dtype=format.scale))
        self.register_buffer("zero", zero)
        self.register_buffer("table", table, persistent=False)

    @cached_property
    def _panels(self) -> Panels:
        """What the library takes: addresses, which change when the weight is moved or copied."""
        if not self.codes.is_cpu:
            raise ValueError(f"panels are multiplied on a CPU, and these are on {self.device}")
        kind = kind_of(self.format)
        return Panels(
            codes=self.codes.data_ptr(),
            scale=self.scale.data_ptr(),
            zero=None if self.zero is None else self.zero.data_ptr(),
            table=None if self.table is None else self.table.data_ptr(),
            rows=self.shape[0],
            columns=self.shape[1],
            group_columns=self._group,
            kind=0 if kind is None else PANEL_KINDS[kind],
            scale_type=ITEM_TYPES[self.scale.dtype],
            zero_type=ITEM_TYPES[self.format.zero],
            rounds_x=rounds_x(self.format),
        )

    @cached_property
    def _kernels(self) -> Native:
        found = native()
        if found is None:
            raise ValueError("panels are multiplied by our kernels, which are not there")
        return found

    def _forget_addresses(self) -> None:
        self.__dict__.pop("_panels", None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses, for copies."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_panels", "_kernels")
        }

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """See `StoredWeight`."""
        return tuple(part for part in (self.codes, self.scale, self.zero) if part is not None)

    @property
    def nbytes(self) -> int:
        """See `StoredWeight`."""
        return sum(part.nbytes for part in self.parts)

    @property
    def exact_tokens(self) -> int | None:
        """See `StoredWeight`."""
        return None if rounds_x(self.format) else FLOAT_TOKENS

    def write_rows(self, start: int, rows: Tensor) -> None:
        """See `StoredWeight`; `start` is a multiple of PANEL."""
        packer = None if self.method is None else packer_of(self.method)
        if packer is None:
            super().write_rows(start, rows)
            return
        floats = rows if rows.dtype in FLOATS else rows.float()
        self._kernels.pack(self._panels, start, floats, packer.name, packer.numbers)

    def kernel(self, num_tokens: int, dtype: torch.dtype) -> str:
        """See `StoredWeight`."""
        if rounds_x(self.format):
            return f"hanok {self._kernels.instruction_set}, x rounded to int8"
        if num_tokens <= FLOAT_TOKENS:
            return f"hanok {self._kernels.instruction_set}, x as it is"
        return "torch, a block of rows converted to float32 at a time"

    def _write(self, start: int, record: QuantizedWeight) -> None:
        count = record.shape[0]
        if start % PANEL or (count % PANEL and start + count != self.shape[0]):
            raise ValueError(f"rows {start} to {start + count} are not whole panels of {PANEL}")
        self._kernels.pack_codes(self._panels, start, record.codes)
        chosen = slice(start // PANEL, -(-(start + count) // PANEL))
        self.scale[chosen] = _in_panels(record.float_scale())
        if self.zero is not None and record.zero is not None:
            self.zero[chosen] = _in_panels(record.zero)

    def _record(self) -> QuantizedWeight:
        form, (rows, columns) = self.format, self.shape
        panels, blocks, _ = self.codes.shape
        if form.bits == 4:
            halves = torch.stack([self.codes & 15, self.codes >> 4], dim=2)
            # (panels, blocks, half, four columns, row, column)
            codes = halves.view(panels, blocks, 2, 4, PANEL, 4).permute(0, 4, 1, 2, 3, 5)
        else:
            codes = self.codes.view(panels, blocks, 8, PANEL, 4).permute(0, 3, 1, 2, 4)
        codes = codes.reshape(panels * PANEL, -1)[:rows, :columns].contiguous()
        if form.kind == "signed":
            codes = (codes ^ 128).view(torch.int8) if form.bits == 8 else codes.view(torch.int8) - 8
        elif form.kind == "float8":
            codes = codes.view(torch.float8_e4m3fn)
        return QuantizedWeight(
            format=form,
            codes=codes,
            scale=self._by_row(self.scale),
            zero=None if self.zero is None else self._by_row(self.zero),
        )

    def _rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._kernels.look_up(self._panels, ids, dtype)

    def _block(self, start: int, count: int, into: Tensor | None = None) -> Tensor:
        return self._kernels.unpack(self._panels, start, count, into)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if rounds_x(self.format) or x.shape[0] <= FLOAT_TOKENS:
            return self._kernels.product(x, self._panels, bias)
        output, wide = x.new_empty(x.shape[0], self.shape[0]), x.float()
        block: Tensor | None = None
        for start in range(0, self.shape[0], BLOCK_ROWS):
            count = min(BLOCK_ROWS, self.shape[0] - start)
            block = self._block(start, count, block)
            product = wide @ block.t()
            if bias is not None:
                product += bias[start : start + count]
            output[:, start : start + count] = product
        return output

    def _by_row(self, values: Tensor) -> Tensor:
        """(panels, groups, PANEL) -> (rows, groups)."""
        rows = values.shape[0] * PANEL
        return values.transpose(1, 2).reshape(rows, -1)[: self.shape[0]].contiguous()


def _in_panels(values: Tensor) -> Tensor:
    """(rows, groups) -> (panels, groups, PANEL); rows that are not there get zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2)


class PanelLayout:
    """See `Layout`."""

    name = "panels"
    summary = "our CPU kernels: 16 rows side by side"

    def why_not(self, format: Format, device: torch.device) -> str | None:
        """Return why our CPU kernels cannot hold such weights there."""
        if device.type != "cpu":
            return f"these kernels run on a CPU (found: {device.type})"
        if native() is None:
            return f"the kernels are {why_not()}"
        if format.has_nested_scale:
            return "they do not read scales that are quantized themselves"
        if format.activations == "outliers":
            return "they do not take outlying columns of x apart"
        if kind_of(format) is None:
            size = format.group_size or "whole rows"
            return f"they do not read {format.kind} codes of {format.bits} bits in groups of {size}"
        return None

    def empty(
        self,
        format: Format,
        shape: tuple[int, int],
        device: torch.device,
        method: QuantMethod | None = None,
    ) -> StoredWeight:
        """See `Layout`."""
        if native() is None or device.type != "cpu":
            raise ValueError(f"panels were chosen where they do not fit, on {device}")
        return PanelWeight(format, shape, method)


LAYOUT = PanelLayout()
