"""Weights of an adapter's own: whole modules (PEFT's modules_to_save) and rows of single tokens.

Each is a `lora.Change`: for the tokens of its adapter its output stands in place of the base's.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Computes(Protocol):
    """A module that computes with other weights than its own as well."""

    def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the module's output for x with these weights."""


class OwnModule(nn.Module):
    """A weight, and perhaps a bias, in place of the base's."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor, output: Tensor, base: Computes) -> Tensor:
        """See `lora.Change`; computed in the dtype of the base's output."""
        bias = None if self.bias is None else self.bias.to(output.dtype)
        return base.computed(x, self.weight.to(output.dtype), bias)


class OwnRows(nn.Module):
    """Rows of some tokens in place of those of an embedding (PEFT's trainable_token_indices)."""

    ids: Tensor

    def __init__(self, ids: Tensor, rows: nn.Parameter) -> None:
        """ids: (n,) int64, ascending   rows: (n, size)."""
        super().__init__()
        self.register_buffer("ids", ids)
        self.rows = rows

    def forward(self, x: Tensor, output: Tensor, base: nn.Module) -> Tensor:
        """See `lora.Change`; x are token ids (tokens,)."""
        place = torch.searchsorted(self.ids, x).clamp_max(len(self.ids) - 1)
        is_mine = self.ids[place] == x
        return torch.where(is_mine[:, None], F.embedding(place, self.rows).to(output.dtype), output)


class OwnScores(OwnRows):
    """The same rows in a head that is tied to the embedding: the scores of these tokens."""

    def forward(self, x: Tensor, output: Tensor, base: nn.Module) -> Tensor:
        """See `lora.Change`; x are hidden states (tokens, hidden)."""
        return output.index_copy(1, self.ids, F.linear(x, self.rows.to(x.dtype)).to(output.dtype))
