"""Decoding on a GPU without the CPU in between: a pass is recorded once and replayed for each token.

A pass of a few hundred kernels takes the CPU longer to start than a GPU to run. A CUDA graph starts
them all at once, but always with the same addresses: `DecodeStep` therefore computes one token for each
of `size` sequences from buffers that stay where they are, and everything that changes (tokens,
positions, lengths, rows of the cache) is a number in them. Steps are made for sizes that are powers of
two; fewer sequences are filled up by repeating the last one, which writes what is there already.

Nothing is recorded before it is used: a step runs plainly the first time, which also compiles its
kernels, and is recorded when it is asked for again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch, PageTable
from hanok.attention.cache import KVCache
from hanok.models.decoder import Block, Decoder
from hanok.models.layers import ExpertsLayer
from hanok.models.linear import Linear

PAGE_TABLE_BACKEND = "triton"  # the one that finds keys through numbers on the device


def why_not(decoder: Decoder, cache: KVCache) -> str | None:
    """Return why decoding cannot be recorded, or None when it can."""
    if decoder.device.type != "cuda":
        return f"needs a CUDA device (found: {decoder.device.type})"
    return why_not_static(decoder, cache)


def why_not_static(decoder: Decoder, cache: KVCache) -> str | None:
    """Return why a pass cannot run from buffers in place, on any device."""
    if decoder.execution.is_streamed:
        return "weights are read from disk in every pass"
    for block in decoder.layers:
        if isinstance(block, Block) and block.self_attn.backend.name != PAGE_TABLE_BACKEND:
            return f"attention {block.self_attn.backend.name} takes lengths from the CPU"
    if any(state.keys.dtype is not decoder.dtype for state in cache.states):
        return "the cache has another dtype than the activations"
    if not decoder.config.shares_angles(1, cache.capacity):
        return "the angles of the rotary embedding depend on the length"
    for module in decoder.modules():
        if isinstance(module, ExpertsLayer):
            return "the tokens of each expert are counted on the CPU"
        if isinstance(module, Linear) and (reason := module.why_not_static()):
            return reason
    return None


class DecodeStep:
    """One token for each of `size` sequences, from buffers in place."""

    def __init__(self, decoder: Decoder, cache: KVCache, size: int) -> None:
        self.size = size
        self._decoder = decoder
        self._cache = cache
        self._numbers = torch.zeros(4, size, dtype=torch.int64, device=decoder.device)
        tokens, positions, key_lengths, slots = self._numbers
        # The tuples are only right about what does not change: one token each, and room for all.
        self._batch = ForwardBatch(
            token_ids=tokens,
            positions=positions,
            query_lengths=(1,) * size,
            key_lengths=(cache.capacity,) * size,
            pages=tuple((slot,) for slot in range(size)),
            sequence_lengths=(cache.capacity,) * size,
            page_table=PageTable(key_lengths=key_lengths, pages=slots[:, None]),
        )

    def write(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> None:
        """Put up to `size` sequences' tokens into the buffers."""
        missing = self.size - len(tokens)
        lengths = [position + 1 for position in positions]
        rows = [[*row, *[row[-1]] * missing] for row in (tokens, positions, lengths, slots)]
        self._numbers.copy_(torch.tensor(rows, dtype=torch.int64))

    def run(self) -> Tensor:
        """Return the logits that follow what the buffers hold, (size, vocab) float32."""
        hidden = self._decoder.hidden_states(self._batch, self._cache)
        return self._decoder.logits(hidden)


class RecordedStep(DecodeStep):
    """A step that is replayed from its second run on; its logits are valid until the next one."""

    def __init__(self, decoder: Decoder, cache: KVCache, size: int, memory: Any) -> None:
        super().__init__(decoder, cache, size)
        self._memory = memory  # a handle of torch
        self._is_warm = False
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self._angles: list[list[Tensor]] = []

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
            # Longer tables of angles may replace these, which the graph goes on reading.
            self._angles = [rotary.tables() for rotary in self._decoder.rotaries.values()]
        graph, logits = self._recorded
        graph.replay()
        return logits


class DecodeGraphs:
    """The steps of one cache by their size; on a device without graphs they run plainly."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._steps: dict[int, DecodeStep] = {}
        has_graphs = decoder.device.type == "cuda"
        # One region of memory for all: no two graphs run at a time.
        self._memory = torch.cuda.graph_pool_handle() if has_graphs else None

    def logits(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Return the logits that follow one more token of each sequence, (sequences, vocab) float32.

        They are valid until the next call. Counts the tokens in the cache; raises as it does.
        """
        positions = [self._cache.lengths[slot] for slot in slots]
        self._cache.advance(slots, [1] * len(slots), [position + 1 for position in positions])
        step = self._step(1 << (len(tokens) - 1).bit_length())
        step.write(tokens, positions, slots)
        return step.run()[: len(tokens)]

    def _step(self, size: int) -> DecodeStep:
        if size not in self._steps:
            self._steps[size] = (
                DecodeStep(self._decoder, self._cache, size)
                if self._memory is None
                else RecordedStep(self._decoder, self._cache, size, self._memory)
            )
        return self._steps[size]
