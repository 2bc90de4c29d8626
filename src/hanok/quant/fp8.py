"""fp8: e4m3 numbers and a scale for each row. Storage only: products are computed in floating point."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hanok.quant.base import Format, Packer, QuantizedWeight

LARGEST = 448.0  # of e4m3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """The row's largest magnitude becomes 448, the rest is rounded to e4m3."""

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "8-bit floating point (e4m3), a scale for each row"

    @property
    def format(self) -> Format:
        """See `QuantMethod`."""
        return Format(kind="float8", bits=8, group_size=None, activations="float")

    @property
    def packer(self) -> Packer:
        """See `hanok.quant.base.packer_of`."""
        return Packer(name="float8", numbers=(LARGEST,))

    def bits_per_weight(self, columns: int) -> float:
        """See `QuantMethod`."""
        return 8 + 32 / columns

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """See `QuantMethod`."""
        largest = weight.float().abs().amax(-1, keepdim=True)
        inverse = (LARGEST / largest).nan_to_num(0.0, 0.0, 0.0)
        codes = (weight.float() * inverse).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return QuantizedWeight(format=self.format, codes=codes, scale=largest / LARGEST)


METHOD = Fp8
