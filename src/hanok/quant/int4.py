"""int4: 16 levels and a scale for each group, with a zero point when asymmetric.

Nothing is calibrated. The symmetric scale is searched: of a few candidates, each refitted by least
squares to the codes it gives, the one with the least squared error is taken. On normal weights in
groups of 32 the error is 0.081 of the weights' size; the same bits with the largest value on the last
level give 0.086.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hanok.quant.base import Format, Packer, QuantizedWeight, checked_group_size, grouped, ungrouped

# Levels that the largest value of a group is put on, one candidate each.
CANDIDATES = (6.8, 7.4, 8.0, 8.6, 9.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4:
    """Codes -8 to 7, or 0 to 15 around a zero; x is rounded to int8 on a CPU."""

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "4-bit whole numbers, a scale for each group"

    group_size: int = 32
    """Columns that share a scale: 32, 64 or 128."""
    symmetric: bool = True
    """Whether 0 is the middle code; otherwise each group has a zero, 4 bits more."""

    def __post_init__(self) -> None:
        checked_group_size(self.name, self.group_size)

    @property
    def format(self) -> Format:
        """See `QuantMethod`."""
        return Format(
            kind="signed" if self.symmetric else "zero",
            bits=4,
            group_size=self.group_size,
            activations="int8",
            scale=torch.float16,
        )

    @property
    def packer(self) -> Packer:
        """See `hanok.quant.base.packer_of`."""
        return Packer(name="int4", numbers=CANDIDATES if self.symmetric else ())

    def bits_per_weight(self, columns: int) -> float:
        """See `QuantMethod`."""
        group_bits = 16 if self.symmetric else 24
        return 4 + group_bits * self.format.num_groups(columns) / columns

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """See `QuantMethod`."""
        groups = grouped(weight, self.group_size)
        make = _symmetric if self.symmetric else _asymmetric
        codes, scale, zero = make(groups)
        return QuantizedWeight(
            format=self.format,
            codes=ungrouped(codes, weight.shape[1]),
            scale=scale,
            zero=zero,
        )


def _symmetric(groups: Tensor) -> tuple[Tensor, Tensor, None]:
    # The value of largest magnitude, with its sign: it goes towards -8, which has no counterpart.
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    best_error = torch.full_like(largest, torch.inf)
    best = torch.zeros_like(largest)
    for level in CANDIDATES:
        codes = _codes(groups, largest / -level)
        squares = (codes * codes).sum(-1)
        refitted = (groups * codes).sum(-1) / squares
        scale = refitted.nan_to_num(0.0, 0.0, 0.0).half().float()
        error = (groups - _codes(groups, scale) * scale[..., None]).square().sum(-1)
        is_better = error < best_error
        best = torch.where(is_better, scale, best)
        best_error = torch.where(is_better, error, best_error)
    return _codes(groups, best).char(), best.half(), None


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    inverse = (1 / scale).nan_to_num(0.0, 0.0, 0.0)
    return (groups * inverse[..., None]).round().clamp(-8, 7)


def _asymmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    inverse = (1 / scale.float()).nan_to_num(0.0, 0.0, 0.0)
    zero = (-low * inverse).round().clamp(0, 15)
    codes = ((groups * inverse[..., None]).round() + zero[..., None]).clamp(0, 15)
    return codes.byte(), scale, zero.byte()


METHOD = Int4
