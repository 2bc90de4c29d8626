"""Low-rank adapters (LoRA, arXiv 2106.09685) of one product; several at once, chosen token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanok.attention.base import ForwardBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What an adapter adds to one part of a product that may be fused of several: scale x B A."""

    a: Tensor
    """(rank, in)"""
    b: Tensor
    """(rows, rank)"""
    scale: float


class Adapter(nn.Module):
    """The parts of one adapter on one product; parts without one are None.

    `rows` are those of each part. The parts' A are one matrix, so that x is read once; its numbers and
    those of B are kept as they are given, float32 while they learn, and multiplied in the dtype of x.
    """

    def __init__(
        self, parts: Sequence[Part | None], rows: Sequence[int], *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        used = [part for part in parts if part is not None]
        for part, count in zip(parts, rows, strict=True):
            if part is not None and part.b.shape != (count, part.a.shape[0]):
                raise ValueError(
                    f"A is {tuple(part.a.shape)} and B {tuple(part.b.shape)}, of {count} rows"
                )
        self.a = nn.Parameter(torch.cat([part.a for part in used]))
        self.b = nn.ParameterList([nn.Parameter(part.b) for part in used])
        self.scales = [part.scale for part in used]
        self.dropout = dropout
        self._ranks = [part.a.shape[0] for part in used]
        self._rows = list(rows)
        self._is_used = [part is not None for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out): what the adapter adds to the product."""
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        inner = F.linear(x, self.a.to(x.dtype)).split(self._ranks, dim=1)  # type: ignore[no-untyped-call]  # torch's
        made = iter(zip(inner, self.b, self.scales, strict=True))
        parts = []
        for is_used, rows in zip(self._is_used, self._rows, strict=True):
            if is_used:
                part, b, scale = next(made)
                parts.append(F.linear(part, b.to(x.dtype)) * scale)
            else:
                parts.append(x.new_zeros(x.shape[0], rows))
        return torch.cat(parts, dim=1)

    def parts(self) -> list[Part | None]:
        """Return the parts, views of the parameters."""
        inner = self.a.split(self._ranks)  # type: ignore[no-untyped-call]  # torch's
        made = iter(zip(inner, self.b, self.scales, strict=True))
        return [
            Part(a=item[0], b=item[1], scale=item[2]) if is_used and (item := next(made)) else None
            for is_used in self._is_used
        ]

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weight, (out, in) float32."""
        found = [
            self.a.new_zeros(rows, self.a.shape[1], dtype=torch.float32)
            if part is None
            else part.b.float() @ part.a.float() * part.scale
            for part, rows in zip(self.parts(), self._rows, strict=True)
        ]
        return torch.cat(found)


class Lora(nn.Module):
    """The adapters of one product, by index.

    A token's is the one that the batch names; where it names none at all, `active` is every token's.
    Tokens without an adapter get the product of the base alone, bit for bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: int | None = None

    def add(self, index: int, adapter: Adapter) -> None:
        """Hold an adapter under an index that no other has."""
        if str(index) in self.adapters:
            raise ValueError(f"adapter {index} is there already")
        self.adapters[str(index)] = adapter

    def forward(self, x: Tensor, product: Tensor, batch: ForwardBatch | None) -> Tensor:
        """Return the base's product with what the tokens' adapters add, (tokens, out)."""
        chosen = None if batch is None else batch.adapters
        if chosen is None:
            name = str(self.active)
            return product + self.adapters[name](x) if name in self.adapters else product
        for name, adapter in self.adapters.items():
            mine = (chosen == int(name)).nonzero()[:, 0]
            if len(mine):
                product = product.index_add(0, mine, adapter(x[mine]).to(product.dtype))
        return product
