"""Row-major codes for our GPU kernels (`kernels/triton_linear.py`), which read them once.

x stays in floating point whatever the format allows, sums are float32. One token: a matrix times a
vector. Up to SPLIT_TOKENS: tiles on tensor cores, split over columns so that few rows keep all of a GPU
busy. Up to TILE_TOKENS: the same tiles, more tokens in each. More: BLOCK_BYTES of the weight at a time
are dequantized into one buffer and multiplied by torch. Nested scales stay nested; kernels look them up.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hanok.quant.base import Format, QuantMethod, StoredWeight
from hanok.quant.nested import NestedScale
from hanok.quant.row_major import RowMajorWeight

if TYPE_CHECKING:
    from hanok.kernels.triton_linear import PackedWeight

SPLIT_TOKENS = 16
TILE_TOKENS = 256
BLOCK_BYTES = 2**25  # dequantized: it stays in a large GPU's cache until it is multiplied
UNIT_BYTES = 16
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class TritonWeight(RowMajorWeight):
    """See `StoredWeight`."""

    codebook: Tensor | None

    def __init__(
        self,
        format: Format,
        shape: tuple[int, int],
        device: torch.device,
        method: QuantMethod | None = None,
    ) -> None:
        rows, columns = shape
        units = -(-columns // _unit_columns(format))
        # Zeros, for what pads a row is read.
        codes = torch.zeros(rows, units * UNIT_BYTES, dtype=torch.uint8, device=device)
        super().__init__(format, shape, codes, method)
        codebook = None
        if format.codebook is not None:
            codebook = torch.tensor(format.codebook, device=device)
        self.register_buffer("codebook", codebook, persistent=False)
        self._made: PackedWeight | None = None

    def finish(self) -> None:
        """See `StoredWeight`."""
        super().finish()
        self._made = None

    def _forget_addresses(self) -> None:
        self._made = None

    def _packed(self, codes: Tensor) -> Tensor:
        return packed(self.format, codes)

    def _unpacked(self, held: Tensor) -> Tensor:
        return unpacked(self.format, held, self.shape[1])

    def _rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        from hanok.kernels.triton_linear import dequantize_rows

        return dequantize_rows(self._weight(), ids, dtype)

    def _block(self, start: int, count: int, into: Tensor | None = None) -> Tensor:
        from hanok.kernels.triton_linear import dequantize

        block = torch.empty(count, self.shape[1], device=self.device)
        dequantize(self._weight(), start, block)
        return block

    def kernel(self, num_tokens: int, dtype: torch.dtype) -> str:
        """See `StoredWeight`."""
        if num_tokens == 1:
            return "triton, matrix times vector"
        if num_tokens <= SPLIT_TOKENS:
            return "triton, tiles split over columns"
        if num_tokens <= TILE_TOKENS:
            return "triton, tiles"
        return "torch, dequantized block by block by triton"

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from hanok.kernels.triton_linear import gemv, tiles

        if x.dtype not in FLOATS:
            raise ValueError(f"x is {x.dtype}; it must be float32, float16 or bfloat16")
        if x.shape[0] == 0:
            return x.new_empty(0, self.shape[0])
        if x.shape[0] > TILE_TOKENS:
            return self._by_torch(x, bias)
        return (gemv if x.shape[0] == 1 else tiles)(x.contiguous(), self._weight(), bias)

    def _by_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from hanok.kernels.triton_linear import dequantize

        rows, columns = self.shape
        size = max(1, min(rows, BLOCK_BYTES // (columns * x.element_size())))
        buffer = x.new_empty(size, columns)
        output = x.new_empty(x.shape[0], rows)
        for start in range(0, rows, size):
            block = buffer[: min(size, rows - start)]
            dequantize(self._weight(), start, block)
            end = start + len(block)
            part = None if bias is None else bias[start:end].to(x.dtype)
            output[:, start:end] = F.linear(x, block, part)
        return output

    def _weight(self) -> "PackedWeight":
        """Return what the kernels take; made when first asked for."""
        if self._made is None:
            from hanok.kernels.triton_linear import Nested, PackedWeight

            form, scale, nested = self.format, self.scales, None
            if isinstance(scale, NestedScale):
                nested = Nested(codebook=scale.codebook, absmax=scale.absmax, offset=scale.offset)
                scale = scale.codes
            units = self.codes.shape[1] // UNIT_BYTES
            self._made = PackedWeight(
                kind="integer" if form.kind == "signed" or form.kind == "zero" else form.kind,
                bits=form.bits,
                columns=self.shape[1],
                group_size=form.group_size or units * _unit_columns(form),
                codes=self.codes,
                scale=scale,
                middle=_middle(form),
                zero=self.zero,
                codebook=self.codebook,
                nested=nested,
            )
        return self._made


class TritonLayout:
    """See `Layout`."""

    name = "triton"
    summary = "our GPU kernels, weights read once and dequantized on the way"

    def why_not(self, format: Format, device: torch.device) -> str | None:
        """Return why our GPU kernels cannot read such weights there."""
        if device.type != "cuda":
            return f"needs a CUDA device (found: {device.type})"
        if format.activations == "outliers":
            return "rounds no activations, which this format asks for"
        if format.bits not in (4, 8) or (format.group_size or 32) % 32:
            return f"reads 4 or 8 bits in groups of a multiple of 32 columns (found: {format})"
        if find_spec("triton") is None:
            return "triton is not installed: pip install triton (torch for CUDA brings it)"
        return None

    def empty(
        self,
        format: Format,
        shape: tuple[int, int],
        device: torch.device,
        method: QuantMethod | None = None,
    ) -> StoredWeight:
        """See `Layout`."""
        return TritonWeight(format, shape, device, method)


def packed(form: Format, codes: Tensor) -> Tensor:
    """Put codes (out, in) into units of 16 bytes, (out, units * 16) uint8; see the kernels' file."""
    unsigned = codes.view(torch.uint8)
    if form.kind == "signed":
        unsigned = (unsigned + _middle(form)) & (2**form.bits - 1)
    unsigned = F.pad(unsigned, (0, -codes.shape[1] % _unit_columns(form)))
    if form.bits == 8:
        return unsigned
    low, high = unsigned.view(len(codes), -1, 2, UNIT_BYTES).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpacked(form: Format, stored: Tensor, columns: int) -> Tensor:
    """Undo `packed`."""
    codes = stored
    if form.bits == 4:
        units = stored.view(len(stored), -1, UNIT_BYTES)
        codes = torch.stack([units & 15, units >> 4], dim=2).flatten(1)
    codes = codes[:, :columns]
    if form.kind == "signed":
        return (codes.short() - _middle(form)).char()
    return codes.contiguous().view(torch.float8_e4m3fn) if form.kind == "float8" else codes


def _middle(form: Format) -> int:
    """Return the unsigned code of zero where codes are signed."""
    return 2 ** (form.bits - 1) if form.kind == "signed" else 0


def _unit_columns(form: Format) -> int:
    return 8 * UNIT_BYTES // form.bits


LAYOUT = TritonLayout()
