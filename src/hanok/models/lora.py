"""Low-rank adapters (LoRA, arXiv 2106.09685) of one product; several at once, chosen token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanok.kernels.lora import LoraTable, TablePart, add_differentiably, by_columns, why_not
from hanok.kernels.native import Native, native

BLOCK_ROWS = 1024  # of a weight in float32 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What an adapter adds to one part of a product that may be fused of several: scale x B A."""

    a: Tensor
    """(rank, in)"""
    b: Tensor
    """(rows, rank)"""
    scale: float
    magnitude: Tensor | None = None
    """(rows,), of DoRA (arXiv 2402.09353): W + scale x B A is scaled to rows of these lengths."""
    initial: tuple[Tensor, Tensor] | None = None
    """A and B at the start, whose product is taken away again (PiSSA, arXiv 2404.02948): they do not
    learn, and the base's weights stay as they are."""


class Base(Protocol):
    """The product that an adapter changes."""

    @property
    def bias(self) -> Tensor | None:
        """(out,)."""

    def float_rows(self, rows: slice) -> Tensor:
        """Return some rows of the weight, (rows, in) float32."""


class Adapter(nn.Module):
    """The parts of one adapter on one product; parts without one are None.

    `rows` are those of each part. The parts' A are one matrix, so that x is read once; its numbers and
    those of B are kept as they are given, float32 while they learn, and multiplied in the dtype of x.
    """

    initial_a: Tensor | None

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
        lengths = [part.magnitude for part in used if part.magnitude is not None]
        self.magnitudes = nn.ParameterList([nn.Parameter(item) for item in lengths])
        initial = [part.initial for part in used if part.initial is not None]
        self.register_buffer("initial_a", torch.cat([a for a, _ in initial]) if initial else None)
        self.initial_b = [b for _, b in initial]
        self.scales = [part.scale for part in used]
        self.dropout = dropout
        self._ranks = [part.a.shape[0] for part in used]
        self._rows = list(rows)
        self._is_used = [part is not None for part in parts]
        self._lengths: Tensor | None = None
        self._lengths_of: tuple[int, ...] = ()

    def forward(self, x: Tensor, product: Tensor, base: Base) -> Tensor:
        """Return the product (tokens, out) of the base and x (tokens, in) with what the adapter adds.

        DoRA's lengths of rows get no gradient, as in its paper; dropout is that of x in A x.
        """
        added = self._added(x)
        if not len(self.magnitudes):
            return product + added
        factor = self._factor(base).to(product.dtype)
        plain = product if base.bias is None else product - base.bias
        return product + (factor - 1) * plain + factor * added

    def _added(self, x: Tensor) -> Tensor:
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        made = zip(self._inner(x, self.a), self.b, self.scales, strict=True)
        products = [F.linear(inner, b.to(x.dtype)) * scale for inner, b, scale in made]
        if self.initial_a is not None:
            taken = zip(self._inner(x, self.initial_a), self.initial_b, self.scales, strict=True)
            products = [
                product - F.linear(inner, b.to(x.dtype)) * scale
                for product, (inner, b, scale) in zip(products, taken, strict=True)
            ]
        found = iter(products)
        parts = [
            next(found) if is_used else x.new_zeros(x.shape[0], rows)
            for is_used, rows in zip(self._is_used, self._rows, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def _inner(self, x: Tensor, a: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = F.linear(x, a.to(x.dtype)).split(self._ranks, dim=1)  # type: ignore[no-untyped-call]  # torch's
        return found

    @property
    def is_plain(self) -> bool:
        """Whether it adds scale x B A x to the product and nothing else, as our kernel does."""
        return not len(self.magnitudes) and self.initial_a is None

    @property
    def first_rows(self) -> list[int]:
        """Return the first row of each part that is used."""
        starts = accumulate(self._rows, initial=0)
        return [start for start, is_used in zip(starts, self._is_used, strict=False) if is_used]

    def added(self, x: Tensor, product: Tensor, kernels: Native) -> Tensor:
        """Return the product, changed in place, with what is added to all tokens; differentiable."""
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        weights = self.a, list(self.b)
        return add_differentiably(kernels, x, product, *weights, self.first_rows, self.scales)

    def table_parts(self, number: int, dtype: torch.dtype) -> list[TablePart]:
        """Return the parts as our kernel takes them, in a dtype."""
        a = self.a.detach().to(dtype).split(self._ranks)  # type: ignore[no-untyped-call]  # torch's
        b = [by_columns(item.detach().to(dtype)) for item in self.b]
        made = zip(self.first_rows, a, b, self.scales, strict=True)
        return [TablePart(number, *item) for item in made]

    def is_in_place(self, dtype: torch.dtype) -> bool:
        """Whether `table_parts` are the parameters themselves, so that they may change."""
        return all(item.dtype is dtype for item in (self.a, *self.b)) and all(
            by_columns(item) is item for item in self.b
        )

    def parts(self) -> list[Part | None]:
        """Return the parts, views of the parameters."""
        inner = self.a.split(self._ranks)  # type: ignore[no-untyped-call]  # torch's
        first = [] if self.initial_a is None else self.initial_a.split(self._ranks)  # type: ignore[no-untyped-call]  # torch's
        made = iter(
            Part(
                a=inner[index],
                b=self.b[index],
                scale=scale,
                magnitude=self.magnitudes[index] if len(self.magnitudes) else None,
                initial=(first[index], self.initial_b[index]) if first else None,
            )
            for index, scale in enumerate(self.scales)
        )
        return [next(made) if is_used else None for is_used in self._is_used]

    def merged(self, base: Base) -> Tensor:
        """Return the weight with the adapter in it, (out, in) float32."""
        found, start = [], 0
        for part, rows in zip(self.parts(), self._rows, strict=True):
            weight = base.float_rows(slice(start, start + rows))
            found.append(weight if part is None else merged(weight, part))
            start += rows
        return torch.cat(found)

    def _factor(self, base: Base) -> Tensor:
        """Return what each row of the product is multiplied by, (out,): DoRA's m / |W + scale x B A|."""
        lengths = self._lengths_now(base).split(self._rows)  # type: ignore[no-untyped-call]  # torch's
        found = iter(self.magnitudes)
        return torch.cat(
            [
                next(found) / length if is_used else torch.ones_like(length)
                for is_used, length in zip(self._is_used, lengths, strict=True)
            ]
        )

    @torch.no_grad()
    def _lengths_now(self, base: Base) -> Tensor:
        """Return the lengths of the rows of W + scale x B A; computed again once A or B has changed."""
        versions = (self.a._version, *(b._version for b in self.b))
        if self._lengths is None or self._lengths_of != versions:
            found, start = [], 0
            for part, rows in zip(self.parts(), self._rows, strict=True):
                if part is None:
                    found.append(self.a.new_ones(rows, dtype=torch.float32))
                else:
                    found.append(row_lengths(base, part, start))
                start += rows
            self._lengths, self._lengths_of = torch.cat(found), versions
        return self._lengths


def merged(weight: Tensor, part: Part) -> Tensor:
    """Return a part's weight, (rows, in) float32, with its adapter in it."""
    found = weight + part.b.float() @ part.a.float() * part.scale
    if part.initial is not None:
        a, b = part.initial
        found = found - b.float() @ a.float() * part.scale
    if part.magnitude is not None:
        found = found * (part.magnitude.float() / found.norm(dim=1))[:, None]
    return found


def row_lengths(base: Base, part: Part, start: int) -> Tensor:
    """Return the lengths of the rows of a part's W + scale x B A, whose first is row `start` of W."""
    rows = part.b.shape[0]
    found = []
    for first in range(0, rows, BLOCK_ROWS):
        some = slice(first, min(rows, first + BLOCK_ROWS))
        weight = base.float_rows(slice(start + some.start, start + some.stop))
        initial = None if part.initial is None else (part.initial[0], part.initial[1][some])
        block = Part(a=part.a, b=part.b[some], scale=part.scale, initial=initial)
        found.append(merged(weight, block).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    return torch.cat(found)


class Change(Protocol):
    """What one adapter makes of what a module gives."""

    def __call__(self, x: Tensor, output: Tensor, base: Any) -> Tensor:
        """Return the adapter's output (tokens, …), given x and the output of the module `base`."""


class Lora(nn.Module):
    """The adapters of one module, by index: of a product, an embedding, or a norm.

    A token's is the one that the batch names; where it names none at all, `active` is every token's.
    Tokens without an adapter get the output of the base alone, bit for bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: int | None = None
        self._table: tuple[Any, LoraTable] | None = None

    def add(self, index: int, adapter: nn.Module) -> None:
        """Hold an adapter, a `Change`, under an index that no other has."""
        if str(index) in self.adapters:
            raise ValueError(f"adapter {index} is there already")
        self.adapters[str(index)] = adapter

    def forward(self, x: Tensor, output: Tensor, chosen: Tensor | None, base: nn.Module) -> Tensor:
        """Return what the tokens' adapters make of the output of `base` for x, (tokens, …).

        chosen: (tokens,), the index of each token's adapter; None: `active` is that of all
        """
        name = str(self.active)
        if chosen is None and name not in self.adapters:
            return output
        compiled = self._compiled(x, output, chosen)
        if compiled is not None:
            return compiled
        if chosen is None:
            whole: Tensor = self.adapters[name](x, output, base)
            return whole
        for name, adapter in self.adapters.items():
            mine = (chosen == int(name)).nonzero()[:, 0]
            if len(mine):
                changed = adapter(x[mine], output[mine], base)
                output = output.index_copy(0, mine, changed.to(output.dtype))
        return output

    @property
    def is_exact(self) -> bool:
        """Whether a token's result is that of the token alone: our kernel multiplies, on a CPU."""
        return self._kernels() is not None

    def _kernels(self) -> Native | None:
        """Return the kernels where they multiply by all adapters there are."""
        for adapter in self.adapters.values():
            if not isinstance(adapter, Adapter) or not adapter.is_plain:
                return None
            if why_not([adapter.a, *adapter.b]) is not None:
                return None
        return native()

    def _compiled(self, x: Tensor, product: Tensor, chosen: Tensor | None) -> Tensor | None:
        """Return the product, changed in place by our kernel; None where torch has to multiply."""
        kernels = self._kernels()
        if kernels is None or why_not([x, product]) is not None:
            return None
        needs = (x, product, *self.parameters())
        if torch.is_grad_enabled() and any(item.requires_grad for item in needs):
            adapter = self.adapters[str(self.active)] if chosen is None else None
            return adapter.added(x, product, kernels) if isinstance(adapter, Adapter) else None
        if chosen is None:
            chosen = x.new_full((len(x),), self.active or 0, dtype=torch.int64)
        self._table_for(x, product).add(kernels, x, chosen, product)
        return product

    def _table_for(self, x: Tensor, product: Tensor) -> LoraTable:
        """Return the adapters as the kernel takes them: kept, unless it takes copies."""
        key = x.dtype, tuple(self.adapters), [item.data_ptr() for item in self.parameters()]
        if self._table is not None and self._table[0] == key:
            return self._table[1]
        found = {
            int(name): item for name, item in self.adapters.items() if isinstance(item, Adapter)
        }
        parts = [
            part
            for number, adapter in found.items()
            for part in adapter.table_parts(number, x.dtype)
        ]
        table = LoraTable(parts, product.shape[1], x.shape[1])
        if all(adapter.is_in_place(x.dtype) for adapter in found.values()):
            self._table = key, table
        return table

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses, for copies."""
        return self.__dict__ | {"_table": None}
