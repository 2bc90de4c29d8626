"""Row-major codes and torch's operators: everywhere, for every format, and slower than it could be.

A block of rows at a time is dequantized and multiplied, so a product needs BLOCK_ROWS rows of floats
beside the weight. Two 4-bit codes share a byte, the even column in its low half.
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hanok.quant.base import Format, QuantizedWeight, QuantMethod, StoredWeight
from hanok.quant.groups import GroupConstants
from hanok.quant.nested import NestedScale

BLOCK_ROWS = 1024
CODE_TYPES = {"signed": torch.int8, "float8": torch.float8_e4m3fn}


class PlainWeight(StoredWeight):
    """See `StoredWeight`."""

    def __init__(self, method: QuantMethod, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__(method, shape)
        form, (rows, columns) = method.format, shape
        width = -(-columns // 2) if form.bits == 4 else columns
        code_type = torch.uint8 if form.bits == 4 else CODE_TYPES[form.kind]
        self._codes = torch.empty(rows, width, dtype=code_type, device=device)
        self._groups = GroupConstants(form, shape, device)

    @property
    def nbytes(self) -> int:
        """See `StoredWeight`."""
        return self._codes.nbytes + self._groups.nbytes

    @property
    def device(self) -> torch.device:
        """See `StoredWeight`."""
        return self._codes.device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """See `StoredWeight`."""
        return self._groups.with_codes(self._codes)

    def write_rows(self, start: int, rows: Tensor) -> None:
        """See `StoredWeight`."""
        record = self.method.quantize(rows.to(self.device))
        chosen = slice(start, start + rows.shape[0])
        self._codes[chosen] = packed(record.codes) if record.format.bits == 4 else record.codes
        self._groups.write_rows(start, record)

    def finish(self) -> None:
        """See `StoredWeight`."""
        self._groups.finish()

    def record(self) -> QuantizedWeight:
        """See `StoredWeight`."""
        return replace(self._part(slice(None)), scale=self._groups.scale)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See `StoredWeight`."""
        return self._part(ids).dequantize().to(dtype)

    def kernel(self, num_tokens: int, dtype: torch.dtype) -> str:
        """See `StoredWeight`."""
        if self.method.format.activations == "outliers":
            return "torch, whole numbers and outliers apart"
        return "torch, dequantized block by block"

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        threshold = self.method.format.outlier_threshold
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

    def _part(self, rows: slice | Tensor) -> QuantizedWeight:
        """Return the record of some rows, with plain scales."""
        form, codes = self.method.format, self._codes[rows]
        if form.bits == 4:
            codes = unpacked(codes, self.shape[1], is_signed=form.kind == "signed")
        scale, zero = self._groups.scale, self._groups.zero
        if isinstance(scale, NestedScale):
            scale = scale.dequantize()
        chosen_zero = None if zero is None else zero[rows]
        return QuantizedWeight(format=form, codes=codes, scale=scale[rows], zero=chosen_zero)

    def _with_outliers_apart(self, x: Tensor, threshold: float) -> Tensor:
        """LLM.int8() (arXiv 2208.07339): (tokens, in) -> (tokens, out) float32."""
        x = x.float()
        is_outlier = (x.abs() >= threshold).any(0)
        usual = x.masked_fill(is_outlier, 0.0)
        largest = usual.abs().amax(-1, keepdim=True)
        codes = (usual * (127 / largest).nan_to_num(0.0, 0.0, 0.0)).round().char()
        whole = whole_product(codes, self._codes)
        scale = self._part(slice(None)).float_scale()[:, 0]
        product = whole * (largest / 127) * scale
        if is_outlier.any():
            columns = self._codes[:, is_outlier].float() * scale[:, None]
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
        self, method: QuantMethod, shape: tuple[int, int], device: torch.device
    ) -> StoredWeight:
        """See `Layout`."""
        return PlainWeight(method, shape, device)


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
