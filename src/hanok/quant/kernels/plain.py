"""Row-major codes and torch's operators: everywhere, for every format, and slower than it could be.

A block of rows at a time is dequantized and multiplied, so a product needs BLOCK_ROWS rows of floats
beside the weight. Two 4-bit codes share a byte, the even column in its low half.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hanok.quant.base import Format, QuantizedWeight, QuantMethod, Stored
from hanok.quant.nested import NestedScale

BLOCK_ROWS = 1024
CODE_TYPES = {"signed": torch.int8, "float8": torch.float8_e4m3fn}


class PlainWeight:
    """See `Stored`."""

    def __init__(self, method: QuantMethod, shape: tuple[int, int], device: torch.device) -> None:
        self.method = method
        self.shape = shape
        form, (rows, columns) = method.format, shape
        groups = form.num_groups(columns)
        width = -(-columns // 2) if form.bits == 4 else columns
        code_type = torch.uint8 if form.bits == 4 else CODE_TYPES[form.kind]
        self._codes = torch.empty(rows, width, dtype=code_type, device=device)
        # As the methods give them: float16 for groups, float32 for rows and for absolute maxima.
        is_half = form.group_size is not None and form.kind != "codebook"
        scale_type = torch.float16 if is_half else torch.float32
        self._scale: Tensor | NestedScale
        self._scale = torch.empty(rows, groups, dtype=scale_type, device=device)
        self._zero: Tensor | None = None
        if form.kind == "zero":
            self._zero = torch.empty(rows, groups, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """See `Stored`."""
        zero_bytes = 0 if self._zero is None else self._zero.nbytes
        return self._codes.nbytes + self._scale.nbytes + zero_bytes

    @property
    def device(self) -> torch.device:
        """See `Stored`."""
        return self._codes.device

    def write_rows(self, start: int, rows: Tensor) -> None:
        """See `Stored`."""
        record = self.method.quantize(rows.to(self.device))
        chosen = slice(start, start + rows.shape[0])
        self._codes[chosen] = packed(record.codes) if record.format.bits == 4 else record.codes
        if isinstance(self._scale, Tensor) and isinstance(record.scale, Tensor):
            self._scale[chosen] = record.scale
        if self._zero is not None and record.zero is not None:
            self._zero[chosen] = record.zero

    def finish(self) -> None:
        """See `Stored`."""
        if self.method.format.has_nested_scale and isinstance(self._scale, Tensor):
            self._scale = NestedScale.of(self._scale)

    def record(self) -> QuantizedWeight:
        """See `Stored`."""
        return replace(self._part(slice(None)), scale=self._scale)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Stored`."""
        return self._part(ids).dequantize().to(dtype)

    def kernel(self, num_tokens: int, dtype: torch.dtype) -> str:
        """See `Stored`."""
        if self.method.format.activations == "outliers":
            return "torch, whole numbers and outliers apart"
        return "torch, dequantized block by block"

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Stored`."""
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
        scale = self._scale
        if isinstance(scale, NestedScale):
            scale = scale.dequantize()
        zero = None if self._zero is None else self._zero[rows]
        return QuantizedWeight(format=form, codes=codes, scale=scale[rows], zero=zero)

    def _with_outliers_apart(self, x: Tensor, threshold: float) -> Tensor:
        """LLM.int8() (arXiv 2208.07339): (tokens, in) -> (tokens, out) float32."""
        x = x.float()
        is_outlier = (x.abs() >= threshold).any(0)
        usual = x.masked_fill(is_outlier, 0.0)
        largest = usual.abs().amax(-1, keepdim=True)
        codes = (usual * (127 / largest).nan_to_num(0.0, 0.0, 0.0)).round().char()
        whole = torch._int_mm(codes, self._codes.t()).float()
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

    def empty(self, method: QuantMethod, shape: tuple[int, int], device: torch.device) -> Stored:
        """See `Layout`."""
        return PlainWeight(method, shape, device)


def packed(codes: Tensor) -> Tensor:
    """Put two 4-bit codes (out, in) into each byte, (out, ceil(in / 2)) uint8."""
    nibbles = F.pad(codes.view(torch.uint8) & 15, (0, codes.shape[1] % 2))
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpacked(codes: Tensor, columns: int, *, is_signed: bool) -> Tensor:
    """Undo `packed`: (out, in), int8 from -8 to 7 or uint8 from 0 to 15."""
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, :columns]
    return (nibbles ^ 8).char() - 8 if is_signed else nibbles


LAYOUT = PlainLayout()
