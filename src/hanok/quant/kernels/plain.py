"""Row-major codes and torch's operators: everywhere, for every format, and slower than it could be.

A block of rows at a time is dequantized and multiplied, so a product needs BLOCK_ROWS rows of floats
beside the weight. Two 4-bit codes share a byte, the even column in its low half.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hanok.quant.base import BLOCK_ROWS, Format, QuantMethod, StoredWeight
from hanok.quant.row_major import RowMajorWeight

CODE_TYPES = {
    "signed": torch.int8,
    "zero": torch.uint8,
    "codebook": torch.uint8,
    "float8": torch.float8_e4m3fn,
}


class PlainWeight(RowMajorWeight):
    """See `StoredWeight`."""

    def __init__(
        self,
        format: Format,
        shape: tuple[int, int],
        device: torch.device,
        method: QuantMethod | None = None,
    ) -> None:
        rows, columns = shape
        width = -(-columns // 2) if format.bits == 4 else columns
        kind = torch.uint8 if format.bits == 4 else CODE_TYPES[format.kind]
        codes = torch.empty(rows, width, dtype=kind, device=device)
        super().__init__(format, shape, codes, method)

    def _packed(self, codes: Tensor) -> Tensor:
        return packed(codes) if self.format.bits == 4 else codes

    def _unpacked(self, held: Tensor) -> Tensor:
        if self.format.bits != 4:
            return held
        return unpacked(held, self.shape[1], is_signed=self.format.kind == "signed")

    def kernel(self, num_tokens: int, dtype: torch.dtype) -> str:
        """See `StoredWeight`."""
        if self.format.activations == "outliers":
            return "torch, whole numbers and outliers apart"
        return "torch, dequantized block by block"

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        threshold = self.format.outlier_threshold
        if threshold is not None:
            product = self._with_outliers_apart(x, threshold)
            return (product if bias is None else product + bias).to(x.dtype)
        output = x.new_empty(x.shape[0], self.shape[0])
        # A CPU without bfloat16 instructions multiplies float32 several times faster.
        inner = torch.float32 if x.device.type == "cpu" else x.dtype
        wide = x.to(inner)
        for start in range(0, self.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            block = self._part(rows).dequantize().to(inner)
            part = None if bias is None else bias[rows].to(inner)
            output[:, rows] = F.linear(wide, block, part)
        return output

    def _with_outliers_apart(self, x: Tensor, threshold: float) -> Tensor:
        """LLM.int8() (arXiv 2208.07339): (tokens, in) -> (tokens, out) float32."""
        x = x.float()
        is_outlier = (x.abs() >= threshold).any(0)
        usual = x.masked_fill(is_outlier, 0.0)
        largest = usual.abs().amax(-1, keepdim=True)
        codes = (usual * (127 / largest).nan_to_num(0.0, 0.0, 0.0)).round().char()
        whole = whole_product(codes, self.codes)
        scale = self._part(slice(None)).float_scale()[:, 0]
        product = whole * (largest / 127) * scale
        if is_outlier.any():
            columns = self.codes[:, is_outlier].float() * scale[:, None]
            product += x[:, is_outlier] @ columns.t()
        return product


class PlainLayout:
    """See `Layout`."""

    name = "plain"
    summary = "torch's operators, a block of rows dequantized at a time"

    def why_not(self, format: Format, device: torch.device) -> str | None:
        """Return None: it holds everything."""
        return None

    def empty(
        self,
        format: Format,
        shape: tuple[int, int],
        device: torch.device,
        method: QuantMethod | None = None,
    ) -> StoredWeight:
        """See `Layout`."""
        return PlainWeight(format, shape, device, method)


@cache
def torch_multiplies_bytes() -> bool:
    """Return whether torch's products of int8 are exact on this CPU.

    On AVX2 oneDNN adds pairs of them in 16 bits, which do not hold what the largest codes give.
    """
    largest = torch.full((17, 40), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 40 * 127 * 127).all())


def whole_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T of codes, (tokens, in) and (out, in) int8, in float32: (tokens, out)."""
    if x.device.type != "cpu" or torch_multiplies_bytes():
        return torch._int_mm(x, weight.t()).float()
    wide, output = x.float(), torch.empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        output[:, rows] = F.linear(wide, weight[rows].float())
    return output


def packed(codes: Tensor) -> Tensor:
    """Put two 4-bit codes (out, in) into each byte, (out, ceil(in / 2)) uint8."""
    nibbles = F.pad(codes.view(torch.uint8) & 15, (0, codes.shape[1] % 2))
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpacked(codes: Tensor, columns: int, *, is_signed: bool) -> Tensor:
    """Undo `packed`: (out, in), int8 from -8 to 7 or uint8 from 0 to 15."""
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, :columns]
    return (nibbles ^ 8).char() - 8 if is_signed else nibbles


LAYOUT = PlainLayout()
