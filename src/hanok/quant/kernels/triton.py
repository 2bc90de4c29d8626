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

from hanok.quant.base import Format, QuantizedWeight, QuantMethod, StoredWeight
from hanok.quant.groups import GroupConstants
from hanok.quant.nested import NestedScale

if TYPE_CHECKING:
    from hanok.kernels.triton_linear import PackedWeight

SPLIT_TOKENS = 16
TILE_TOKENS = 256
BLOCK_BYTES = 2**25  # dequantized: it stays in a large GPU's cache until it is multiplied
UNIT_BYTES = 16
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class TritonWeight(StoredWeight):
    """See `StoredWeight`."""

    def __init__(self, method: QuantMethod, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__(method, shape)
        form, (rows, columns) = method.format, shape
        units = -(-columns // _unit_columns(form))
        # Zeros, for what pads a row is read.
        self._codes = torch.zeros(rows, units * UNIT_BYTES, dtype=torch.uint8, device=device)
        self._groups = GroupConstants(form, shape, device)
        self._codebook: Tensor | None = None
        if form.codebook is not None:
            self._codebook = torch.tensor(form.codebook, device=device)
        self._packed: PackedWeight | None = None

    @property
    def nbytes(self) -> int:
        """See `StoredWeight`."""
        codebook_bytes = 0 if self._codebook is None else self._codebook.nbytes
        return self._codes.nbytes + self._groups.nbytes + codebook_bytes

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
        self._codes[chosen] = packed(record.format, record.codes)
        self._groups.write_rows(start, record)

    def finish(self) -> None:
        """See `StoredWeight`."""
        self._groups.finish()
        self._packed = None

    def record(self) -> QuantizedWeight:
        """See `StoredWeight`."""
        form = self.method.format
        codes = unpacked(form, self._codes, self.shape[1])
        groups = self._groups
        return QuantizedWeight(format=form, codes=codes, scale=groups.scale, zero=groups.zero)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See `StoredWeight`."""
        from hanok.kernels.triton_linear import dequantize_rows

        return dequantize_rows(self._weight(), ids, dtype)

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
        if self._packed is None:
            from hanok.kernels.triton_linear import Nested, PackedWeight

            form, scale, nested = self.method.format, self._groups.scale, None
            if isinstance(scale, NestedScale):
                nested = Nested(codebook=scale.codebook, absmax=scale.absmax, offset=scale.offset)
                scale = scale.codes
            units = self._codes.shape[1] // UNIT_BYTES
            self._packed = PackedWeight(
                kind="integer" if form.kind == "signed" or form.kind == "zero" else form.kind,
                bits=form.bits,
                columns=self.shape[1],
                group_size=form.group_size or units * _unit_columns(form),
                codes=self._codes,
                scale=scale,
                middle=_middle(form),
                zero=self._groups.zero,
                codebook=self._codebook,
                nested=nested,
            )
        return self._packed


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
        self, method: QuantMethod, shape: tuple[int, int], device: torch.device
    ) -> StoredWeight:
        """See `Layout`."""
        return TritonWeight(method, shape, device)


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
