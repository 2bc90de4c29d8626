"""The attention seam: what a layer asks for, what a batch looks like, and who can answer.

Every score in hanok goes through one `Backend.attend`. Activations are packed: the tokens of all
sequences stand one after another, `query_lengths` says how many belong to each, and nothing is
padded. Keys and values come from a layer's `LayerState` when there is a cache, else from the batch.

A backend is one file of this package that defines `BACKENDS`. `choose` takes the first that fits and
can say why each of the others does not. `reference` is the oracle for all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from hanok.attention.cache import LayerState
from hanok.errors import OptionError, UnsupportedError
from hanok.kernels.processor import FEW_ROWS, multiplies
from hanok.registry import discover, nearest_first

# What "auto" tries, in this order; a backend that is not named here is used only when asked for.
AUTO_ORDER = ("triton", "native", "sdpa", "eager")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What one layer asks of a backend."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # tokens a query sees, itself included; None: all before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """Where the keys of sequences with one new token each lie, on the device that reads them.

    `key_lengths`: (sequences,), the new tokens included. `pages`: (sequences, pages of each), rows of
    the cache: key number n is at n % page size of page n // page size. Both int32 or int64.
    """

    key_lengths: Tensor
    pages: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """The packed tokens of one forward pass and their bookkeeping.

    token_ids, positions: (tokens,) int64. `query_lengths` has one entry for each sequence and sums to
    tokens; `key_lengths` counts the keys that the sequence's last token sees (cached and new);
    `pages` says which rows of the cache hold each sequence, in order: one that is as long as the
    sequence may get, or as many as its keys need. `sequence_lengths` are the tokens that each sequence
    has in all, those of later batches too: angles may depend on them. Kernels that find keys through a
    `page_table` read lengths there and not here; where there is none they make one.
    """

    token_ids: Tensor
    positions: Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    sequence_lengths: tuple[int, ...]
    page_table: PageTable | None = None

    @classmethod
    def of(
        cls,
        sequences: list[list[int]],
        *,
        past: list[int] | None = None,
        slots: list[int] | None = None,
        pages: list[tuple[int, ...]] | None = None,
        sequence_lengths: list[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> "ForwardBatch":
        """Pack token lists; `past` tokens of each are in the cache already.

        They are in `pages`, or where a row holds a whole sequence in row `slots` (0, 1, …).
        `sequence_lengths` default to what is there after this batch.
        """
        past = past or [0] * len(sequences)
        key_lengths = tuple(p + len(t) for p, t in zip(past, sequences, strict=True))
        positions = [
            position
            for start, end in zip(past, key_lengths, strict=True)
            for position in range(start, end)
        ]
        flat = [token for tokens in sequences for token in tokens]
        batch = cls(
            token_ids=torch.tensor(flat, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            query_lengths=tuple(map(len, sequences)),
            key_lengths=key_lengths,
            pages=tuple(pages or ((slot,) for slot in slots or range(len(sequences)))),
            sequence_lengths=tuple(sequence_lengths or key_lengths),
        )
        return batch._with_pages()

    def to(self, device: torch.device) -> "ForwardBatch":
        """Return the batch on another device."""
        if self.token_ids.device == device:
            return self
        moved = replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            page_table=None,
        )
        return moved._with_pages()

    def _with_pages(self) -> "ForwardBatch":
        """Make the page table once for all layers; on a CPU nobody needs it."""
        if self.token_ids.is_cuda and set(self.query_lengths) == {1}:
            return replace(self, page_table=self.new_page_table())
        return self

    @property
    def slots(self) -> tuple[int, ...]:
        """The row that holds each sequence's first keys: all of them where rows are long enough."""
        return tuple(pages[0] for pages in self.pages)

    def new_page_table(self) -> PageTable:
        """Return `key_lengths` and `pages` as tensors; shorter sequences repeat their last page."""
        most = max(map(len, self.pages))
        rows = [
            [length, *pages, *[pages[-1]] * (most - len(pages))]
            for length, pages in zip(self.key_lengths, self.pages, strict=True)
        ]
        table = torch.tensor(rows, dtype=torch.int32).to(self.token_ids.device)
        return PageTable(key_lengths=table[:, 0].contiguous(), pages=table[:, 1:].contiguous())

    def last_tokens(self) -> list[int]:
        """Return the index of each sequence's last token."""
        return [end - 1 for end in accumulate(self.query_lengths)]


