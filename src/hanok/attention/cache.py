"""What layers keep of the tokens already computed, one state for each layer.

Keys and values are claimed once, for `capacity` tokens of each sequence: (sequences, kv_heads, capacity,
head_dim), so that one head's keys lie together and a single query reads them as a plain matrix.
`lengths` counts the tokens that are valid; for keys and values `truncate` only lowers it, a state of
fixed size can only begin again. An engine takes blocks of a few tokens, several for each sequence, and
counts for itself (engine/blocks.py); only states that lie in blocks serve it.

Where angles depend on the length of the sequence (dynamic and longrope scaling), what is cached was
computed for one length, `computed_for`, and is invalid for a length with other angles: the caller of the
decoder then truncates to nothing and computes again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hanok.attention.state import FixedState, KeysAndValues, StateSpec
from hanok.errors import RequestError, UnsupportedError


class LayerState:
    """Keys and values of one layer, for all sequences.

    In int8, `key_scale` and `value_scale` (sequences, kv_heads, capacity) float32 hold the largest
    magnitude over 127 of each token and head.
    """

    __slots__ = ("key_scale", "keys", "value_scale", "values")

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> None:
        self.keys = keys
        self.values = values
        self.key_scale = key_scale
        self.value_scale = value_scale

    @classmethod
    def claim(
        cls,
        spec: KeysAndValues,
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "LayerState":
        """Return an empty state; in int8 with scales."""
        shape = (num_sequences, spec.num_kv_heads, capacity, spec.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        scales: list[Tensor] = []
        if dtype is torch.int8:
            scales = [torch.empty(shape[:-1], device=device) for _ in range(2)]
        return cls(keys, values, *scales)

    @property
    def nbytes(self) -> int:
        """Bytes claimed."""
        scales = (self.key_scale, self.value_scale)
        return sum(part.nbytes for part in (self.keys, self.values, *scales) if part is not None)

    def extend(
        self, blocks: Sequence[int], start: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values at position `start` of a sequence; return all up to them.

        `blocks` hold the sequence, in order. k, v: (kv_heads, time, head_dim)
        returns: two (kv_heads, start + time, head_dim), views where one block holds all as floats
        """
        return (
            _extended(self.keys, self.key_scale, blocks, start, k),
            _extended(self.values, self.value_scale, blocks, start, v),
        )


def _extended(
    kept: Tensor, scale: Tensor | None, blocks: Sequence[int], start: int, new: Tensor
) -> Tensor:
    end = start + new.shape[1]
    if scale is None:
        _write(kept, blocks, start, new)
        return _read(kept, blocks, end)
    largest = new.float().abs().amax(-1)
    factor = (torch.full_like(largest, 127) / largest).nan_to_num(posinf=0.0)
    _write(kept, blocks, start, (new.float() * factor[..., None]).round().char())
    _write(scale, blocks, start, largest / 127)
    return (_read(kept, blocks, end) * _read(scale, blocks, end)[..., None]).to(new.dtype)


