"""A decoder, a cache and what is recorded of its passes: how everybody runs a decoder.

Prompts are computed in chunks (`prefill`), then a few tokens of each sequence at a time (`step`), from
recordings where something can record them. Every other pass goes through the decoder's `forward`, so
that hooks of its modules run.

Keys and values are right only for the weights that computed them. Passes notice parameters that were
changed in place or replaced, and `Decoder.weights_changed` where they cannot; what the cache holds is
then missing, and computed again.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.engine import cuda_graph, native_steps
from hanok.engine.cuda_graph import DecodeGraphs
from hanok.engine.native_steps import NativeSteps
from hanok.memory.heap import trim_heap
from hanok.memory.needs import PREFILL_TOKENS
from hanok.models.decoder import Decoder
from hanok.models.linear import Weighted

LONG_PASS_TOKENS = 256  # whose activations are worth returning to the system


class Passes:
    """One decoder over one cache, or without any: then sequences are computed whole.

    A cache has a row for each sequence, called by its slot; or blocks, of which a sequence has up to
    `blocks_per_sequence`.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache | None, blocks_per_sequence: int = 1
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.weights = WeightVersion(decoder)
        self._blocks_per_sequence = blocks_per_sequence
        self._computed_with: dict[int, int] = {}
        """By slot: the version of the weights that its keys and values were computed with."""
        self._recorded_at = (-1, -1)
        self._recorder: DecodeGraphs | NativeSteps | None = None

    def weights_changed(self) -> None:
        """Say that weights are others than before, however they were changed; drops recordings."""
        self.decoder.weights_changed()

    @property
    def recorded(self) -> DecodeGraphs | NativeSteps | None:
        """What replays passes over the weights there are; None where nothing can."""
        if self._recorded_at != self.decoder.num_changes:
            self._recorded_at = self.decoder.num_changes
            self._recorder = self._record()
        return self._recorder

    def missing(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, Sequence[int]]:
        """Return which of each sequence's tokens the cache does not hold, by slot.

        What it holds from other weights, or with other angles than the sequence's length asks for, is
        dropped.
        """
        if self.cache is None:
            return dict(sequences)
        version, found = self.weights.number(), {}
        for slot, tokens in sequences.items():
            is_stale = self._computed_with.get(slot) != version
            of_length = self.cache.computed_for[slot]
            if is_stale or not self.decoder.config.shares_angles(of_length, len(tokens)):
                self.cache.truncate(slot, 0)
                self._computed_with[slot] = version
            found[slot] = tokens[self.cache.lengths[slot] :]
        return found

    def chunks(
        self,
        tokens: Mapping[int, Sequence[int]],
        *,
        size: int | None = None,
        are_apart: bool = False,
    ) -> Iterator[tuple[ForwardBatch, dict[int, int]]]:
        """Yield batches of at most `size` (PREFILL_TOKENS) tokens that continue some slots' sequences.

        Each comes with the rows of the last tokens of the sequences that end in it, by slot. With
        `are_apart` every batch belongs to one sequence. The caller computes a batch before it asks for
        the next.
        """
        past = {slot: self.cache.lengths[slot] if self.cache else 0 for slot in tokens}
        lengths = {slot: past[slot] + len(new) for slot, new in tokens.items()}
        waiting = {slot: list(new) for slot, new in tokens.items() if new}
        while waiting:
            parts: dict[int, list[int]] = {}
            for slot, new in waiting.items():
                room = (size or PREFILL_TOKENS) - sum(map(len, parts.values()))
                if room <= 0 or (are_apart and parts):
                    break
                parts[slot] = new if self.cache is None else new[:room]
            batch = ForwardBatch.of(
                list(parts.values()),
                past=[past[slot] for slot in parts],
                slots=list(parts),
                sequence_lengths=[lengths[slot] for slot in parts],
                device=self.decoder.device,
            )
            for slot, new in parts.items():
                past[slot] += len(new)
                waiting[slot] = waiting[slot][len(new) :]
            ends = dict(zip(parts, batch.last_tokens(), strict=True))
            yield batch, {slot: row for slot, row in ends.items() if not waiting[slot]}
            waiting = {slot: new for slot, new in waiting.items() if new}

    def count(self, batch: ForwardBatch) -> None:
        """Count a batch's tokens in the cache, where the decoder's stages are run one by one."""
        if self.cache is not None:
            host = batch.host
            self.cache.advance(host.slots, host.query_lengths, host.sequence_lengths)

    def prefill(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Compute tokens that follow what the cache holds, in chunks; no sequence is empty.

        Returns the normed hidden states of each sequence's last token, (sequences, hidden).
        """
        found: dict[int, Tensor] = {}
        for batch, ends in self.chunks(tokens):
            hidden = self.decoder(batch, self.cache)
            found |= dict(zip(ends, hidden[list(ends.values())], strict=True))
            is_long = len(batch.token_ids) >= LONG_PASS_TOKENS
            del batch, hidden
            if is_long:
                trim_heap()
        return torch.stack([found[slot] for slot in tokens])

    def step(self, tokens: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Return the logits that follow each of some sequences' next tokens, (tokens, vocab) float32.

        They are valid until the next call. Counts the tokens in the cache; raises as it does.
        """
        if self.cache is None:
            raise ValueError("a step needs a cache to continue from")
        recorded = self.recorded
        if isinstance(recorded, NativeSteps):
            return recorded.logits(tokens, slots)
        if isinstance(recorded, DecodeGraphs) and all(len(item) == 1 for item in tokens):
            return recorded.logits([item[0] for item in tokens], slots)
        batch = ForwardBatch.of(
            [list(item) for item in tokens],
            past=[self.cache.lengths[slot] for slot in slots],
            slots=list(slots),
            device=self.decoder.device,
        )
        return self.decoder.logits(self.decoder(batch, self.cache))

    def run(self, batch: ForwardBatch, *, may_record: bool) -> Tensor:
        """Return the normed hidden states of a batch, (tokens, hidden); valid until the next call."""
        recorded = self.recorded
        if may_record and isinstance(recorded, NativeSteps):
            return recorded.hidden_states(batch)
        hidden: Tensor = self.decoder(batch, self.cache)
        return hidden

    @property
    def replays_logits(self) -> bool:
        """Whether `replay` is there for passes over one token of each sequence."""
        return isinstance(self.recorded, DecodeGraphs)

    def replay(self, batch: ForwardBatch) -> Tensor:
        """Return the logits that follow one token of each sequence, (sequences, vocab) float32.

        The batch is on the CPU, and says itself where keys and values are.
        """
        recorded = self.recorded
        if not isinstance(recorded, DecodeGraphs):
            raise ValueError("no graph replays passes; ask replays_logits first")
        return recorded.logits_of(batch).clone()  # the next replay overwrites them

    def _record(self) -> DecodeGraphs | NativeSteps | None:
        decoder, cache = self.decoder, self.cache
        if cache is None or not decoder.execution.records_passes or has_hooks(decoder):
            return None
        if cuda_graph.why_not(decoder, cache) is None:
            return DecodeGraphs(decoder, cache, self._blocks_per_sequence)
        if native_steps.why_not(decoder, cache) is not None:
            return None
        return NativeSteps(decoder, cache, self._blocks_per_sequence)


class WeightVersion:
    """A number that grows whenever the parameters of a decoder turn out to be others than before.

    Parameters of adapters that come or go do not count as such: no other request sees them.

    It notices what torch counts (any change in place that does not go through `.data`) and parameters
    that were replaced, in modules that were there at first or since `Decoder.weights_changed`. What
    quantized weights hold counts as parameters do.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tables: list[Mapping[str, Tensor | None]] = []
        self._listed = (-1, -1)
        self._seen: tuple[int, ...] = ()
        self._number = 0

    def number(self) -> int:
        """Return it; a few microseconds for a small model."""
        if self._listed != self._decoder.num_changes:
            if self._listed[0] == self._decoder.num_weight_changes:  # only adapters came or went
                self._compare()
                self._list()
                self._seen = self._found()
            else:
                self._list()
                self._seen = ()
            self._listed = self._decoder.num_changes
        self._compare()
        return self._number

    def _list(self) -> None:
        modules = list(self._decoder.modules())
        holders = [item for item in modules if isinstance(item, Weighted)]
        held = [part for item in holders for child in item.children() for part in child.modules()]
        tables: list[Mapping[str, Tensor | None]] = [item._parameters for item in modules]
        tables += [item._buffers for item in held]
        self._tables = [table for table in tables if table]

    def _found(self) -> tuple[int, ...]:
        weights = [item for table in self._tables for item in table.values() if item is not None]
        return (
            *[id(item) for item in weights],
            *[item._version for item in weights if not item.is_inference()],
        )

    def _compare(self) -> None:
        seen = self._found()
        if seen != self._seen:
            self._seen = seen
            self._number += 1


def has_hooks(decoder: Decoder) -> bool:
    """Return whether modules have hooks, which a recording would not call (FSDP, streamed weights)."""
    return any(item._forward_pre_hooks or item._forward_hooks for item in decoder.modules())
