"""Decoding on a GPU without the CPU in between: a pass is recorded once and replayed for each token.

A pass of a few hundred kernels takes the CPU longer to start than a GPU to run. A CUDA graph starts
them all at once, but always with the same addresses: `DecodeStep` therefore computes one token for each
of `size` sequences from buffers that keep their addresses, and everything that changes (tokens,
positions, lengths, blocks of the cache, cosines and sines) is a number in them. Steps are made for sizes
that are powers of two; fewer sequences are filled up by repeating the last one, which writes what is
there already. One step serves sequences of any lengths, in one block of the cache each or in several.

Nothing is recorded before it is used: a step runs plainly the first time, which also compiles its
kernels, and is recorded when it is asked for again. Passes with adapters are never recorded: which
products they change depends on the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hanok.attention.base import DeviceLengths, ForwardBatch, HostLengths
from hanok.attention.cache import KVCache
from hanok.models.config import Rope
from hanok.models.decoder import Decoder
from hanok.models.layers import ExpertsLayer
from hanok.models.linear import Linear


def why_not(decoder: Decoder, cache: KVCache) -> str | None:
    """Return why decoding cannot be recorded, or None when it can."""
    if decoder.device.type != "cuda":
        return f"needs a CUDA device (found: {decoder.device.type})"
    return why_not_static(decoder, cache)


def why_not_static(decoder: Decoder, cache: KVCache) -> str | None:
    """Return why a pass cannot run from buffers in place, on any device."""
    if decoder.execution.is_streamed:
        return "weights are read from disk in every pass"
    if decoder.execution.layout is not None:
        return "several devices compute it"
    for _, mixer in decoder.mixers():
        if (reason := mixer.why_not_recorded("cuda")) is not None:
            return reason
    if cache.dtype is not decoder.dtype:
        return "the cache has another dtype than the activations"
    for module in decoder.modules():
        if isinstance(module, ExpertsLayer):
            return "the tokens of each expert are counted on the CPU"
        if isinstance(module, Linear) and (reason := module.why_not_static()):
            return reason
    return None


class DecodeStep:
    """One token for each of `size` sequences, from buffers in place.

    Each sequence has up to `blocks_per_sequence` blocks of the cache.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, size: int, blocks_per_sequence: int = 1
    ) -> None:
        self.size = size
        self._decoder = decoder
        self._cache = cache
        device = decoder.device
        # Tokens, positions and key lengths travel together; the block table seldom changes.
        self._numbers = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._blocks: tuple[tuple[int, ...], ...] = ()
        tokens, positions, key_lengths = self._numbers
        lengths = DeviceLengths(
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            key_lengths=key_lengths,
            sequence_lengths=key_lengths,
            block_table=torch.zeros(size, blocks_per_sequence, dtype=torch.int32, device=device),
        )
        self._batch = ForwardBatch(tokens, positions, None, lengths)
        # Cosines and sines of all positions, or where they depend on lengths those of these tokens.
        most = cache.capacity * blocks_per_sequence
        self._tables = {
            rope: rotary.table(0, most, device, decoder.dtype)
            for rope, rotary in decoder.rotaries.items()
            if rope.angles_for(1) == 0
        }
        self._cos_sin: dict[Rope, Tensor] = {}

    def write(self, batch: ForwardBatch) -> None:
        """Put one token of each of up to `size` sequences, a batch on the CPU, into the buffers."""
        host = _filled(batch.host, self.size)
        tokens = batch.token_ids.tolist()
        tokens += tokens[-1:] * (self.size - len(tokens))
        positions = [length - 1 for length in host.key_lengths]
        rows = (tokens, positions, host.key_lengths)
        self._numbers.copy_(torch.tensor(rows, dtype=torch.int64))
        if host.blocks != self._blocks:
            self._blocks = host.blocks
            table = DeviceLengths.of(host, batch.token_ids.device).block_table
            self._batch.block_table[:, : table.shape[1]] = table.to(self._decoder.device)
        numbered = ForwardBatch(self._batch.token_ids, self._batch.positions, host)
        for rope, rotary in self._decoder.rotaries.items():
            if rope not in self._tables:
                found = rotary.cos_sin(numbered, self._decoder.dtype)
                self._cos_sin.setdefault(rope, found).copy_(found)

    def run(self) -> Tensor:
        """Return the logits that follow what the buffers hold, (size, vocab) float32."""
        x = self._decoder.embed(self._batch)
        positions = self._batch.positions
        cos_sin = {rope: table[:, positions] for rope, table in self._tables.items()}
        hidden = self._decoder.blocks(x, self._batch, cos_sin | self._cos_sin, self._cache)
        return self._decoder.logits(hidden)


def _filled(host: HostLengths, size: int) -> HostLengths:
    """Return the lengths of `size` sequences, the last of those that are there repeated."""
    missing = size - len(host.blocks)
    return HostLengths(*((*item, *[item[-1]] * missing) for item in host))


class RecordedStep(DecodeStep):
    """A step that is replayed from its second run on; its logits are valid until the next one."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, size: int, blocks_per_sequence: int, memory: Any
    ) -> None:
        super().__init__(decoder, cache, size, blocks_per_sequence)
        self._memory = memory  # a handle of torch
        self._is_warm = False
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def run(self) -> Tensor:
        """See `DecodeStep.run`."""
        if not self._is_warm:
            self._is_warm = True
            return super().run()
        if self._recorded is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory):
                logits = super().run()
            self._recorded = graph, logits
        graph, logits = self._recorded
        graph.replay()
        return logits


class DecodeGraphs:
    """The steps of one cache by their size; on a device without graphs they run plainly."""

    def __init__(self, decoder: Decoder, cache: KVCache, blocks_per_sequence: int = 1) -> None:
        self._decoder = decoder
        self._cache = cache
        self._blocks_per_sequence = blocks_per_sequence
        self._steps: dict[int, DecodeStep] = {}
        has_graphs = decoder.device.type == "cuda"
        # One region of memory for all: no two graphs run at a time.
        self._memory = torch.cuda.graph_pool_handle() if has_graphs else None

    def logits(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Return the logits that follow one more token of each sequence, (sequences, vocab) float32.

        They are valid until the next call. Counts the tokens in the cache; raises as it does.
        """
        past = [self._cache.lengths[slot] for slot in slots]
        batch = ForwardBatch.of([[token] for token in tokens], past=past, slots=list(slots))
        self._cache.advance(slots, [1] * len(slots), batch.host.sequence_lengths)
        return self.logits_of(batch)

    def logits_of(self, batch: ForwardBatch) -> Tensor:
        """Return the logits that follow a batch of one token of each sequence, (sequences, vocab).

        The batch is on the CPU, and the cache counts its tokens already. The logits are float32 and
        valid until the next call.
        """
        if batch.adapters is not None:
            there = batch.to(self._decoder.device)
            return self._decoder.logits(self._decoder.hidden_states(there, self._cache))
        num_sequences = len(batch.token_ids)
        step = self._step(1 << (num_sequences - 1).bit_length())
        step.write(batch)
        return step.run()[:num_sequences]

    def _step(self, size: int) -> DecodeStep:
        if size not in self._steps:
            how = (self._decoder, self._cache, size, self._blocks_per_sequence)
            self._steps[size] = (
                DecodeStep(*how) if self._memory is None else RecordedStep(*how, self._memory)
            )
        return self._steps[size]