def _write(kept: Tensor, blocks: Sequence[int], start: int, new: Tensor) -> None:
    """Write (kv_heads, time, …) at position `start` of blocks (kv_heads, block size, …)."""
    size, end = kept.shape[2], start + new.shape[1]
    for index in range(start // size, -(-end // size)):
        first, last = max(start, index * size), min(end, (index + 1) * size)
        place = slice(first - index * size, last - index * size)
        kept[blocks[index], :, place] = new[:, first - start : last - start]


def _read(kept: Tensor, blocks: Sequence[int], end: int) -> Tensor:
    """Return the first `end` positions of some blocks, (kv_heads, end, …)."""
    if end <= kept.shape[2]:
        return kept[blocks[0], :, :end]
    used = blocks[: -(-end // kept.shape[2])]
    return torch.cat([kept[block] for block in used], dim=1)[:, :end]


class SequenceState:
    """Numbers of one layer that do not grow with a sequence: `values` (sequences, …) float32.

    A sequence begins with zeros. Its tokens change them in place, so they hold all of its tokens, or
    after `clear` none.
    """

    __slots__ = ("values",)

    def __init__(self, spec: FixedState, num_sequences: int, device: torch.device) -> None:
        self.values = torch.zeros(num_sequences, *spec.shape, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes claimed."""
        return self.values.nbytes

    def clear(self, slot: int) -> None:
        """Let a sequence begin again."""
        self.values[slot].zero_()


class KVCache:
    """The states of all layers, and how many tokens of each sequence they hold."""

    def __init__(
        self,
        specs: Sequence[StateSpec | None],
        *,
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
        is_paged: bool = False,
    ) -> None:
        self.capacity = capacity
        self.dtype = dtype
        """What keys and values are kept in."""
        self.is_paged = is_paged
        """Whether rows are blocks of sequences; who assigns the blocks counts the tokens."""
        if is_paged and (reason := why_not_paged(specs)):
            raise UnsupportedError(reason)
        self.lengths = [0] * num_sequences
        self.computed_for = [0] * num_sequences
        self.states: list[LayerState | SequenceState | None] = []
        """By layer; None where it keeps nothing."""
        for spec, device in zip(specs, devices, strict=True):
            match spec:
                case KeysAndValues():
                    state = LayerState.claim(spec, num_sequences, capacity, dtype, device)
                    self.states.append(state)
                case FixedState():
                    self.states.append(SequenceState(spec, num_sequences, device))
                case _:
                    self.states.append(None)
        self._fixed = [state for state in self.states if isinstance(state, SequenceState)]

    @property
    def size_bytes(self) -> int:
        """Bytes claimed; on a CPU the operating system backs them only once they are written."""
        return sum(state.nbytes for state in self.states if state is not None)

    def advance(
        self, slots: Sequence[int], num_tokens: Sequence[int], sequence_lengths: Sequence[int]
    ) -> None:
        """Count tokens whose keys and values a forward pass is about to write, unless `is_paged`.

        `sequence_lengths` are the lengths that their angles are chosen for. Raises RequestError when
        a sequence would outgrow the capacity; nothing is changed then.
        """
        if self.is_paged:
            return
        for slot, count in zip(slots, num_tokens, strict=True):
            if self.lengths[slot] + count > self.capacity:
                raise RequestError(
                    f"sequence {slot} holds {self.lengths[slot]} tokens and {count} more would "
                    f"exceed the cache's {self.capacity}; ask for a larger cache or fewer tokens."
                )
        for slot, count, length in zip(slots, num_tokens, sequence_lengths, strict=True):
            self.lengths[slot] += count
            self.computed_for[slot] = length

    @property
    def can_truncate(self) -> bool:
        """Whether the first tokens of a sequence can be kept and the others forgotten."""
        return not self._fixed

    def truncate(self, slot: int, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of a sequence.

        Raises UnsupportedError where a state of fixed size would have to go back to some of them.
        """
        if num_tokens >= self.lengths[slot]:
            return
        if self._fixed and num_tokens:
            raise UnsupportedError(
                f"sequence {slot} holds {self.lengths[slot]} tokens and cannot go back to "
                f"{num_tokens}: later tokens have changed a state of fixed size."
            )
        for state in self._fixed:
            state.clear(slot)
        self.lengths[slot] = num_tokens

    def keep(self, slot: int, num_tokens: int) -> None:
        """Keep at most the first `num_tokens` tokens of a sequence: none where it cannot go back."""
        can_keep = self.can_truncate or num_tokens >= self.lengths[slot]
        self.truncate(slot, num_tokens if can_keep else 0)


def why_not_paged(specs: Sequence[StateSpec | None]) -> str | None:
    """Return why states cannot lie in blocks that sequences share, as an engine's; None: they can."""
    kept = [spec for spec in specs if spec is not None]
    found = [f"{spec.name}, which is not kept in blocks" for spec in kept if not spec.can_page]
    found += [f"{spec.name}, which sequences cannot share" for spec in kept if not spec.can_share]
    if not found:
        return None
    return (
        f"layers keep {found[0]}, so the engine cannot schedule it. Use generate, which computes "
        "prompts together from first to last."
    )
