"""The modules that take the place of `Linear` and `Embedding` when their weight is quantized."""

import torch
from torch import Tensor, nn

from hanok.quant.base import Stored, matmul


class QuantizedLinear(nn.Module):
    """A quantized weight (out, in) and perhaps a bias (out,)."""

    bias: nn.Parameter | None

    def __init__(self, weight: Stored, *, has_bias: bool = False) -> None:
        super().__init__()
        self.stored = weight
        self.bias = nn.Parameter(torch.empty(weight.shape[0])) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out)."""
        return matmul(x, self.stored, self.bias)


class QuantizedEmbedding(nn.Module):
    """A quantized row for each id, looked up in `dtype`."""

    def __init__(self, weight: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = weight
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(tokens,) int64 -> (tokens, size)."""
        return self.stored.rows(ids, self.dtype)
