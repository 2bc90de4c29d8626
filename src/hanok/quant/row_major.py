"""Weights whose codes, scales and zeros lie row after row, as records have them."""

import torch
from torch import Tensor

from hanok.quant.base import Format, QuantizedWeight, QuantMethod, StoredWeight
from hanok.quant.nested import NESTED_BLOCK, NestedScale, dynamic_map


class RowMajorWeight(StoredWeight):
    """What layouts of rows share: the constants of groups, nested once all rows are there.

    A subclass says how codes lie: `_packed` and `_unpacked`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        format: Format,
        shape: tuple[int, int],
        codes: Tensor,
        method: QuantMethod | None = None,
    ) -> None:
        super().__init__(format, shape, method)
        rows, groups, device = shape[0], format.num_groups(shape[1]), codes.device
        zero = None
        if format.kind == "zero":
            zero = torch.empty(rows, groups, dtype=format.zero, device=device)
        self.register_buffer("codes", codes)
        scale = torch.empty(rows, groups, dtype=format.scale, device=device)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("absmax", None)
        self.register_buffer("offset", None)

    @property
    def scales(self) -> Tensor | NestedScale:
        """The scales, (out, groups)."""
        if self.absmax is None or self.offset is None:
            return self.scale
        table = dynamic_map().to(self.device)
        return NestedScale(
            codes=self.scale, codebook=table, absmax=self.absmax, offset=float(self.offset)
        )

    def finish(self) -> None:
        """Quantize the scales, where the format does, now that all are there."""
        if self.format.has_nested_scale and self.absmax is None:
            found = NestedScale.of(self.scale)
            self.scale, self.absmax = found.codes, found.absmax
            self.offset = torch.tensor(found.offset, dtype=torch.float64, device=self.device)

    def _packed(self, codes: Tensor) -> Tensor:
        """Return codes as they are held."""
        raise NotImplementedError

    def _unpacked(self, held: Tensor) -> Tensor:
        """Undo `_packed`."""
        raise NotImplementedError

    def _write(self, start: int, record: QuantizedWeight) -> None:
        chosen = slice(start, start + record.shape[0])
        self.codes[chosen] = self._packed(record.codes)
        if isinstance(record.scale, NestedScale):
            self._take_nested(record.scale)
        else:
            self.scale[chosen] = record.scale
        if self.zero is not None and record.zero is not None:
            self.zero[chosen] = record.zero

    def _record(self) -> QuantizedWeight:
        codes = self._unpacked(self.codes)
        return QuantizedWeight(format=self.format, codes=codes, scale=self.scales, zero=self.zero)

    def _take_nested(self, scale: NestedScale) -> None:
        """Hold scales that are codes already, exactly; their blocks run over all rows."""
        if scale.codes.shape != self.scale.shape:
            raise ValueError(
                f"scales of {scale.codes.shape[0]} rows are quantized together; write all "
                f"{self.shape[0]} rows at once, or stack weights (quant/stacked.py)"
            )
        if not torch.equal(scale.codebook.cpu(), dynamic_map()):
            raise ValueError("scales are codes of another map than the signed dynamic one")
        self.scale, self.absmax = scale.codes.to(self.device), scale.absmax.to(self.device)
        self.offset = torch.tensor(scale.offset, dtype=torch.float64, device=self.device)

    def _part(self, rows: slice | Tensor) -> QuantizedWeight:
        """Return the record of some rows, with plain scales."""
        scale = self.scale[rows]
        if self.absmax is not None and self.offset is not None:
            flat = torch.arange(self.scale.numel(), device=self.device).view(self.scale.shape)[rows]
            scale = dynamic_map().to(self.device)[scale.long()] * self.absmax[flat // NESTED_BLOCK]
            scale = scale + self.offset
        zero = None if self.zero is None else self.zero[rows]
        codes = self._unpacked(self.codes[rows])
        return QuantizedWeight(format=self.format, codes=codes, scale=scale, zero=zero)

    def _rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._part(ids).dequantize().to(dtype)

    def _block(self, start: int, count: int, into: Tensor | None = None) -> Tensor:
        return self._part(slice(start, start + count)).dequantize()
