"""A weight whose rows are several weights, each in a format, an order or nested scales of its own.

So are fused projections of files that quantize their parts apart: values in more bits than keys, say.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hanok.quant.base import StoredWeight


class StackedWeight(nn.Module):
    """Weights of the same columns, one after another by rows: a `models.linear.Weight`."""

    def __init__(self, weights: Sequence[StoredWeight]) -> None:
        super().__init__()
        widths = {weight.shape[1] for weight in weights}
        if len(widths) != 1:
            raise ValueError(f"weights of {sorted(widths)} columns do not stack")
        self.weights = nn.ModuleList(weights)
        self.shape = (sum(weight.shape[0] for weight in weights), widths.pop())

    @property
    def _stored(self) -> list[StoredWeight]:
        return [item for item in self.weights if isinstance(item, StoredWeight)]

    @property
    def nbytes(self) -> int:
        """Bytes held by all."""
        return sum(item.nbytes for item in self._stored)

    @property
    def exact_tokens(self) -> int | None:
        """How many tokens of a product are computed as each alone is; None: any number."""
        limits = [item.exact_tokens for item in self._stored]
        return min((limit for limit in limits if limit is not None), default=None)

    def why_not_static(self) -> str | None:
        """Return why a product needs the CPU to look at numbers, or None."""
        reasons = [item.why_not_static() for item in self._stored]
        return next((reason for reason in reasons if reason is not None), None)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(tokens, in) -> (tokens, out), in x's dtype."""
        sizes = [item.shape[0] for item in self._stored]
        parts = [None] * len(sizes) if bias is None else list(torch.split(bias, sizes))
        products = [item.matmul(x, part) for item, part in zip(self._stored, parts, strict=True)]
        return torch.cat(products, dim=1)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows dequantized, (ids, in) in `dtype`."""
        found = torch.empty(len(ids), self.shape[1], dtype=dtype, device=ids.device)
        start = 0
        for item in self._stored:
            mine = (ids >= start) & (ids < start + item.shape[0])
            found[mine] = item.rows(ids[mine] - start, dtype)
            start += item.shape[0]
        return found
