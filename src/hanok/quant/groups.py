"""Scales and zeros of a weight that is quantized some rows at a time."""

import torch
from torch import Tensor

from hanok.quant.base import Format, QuantizedWeight
from hanok.quant.nested import NestedScale


class GroupConstants:
    """What the groups of a weight (out, in) share, row after row, as the methods give it."""

    def __init__(self, form: Format, shape: tuple[int, int], device: torch.device) -> None:
        rows, groups = shape[0], form.num_groups(shape[1])
        # float16 for groups, float32 for rows and for absolute maxima.
        is_half = form.group_size is not None and form.kind != "codebook"
        scale_type = torch.float16 if is_half else torch.float32
        self.scale: Tensor | NestedScale
        self.scale = torch.empty(rows, groups, dtype=scale_type, device=device)
        self.zero: Tensor | None = None
        if form.kind == "zero":
            self.zero = torch.empty(rows, groups, dtype=torch.uint8, device=device)
        self._is_nested = form.has_nested_scale

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def with_codes(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Return codes, scales and zeros; () where the scales are quantized themselves."""
        if not isinstance(self.scale, Tensor) or self._is_nested:
            return ()
        return (codes, self.scale) if self.zero is None else (codes, self.scale, self.zero)

    def write_rows(self, start: int, record: QuantizedWeight) -> None:
        """Take over those of a record's rows."""
        chosen = slice(start, start + record.shape[0])
        if isinstance(self.scale, Tensor) and isinstance(record.scale, Tensor):
            self.scale[chosen] = record.scale
        if self.zero is not None and record.zero is not None:
            self.zero[chosen] = record.zero

    def finish(self) -> None:
        """Quantize the scales, where the format does, now that all are there."""
        if self._is_nested and isinstance(self.scale, Tensor):
            self.scale = NestedScale.of(self.scale)
