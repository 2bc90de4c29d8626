"""Passes over a few tokens of each sequence of a cache, recorded where something can record them."""

from collections.abc import Sequence

from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.engine import cuda_graph, native_steps
from hanok.engine.cuda_graph import DecodeGraphs
from hanok.engine.native_steps import NativeSteps
from hanok.models.decoder import Decoder


class ShortPasses:
    """One decoder and one cache with a row for each sequence."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self.recorded = _recorded(decoder, cache)
        """What makes passes again; None where nothing can."""

    def logits(self, tokens: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Return the logits that follow each of some sequences' next tokens, (tokens, vocab) float32.

        They are valid until the next call. Counts the tokens in the cache; raises as it does.
        """
        if isinstance(self.recorded, NativeSteps):
            return self.recorded.logits(tokens, slots)
        if isinstance(self.recorded, DecodeGraphs) and all(len(item) == 1 for item in tokens):
            return self.recorded.logits([item[0] for item in tokens], slots)
        past = [self._cache.lengths[slot] for slot in slots]
        batch = ForwardBatch.of(
            [list(item) for item in tokens],
            past=past,
            slots=list(slots),
            device=self._decoder.device,
        )
        return self._decoder.logits(self._decoder(batch, self._cache))


def _recorded(decoder: Decoder, cache: KVCache) -> DecodeGraphs | NativeSteps | None:
    if not decoder.execution.records_passes:
        return None
    if cuda_graph.why_not(decoder, cache) is None:
        return DecodeGraphs(decoder, cache)
    return NativeSteps(decoder, cache) if native_steps.why_not(decoder, cache) is None else None
