"""Panels of 16 rows for our own CPU kernels (`hanok.kernels`), which read them at the speed of memory.

The order of bytes stands in `kernels/cpp/kernels.h`. With groups, x is rounded to int8 group by group
and multiplied as whole numbers; with whole rows x stays as it is, and many tokens are multiplied with
a block of rows turned back into float32.
"""

import torch
from torch import Tensor

from hanok.kernels.native import (
    PANEL_KINDS,
    ROW_KIND_TOKENS,
    Native,
    PanelKind,
    Panels,
    native,
    why_not,
)
from hanok.quant.base import Format, QuantizedWeight, QuantMethod, StoredWeight

PANEL = 16  # rows
BLOCK = 32  # columns
BLOCK_ROWS = 1024  # turned back into float32 at a time
GROUPS = (32, 64, 128)


def kind_of(format: Format) -> PanelKind | None:
    """Return what the library calls weights of this format; None: it does not know them."""
    if format.has_nested_scale or format.activations == "outliers":
        return None
    if format.group_size is None:
        kinds: dict[tuple[str, int], PanelKind] = {
            ("signed", 8): "row bytes",
            ("float8", 8): "row float8",
        }
    elif format.group_size in GROUPS:
        kinds = {
            ("signed", 8): "bytes",
            ("signed", 4): "nibbles",
            ("zero", 4): "zero nibbles",
            ("codebook", 4): "table",
        }
    else:
        return None
    return kinds.get((format.kind, format.bits))


class PanelWeight(StoredWeight):
    """See `StoredWeight`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, method: QuantMethod, shape: tuple[int, int], kernels: Native) -> None:
        kind = kind_of(method.format)
        if kind is None:
            raise ValueError(f"panels do not hold {method.format}")
        super().__init__(method, shape)
        self._kernels = kernels
        form, (rows, columns) = method.format, shape
        panels = -(-rows // PANEL)
        self._group = form.group_size or -(-columns // BLOCK) * BLOCK
        groups = -(-columns // self._group) if columns else 0
        blocks = groups * self._group // BLOCK
        is_half = kind in ("bytes", "nibbles", "zero nibbles")
        codes = torch.empty(panels, blocks, BLOCK * PANEL * form.bits // 8, dtype=torch.uint8)
        scale = torch.empty(
            panels, groups, PANEL, dtype=torch.float16 if is_half else torch.float32
        )
        has_zero = kind == "zero nibbles"
        zero = torch.empty(panels, groups, PANEL, dtype=torch.uint8) if has_zero else None
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self._table = None
        if form.codebook is not None:
            self._table = torch.tensor(form.codebook)
        self._panels = Panels(
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=None if zero is None else zero.data_ptr(),
            table=None if self._table is None else self._table.data_ptr(),
            rows=rows,
            columns=columns,
            group_columns=self._group,
            kind=PANEL_KINDS[kind],
        )

    @property
    def nbytes(self) -> int:
        """See `StoredWeight`."""
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        """See `StoredWeight`."""
        return self.codes.device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """See `StoredWeight`."""
        return tuple(self.buffers())

    @property
    def exact_tokens(self) -> int | None:
        """See `StoredWeight`."""
        return ROW_KIND_TOKENS if self.method.format.group_size is None else None

    def write_rows(self, start: int, rows: Tensor) -> None:
        """See `StoredWeight`; `start` is a multiple of PANEL."""
        is_known = rows.dtype in (torch.bfloat16, torch.float32)
        self._kernels.pack(self._panels, start, rows if is_known else rows.float())

    def record(self) -> QuantizedWeight:
        """See `StoredWeight`."""
        form, (rows, columns) = self.method.format, self.shape
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

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See `StoredWeight`."""
        return self._kernels.look_up(self._panels, ids, dtype)

    def kernel(self, num_tokens: int, dtype: torch.dtype) -> str:
        """See `StoredWeight`."""
        if self.method.format.group_size is not None:
            return f"hanok {self._kernels.instruction_set}, x rounded to int8"
        if num_tokens <= ROW_KIND_TOKENS:
            return f"hanok {self._kernels.instruction_set}, x as it is"
        return "torch, a block of rows turned into float32 at a time"

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.method.format.group_size is not None or x.shape[0] <= ROW_KIND_TOKENS:
            return self._kernels.product(x, self._panels, bias)
        output, wide = x.new_empty(x.shape[0], self.shape[0]), x.float()
        for start in range(0, self.shape[0], BLOCK_ROWS):
            count = min(BLOCK_ROWS, self.shape[0] - start)
            product = wide @ self._kernels.unpack(self._panels, start, count).t()
            if bias is not None:
                product += bias[start : start + count]
            output[:, start : start + count] = product
        return output

    def _by_row(self, values: Tensor) -> Tensor:
        """(panels, groups, PANEL) -> (rows, groups)."""
        rows = values.shape[0] * PANEL
        return values.transpose(1, 2).reshape(rows, -1)[: self.shape[0]].contiguous()


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
        self, method: QuantMethod, shape: tuple[int, int], device: torch.device
    ) -> StoredWeight:
        """See `Layout`."""
        kernels = native()
        if kernels is None or device.type != "cpu":
            raise ValueError(f"panels were chosen where they do not fit, on {device}")
        return PanelWeight(method, shape, kernels)


LAYOUT = PanelLayout()