class Backend(Protocol):
    """One implementation of attention."""

    name: str
    summary: str

    def why_not(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why this backend cannot serve such layers, or None when it can."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        batch: ForwardBatch,
        state: LayerState | None,
    ) -> Tensor:
        """Score `q` against the keys that each token may see and return the weighted values.

        q: (tokens, heads, head_dim)   k, v: (tokens, kv_heads, head_dim), the new tokens'
        returns: (tokens, heads, head_dim). With a `state`, `k` and `v` are appended to it.
        """


@cache
def backends() -> dict[str, Backend]:
    """Return every backend by the name the user picks it by."""
    found: dict[str, Backend] = {}
    for plugin in discover("hanok.attention", "BACKENDS").values():
        found |= {backend.name: backend for backend in plugin}
    return found


def why_not_table(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype
) -> dict[str, str | None]:
    """Return, for every backend, why it does not fit (None: it does)."""
    return {name: item.why_not(spec, device, dtype) for name, item in backends().items()}


def choose(name: str, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend called `name`, or the first that fits for "auto".

    Raises OptionError for an unknown name, UnsupportedError (with every reason) when none fits.
    """
    if name != "auto" and name not in backends():
        known = ", ".join(["auto", *nearest_first(name, list(backends()))])
        raise OptionError(f"attention {name!r} is unknown. Choose one of: {known}.")
    reasons = why_not_table(spec, device, dtype)
    for candidate in AUTO_ORDER if name == "auto" else (name,):
        if reasons[candidate] is None:
            return backends()[candidate]
    rows = "\n".join(
        f"  {item:<16} {reason or 'fits; it was excluded by attention=' + name}"
        for item, reason in reasons.items()
    )
    raise UnsupportedError(
        f"no attention backend fits {spec.num_heads} heads / {spec.num_kv_heads} KV x "
        f"{spec.head_dim}, {str(dtype).removeprefix('torch.')}, {device.type}.\n{rows}\n"
        "Use attention 'auto'."
    )


def next_backend(after: str, spec: AttentionSpec, q: Tensor) -> Backend:
    """Return the first of the others that fits, for calls that the backend `after` cannot serve."""
    others = (backends()[name] for name in AUTO_ORDER if name != after)
    return next(item for item in others if item.why_not(spec, q.device, q.dtype) is None)


def dense_heads(heads: Tensor) -> Tensor:
    """Return (tokens, heads, head_dim) with nothing between heads, tokens apart as they may be."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


def split_sequences(
    q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch, state: LayerState | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each sequence's queries, and all its keys and values, the new ones appended.

    Yields (time, heads, head_dim) and twice (kv_heads, keys, head_dim): views, or copies where the
    keys lie in several pages.
    """
    start = 0
    for length, pages, key_length in zip(
        batch.query_lengths, batch.pages, batch.key_lengths, strict=True
    ):
        end = start + length
        new_k, new_v = k[start:end].transpose(0, 1), v[start:end].transpose(0, 1)
        if state is not None:
            new_k, new_v = state.extend(pages, key_length - length, new_k, new_v)
        yield q[start:end], new_k, new_v
        start = end


def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each of the last `num_queries` positions sees, (queries, keys) bool."""
    keys = torch.arange(num_keys, device=device)
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def multipliable(rows: int, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Return q, keys and values in a dtype whose products of `rows` rows this device is fast at."""
    if rows <= FEW_ROWS or multiplies(q.dtype, q.device):
        return q, keys, values
    return q.float(), keys.float(), values.float()


def reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    spec: AttentionSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attend for one sequence, plainly and in `dtype`: the oracle of every backend.

    q: (time, heads, head_dim)   keys, values: (kv_heads, keys, head_dim), the queries are the last
    positions. returns: (time, heads, head_dim) of `dtype`. Memory: heads x time x keys.
    """
    group = spec.num_heads // spec.num_kv_heads
    keys = keys.to(dtype).repeat_interleave(group, 0)
    values = values.to(dtype).repeat_interleave(group, 0)
    scores = q.to(dtype).transpose(0, 1) @ keys.transpose(1, 2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    seen = visible(q.shape[0], keys.shape[1], spec.window, q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1)
