"""Low-rank adapters (LoRA, arXiv 2106.09685) of one product; several at once, chosen token by token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanok.attention.base import ForwardBatch


class Adapter(nn.Module):
    """scale x B A for each part of a product that is fused of several.

    a: (sum of ranks, in), the parts' one after another   b: (rows, rank) for each part; None: the part
    has none.
    """

    def __init__(
        self, a: Tensor, b: Sequence[Tensor | None], rows: Sequence[int], scale: float
    ) -> None:
        super().__init__()
        ranks = [0 if item is None else item.shape[1] for item in b]
        shapes = [(count, rank) for count, rank in zip(rows, ranks, strict=True)]
        found = [None if item is None else tuple(item.shape) for item in b]
        wrong = [
            item for item, shape in zip(found, shapes, strict=True) if item not in (None, shape)
        ]
        if wrong or sum(ranks) != a.shape[0]:
            raise ValueError(
                f"A is {tuple(a.shape)}, the parts' B are {found}, of {list(rows)} rows"
            )
        self.a = nn.Parameter(a)
        self.b = nn.ParameterList([item for item in b if item is not None])
        self.scale = scale
        self._ranks = ranks
        self._rows = list(rows)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out): what the adapter adds to the product."""
        inner = F.linear(x, self.a).split([rank for rank in self._ranks if rank], dim=1)  # type: ignore[no-untyped-call]  # torch's
        made = iter(zip(inner, self.b, strict=True))
        parts = [
            F.linear(*next(made)) if rank else x.new_zeros(x.shape[0], rows)
            for rank, rows in zip(self._ranks, self._rows, strict=True)
        ]
        return torch.cat(parts, dim=1) * self.scale

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weight, (out, in) float32."""
        inner = self.a.float().split([rank for rank in self._ranks if rank])  # type: ignore[no-untyped-call]  # torch's
        made = iter(zip(self.b, inner, strict=True))
        parts = []
        for rank, rows in zip(self._ranks, self._rows, strict=True):
            if rank:
                b, a = next(made)
                parts.append(b.float() @ a)
            else:
                parts.append(self.a.new_zeros(rows, self.a.shape[1], dtype=torch.float32))
        return torch.cat(parts) * self.scale


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
