"""The attention seam: what a layer asks for, what a batch looks like, and who can answer.

Every score in hanok goes through one `Backend.attend`. Activations are packed: the tokens of all
sequences follow one another, `query_starts` says where each begins, and nothing is padded. Keys and
values come from a layer's `LayerState` when there is a cache, else from the batch.

A backend is one file of this package that defines `BACKENDS`. `choose` takes the first that fits and
can say why each of the others does not. `reference` is the oracle for all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from hanok.attention.cache import LayerState
from hanok.errors import OptionError, UnsupportedError
from hanok.kernels.processor import FEW_ROWS, multiplies
from hanok.registry import discover, nearest_first

# What "auto" tries, in this order; a backend that is not named here is used only when asked for.
AUTO_ORDER = ("triton", "varlen", "native", "sdpa", "eager")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What one layer asks of a backend."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # tokens a query sees, itself included; None: all before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)


class HostLengths(NamedTuple):
    """A batch's lengths and blocks as Python numbers, for CPU kernels, schedulers and caches.

    One entry for each sequence. `query_lengths` are its tokens in this batch, `key_lengths` the keys
    that its last token sees (cached and new), `sequence_lengths` its tokens in all, those of later
    batches included: angles may depend on them. `blocks` says which blocks of the cache hold it, in
    order: one that is as long as the sequence may get, or as many as its keys need.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    sequence_lengths: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """The block of each sequence where one block holds a whole sequence."""
        return tuple(blocks[0] for blocks in self.blocks)


class DeviceLengths(NamedTuple):
    """A batch's lengths and blocks as tensors on its device: the properties of `ForwardBatch`."""

    query_starts: Tensor
    key_lengths: Tensor
    sequence_lengths: Tensor
    block_table: Tensor

    @classmethod
    def of(cls, host: HostLengths, device: torch.device) -> "DeviceLengths":
        """Make the tensors; sequences with fewer blocks than others repeat their last one."""
        most = max(map(len, host.blocks))
        rows = [[*blocks, *[blocks[-1]] * (most - len(blocks))] for blocks in host.blocks]
        starts = [0, *accumulate(host.query_lengths)]
        made = (starts, host.key_lengths, host.sequence_lengths, rows)
        return cls(*(torch.tensor(item, dtype=torch.int32, device=device) for item in made))


class KeyPlaces(NamedTuple):
    """Where a batch's keys are in the blocks of a cache: in which block, at which position of it.

    new_blocks, new_positions: (tokens,), of the batch's own keys.   blocks, positions: (keys,), of all
    keys that its sequences see, packed as tokens are.   starts: (sequences + 1,) int32, where the keys
    of each sequence begin.
    """

    new_blocks: Tensor
    new_positions: Tensor
    blocks: Tensor
    positions: Tensor
    starts: Tensor


