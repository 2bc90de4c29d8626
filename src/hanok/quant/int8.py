"""int8: whole numbers of -127 to 127 and a scale, for each group of a row or for the whole row.

In groups, a CPU also rounds x to int8, group by group, and multiplies whole numbers; for whole rows x
stays as it is (weight-only).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hanok.quant.base import Format, Packer, QuantizedWeight, checked_group_size, grouped, ungrouped
from hanok.quant.rounding import LARGEST, rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Absolute maximum over 127, rounded to nearest."""

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "8-bit whole numbers, a scale for each group or row"

    group_size: int = 32
    """Columns that share a scale: 32, 64, 128, or 0 for whole rows with x not rounded."""

    def __post_init__(self) -> None:
        if self.group_size:
            checked_group_size(self.name, self.group_size)

    @property
    def format(self) -> Format:
        """See `QuantMethod`."""
        return Format(
            kind="signed",
            bits=8,
            group_size=self.group_size or None,
            activations="int8" if self.group_size else "float",
            scale=torch.float16 if self.group_size else torch.float32,
        )

    @property
    def packer(self) -> Packer:
        """See `hanok.quant.base.packer_of`."""
        return Packer(name="int8", numbers=(LARGEST,))

    def bits_per_weight(self, columns: int) -> float:
        """See `QuantMethod`."""
        scale_bits = 16 if self.group_size else 32
        return 8 + scale_bits * self.format.num_groups(columns) / columns

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """See `QuantMethod`."""
        groups = grouped(weight, self.group_size or max(1, weight.shape[1]))
        codes, scale = rounded(groups, is_half=bool(self.group_size))
        return QuantizedWeight(
            format=self.format, codes=ungrouped(codes, weight.shape[1]), scale=scale
        )


METHOD = Int8
