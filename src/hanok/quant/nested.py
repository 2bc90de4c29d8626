"""Double quantization (QLoRA, arXiv 2305.14314): the scales of a weight are stored in 8 bits too."""

from dataclasses import dataclass

import torch
from torch import Tensor

NESTED_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedScale:
    """Scales in 8 bits, in blocks of 256 taken row after row; `offset` is their mean."""

    codes: Tensor  # (rows, groups) uint8
    codebook: Tensor  # (256,) float32
    absmax: Tensor  # (blocks,) float32
    offset: float

    @classmethod
    def of(cls, scale: Tensor) -> "NestedScale":
        """Store scales (rows, groups): their mean taken off, then the nearest of the dynamic map."""
        offset = scale.mean()
        flat = (scale - offset).flatten()
        padding = -len(flat) % NESTED_BLOCK
        blocks = torch.nn.functional.pad(flat, (0, padding)).view(-1, NESTED_BLOCK)
        absmax = blocks.abs().amax(-1)
        table = dynamic_map().to(scale.device)
        middles = (table[1:] + table[:-1]) / 2
        inverse = (1 / absmax).nan_to_num(0.0, 0.0, 0.0)
        codes = torch.bucketize(blocks * inverse[:, None], middles, out_int32=True).byte()
        return cls(
            codes=codes.flatten()[: len(flat)].view(scale.shape),
            codebook=table,
            absmax=absmax,
            offset=float(offset),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.codebook.nbytes + self.absmax.nbytes

    def dequantize(self) -> Tensor:
        """Return the scales, (rows, groups) float32."""
        flat = self.codebook[self.codes.flatten().long()]
        blocks = self.absmax.repeat_interleave(NESTED_BLOCK)[: len(flat)]
        return (flat * blocks + self.offset).view(self.codes.shape)


def dynamic_map() -> Tensor:
    """Return the 256 values of the signed dynamic 8-bit map (arXiv 2110.02861), ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