class ForwardBatch:
    """The packed tokens of one forward pass: tensors, and the `host`'s view of the same lengths.

    token_ids, positions: (tokens,) int64.   query_starts: (sequences + 1,), where each sequence's tokens
    begin, and their number.   key_lengths, sequence_lengths: (sequences,), see `HostLengths`.
    block_table: (sequences, blocks), key number n of a sequence is at n % block size of block n // block
    size; read with a cache only.   These four are int32.   adapters: (tokens,) int64, the number of each
    token's adapter, -1 for none; None where no token has one.

    What is compiled or recorded reads tensors alone, so it serves any mix of lengths; kernels on a CPU,
    schedulers and caches read `host`. Decoding on a CPU needs no more tensors than `token_ids` and
    `positions`, and each costs it microseconds: without gradients the others are made when first read.
    """

    __slots__ = ("_host", "_lengths", "_places", "adapters", "positions", "token_ids")

    def __init__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        host: HostLengths | None,
        lengths: DeviceLengths | None = None,
        adapters: Tensor | None = None,
    ) -> None:
        self.token_ids = token_ids
        self.positions = positions
        self.adapters = adapters
        self._host = host
        self._lengths = lengths
        self._places: KeyPlaces | None = None

    @classmethod
    def of(
        cls,
        sequences: list[list[int]],
        *,
        past: list[int] | None = None,
        slots: list[int] | None = None,
        blocks: list[tuple[int, ...]] | None = None,
        sequence_lengths: list[int] | None = None,
        adapters: list[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> "ForwardBatch":
        """Pack token lists; `past` tokens of each are in the cache already.

        They are in `blocks`, or where a block holds a whole sequence in block `slots` (0, 1, …).
        `sequence_lengths` default to what is there after this batch. `adapters`: one for each sequence.
        """
        past = past or [0] * len(sequences)
        key_lengths = tuple(p + len(t) for p, t in zip(past, sequences, strict=True))
        positions = [
            position
            for start, end in zip(past, key_lengths, strict=True)
            for position in range(start, end)
        ]
        flat = [token for tokens in sequences for token in tokens]
        host = HostLengths(
            tuple(map(len, sequences)),
            key_lengths,
            tuple(sequence_lengths or key_lengths),
            tuple(blocks or ((slot,) for slot in slots or range(len(sequences)))),
        )
        numbers = None
        if adapters is not None and max(adapters) >= 0:
            pairs = zip(adapters, sequences, strict=True)
            own = [adapter for adapter, tokens in pairs for _ in tokens]
            numbers = torch.tensor(own, dtype=torch.int64, device=device)
        batch = cls(
            torch.tensor(flat, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            host,
            adapters=numbers,
        )
        return batch.complete() if torch.is_grad_enabled() or batch.token_ids.is_cuda else batch

    @property
    def host(self) -> HostLengths:
        """The host's view; what a recorded pass computes has none."""
        if self._host is None:
            raise RuntimeError("a recorded pass has no host's view of its batch")
        return self._host

    @property
    def query_starts(self) -> Tensor:
        """(sequences + 1,) int32: where each sequence's tokens begin, and how many tokens there are."""
        return self._made().query_starts

    @property
    def key_lengths(self) -> Tensor:
        """(sequences,) int32: keys that each sequence's last token sees, itself included."""
        return self._made().key_lengths

    @property
    def sequence_lengths(self) -> Tensor:
        """(sequences,) int32: tokens of each sequence in all, those of later batches included."""
        return self._made().sequence_lengths

    @property
    def block_table(self) -> Tensor:
        """(sequences, blocks) int32: the blocks of the cache that hold each sequence, in order."""
        return self._made().block_table

    def sequence_of_tokens(self) -> Tensor:
        """Return the number of each token's sequence, (tokens,) int64."""
        token = torch.arange(self.token_ids.shape[0], device=self.token_ids.device)
        return torch.bucketize(token, self.query_starts[1:], right=True)

    def key_places(self, block_size: int) -> KeyPlaces:
        """Return where keys are in blocks of so many, on the batch's device; the same for all layers."""
        if self._places is None:
            table, lengths = self.block_table, self.key_lengths
            starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            number, total = (
                torch.arange(len(lengths), device=table.device),
                sum(self.host.key_lengths),
            )
            sequence = torch.repeat_interleave(number, lengths, output_size=total)
            position = torch.arange(total, device=table.device) - starts[sequence]
            own, new = self.sequence_of_tokens(), self.positions
            self._places = KeyPlaces(
                new_blocks=table[own, new // block_size],
                new_positions=new % block_size,
                blocks=table[sequence, position // block_size],
                positions=position % block_size,
                starts=starts,
            )
        return self._places

    def _made(self) -> DeviceLengths:
        if self._lengths is None:
            if torch.compiler.is_compiling():
                raise RuntimeError("hand a compiled function a batch that is `complete()`")
            self._lengths = DeviceLengths.of(self.host, self.token_ids.device)
        return self._lengths

    def complete(self) -> "ForwardBatch":
        """Make all tensors now, as compiled functions want them; return the batch itself."""
        self._made()
        return self

    def to(self, device: torch.device) -> "ForwardBatch":
        """Return the batch on another device."""
        if self.token_ids.device == device:
            return self
        adapters = None if self.adapters is None else self.adapters.to(device)
        lengths = None
        if self._lengths is not None and device.type != "cpu":
            lengths = DeviceLengths(*(item.to(device) for item in self._lengths))
        moved = self.token_ids.to(device), self.positions.to(device)
        return ForwardBatch(*moved, self._host, lengths, adapters)

    def with_adapters(self, adapters: Tensor) -> "ForwardBatch":
        """Return the same tokens with other adapters."""
        return ForwardBatch(self.token_ids, self.positions, self._host, self._lengths, adapters)

    def last_tokens(self) -> list[int]:
        """Return the index of each sequence's last token."""
        return [end - 1 for end in accumulate(self.host.query_lengths)]


class Backend(Protocol):
    """One implementation of attention."""

    name: str
    summary: str
    recorded_on: Literal["cpu", "cuda"] | None
    """Where passes of a few tokens may be recorded: its calls find keys through numbers in buffers."""

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


class PartialBackend:
    """A backend that serves only some calls, and leaves the rest to those after it in AUTO_ORDER."""

    others: tuple[Backend, ...] = ()

    def other(self, spec: AttentionSpec, q: Tensor) -> Backend:
        """Return the first of the others that fits."""
        for backend in self.others:
            if backend.why_not(spec, q.device, q.dtype) is None:
                return backend
        raise UnsupportedError(f"no other attention backend serves {spec} on {q.device}")


@cache
def backends() -> dict[str, Backend]:
    """Return every backend by the name the user picks it by."""
    found: dict[str, Backend] = {}
    for plugin in discover("hanok.attention", "BACKENDS").values():
        found |= {backend.name: backend for backend in plugin}
    for number, name in enumerate(AUTO_ORDER, start=1):
        backend = found[name]
        if isinstance(backend, PartialBackend):
            backend.others = tuple(found[other] for other in AUTO_ORDER[number:])
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


def dense_heads(heads: Tensor) -> Tensor:
    """Return (tokens, heads, head_dim) with nothing between heads, tokens apart as they may be."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


def split_sequences(
    q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch, state: LayerState | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each sequence's queries, and all its keys and values, the new ones appended.

    Yields (time, heads, head_dim) and twice (kv_heads, keys, head_dim): views, or copies where the
    keys lie in several blocks.
    """
    host, start = batch.host, 0
    for length, blocks, key_length in zip(
        host.query_lengths, host.blocks, host.key_lengths, strict=True
    ):
        end = start + length
        new_k, new_v = k[start:end].transpose(0, 1), v[start:end].transpose(0, 1)
        if state is not None:
            new_k, new_v = state.extend(blocks, key_length - length, new_k, new_v)
        yield q[start:end], new_k, new_v
        start = end


def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each of the last `num_queries` positions sees, (queries, keys) bool."""
    keys = torch.arange(num_keys, device=device)
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def is_traced(k: Tensor, state: LayerState | None) -> bool:
    """Return whether torch compiles this, for keys that are cached as they are, if at all."""
    return torch.compiler.is_compiling() and (state is None or state.keys.dtype is k.dtype)


def packed_keys(
    k: Tensor, v: Tensor, spec: AttentionSpec, batch: ForwardBatch, state: LayerState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys and values of all sequences of a batch, and which of them each token sees.

    From tensors alone, for programs that serve any lengths. Takes what `Backend.attend` does, a `state`
    in the dtype of `k`. returns: twice (kv_heads, keys, head_dim), and (tokens, keys) bool.
    """
    own, position = batch.sequence_of_tokens(), batch.positions
    if state is None:
        sequence, key = own, position
    else:
        table, size = batch.block_table, state.keys.shape[2]
        most = table.shape[1] * size
        for kept, new in ((state.keys, k), (state.values, v)):
            kept[table[own, position // size], :, position % size] = new
        # All of every block: (sequences x blocks x block size, kv_heads, head_dim).
        k, v = (kept[table].transpose(2, 3).flatten(0, 2) for kept in (state.keys, state.values))
        number = torch.arange(k.shape[0], device=k.device)
        sequence, key = number // most, number % most
    seen = (own[:, None] == sequence) & (key <= position[:, None])
    if spec.window is not None:
        seen = seen & (key > position[:, None] - spec.window)
    if state is not None:  # memory that was never written may hold NaN
        k, v = (torch.where(seen.any(0)[:, None, None], item, 0.0) for item in (k, v))
    return k.transpose(0, 1), v.transpose(0, 1), seen


def multipliable(rows: int, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Return q, keys and values in a dtype whose products of `rows` rows this device is fast at."""
    if multiplies(q.dtype, q.device, rows) or rows <= FEW_ROWS:
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
