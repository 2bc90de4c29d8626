"""NF4 (QLoRA, arXiv 2305.14314): 16 quantiles of the normal distribution, scaled to blocks of 64.

Codes are those of bitsandbytes, whose blocks run over the flattened weight: the same as rows wherever
a row is a multiple of 64 long.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hanok.quant.base import Format, Packer, QuantizedWeight, grouped, ungrouped
from hanok.quant.nested import NESTED_BLOCK

BLOCK = 64
# fmt: off
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4:
    """The nearest of 16 values, times the block's largest magnitude."""

    name: ClassVar[str] = "nf4"
    summary: ClassVar[str] = "4-bit normal quantiles in blocks of 64 (QLoRA)"

    double_quant: bool = False
    """Whether the scales are themselves stored in 8 bits, which our CPU kernels do not read."""

    @property
    def format(self) -> Format:
        """See `QuantMethod`."""
        return Format(
            kind="codebook",
            bits=4,
            group_size=BLOCK,
            activations="int8",
            codebook=CODEBOOK,
            has_nested_scale=self.double_quant,
        )

    @property
    def packer(self) -> Packer:
        """See `hanok.quant.base.packer_of`."""
        return Packer(name="table", numbers=())

    def bits_per_weight(self, columns: int) -> float:
        """See `QuantMethod`."""
        scale_bits = 8 + 32 / NESTED_BLOCK if self.double_quant else 32
        return 4 + scale_bits * self.format.num_groups(columns) / columns

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """See `QuantMethod`."""
        groups = grouped(weight, BLOCK)
        scale = groups.abs().amax(-1)
        inverse = (1 / scale).nan_to_num(0.0, 0.0, 0.0)
        table = torch.tensor(CODEBOOK, device=weight.device)
        middles = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(groups * inverse[..., None], middles, out_int32=True).byte()
        return QuantizedWeight(
            format=self.format,
            codes=ungrouped(codes, weight.shape[1]),
            scale=scale,
        )


METHOD = Nf4
