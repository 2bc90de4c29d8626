"""The readable loop: some prompts, one cache, no scheduler.

All prompts are prefilled in forward passes of at most PREFILL_TOKENS tokens, then every unfinished
sequence gets one token for each pass, or several where the next ones were drafted right. With
`use_cache=False` each pass computes everything again; the tokens are the same, which is what it is for.
"""

import time
from collections.abc import Generator, Iterator

import torch

from hanok.engine.passes import Passes
from hanok.engine.sequence import (
    GenerationSequence,
    Sampler,
    SpeculationCounts,
    TokenEvent,
    take_next,
)
from hanok.engine.speculate import Speculation, Speculator
from hanok.models.decoder import Decoder


class TokenStream(Iterator[TokenEvent]):
    """The tokens of one prompt, or of several, as they come."""

    def __init__(
        self, sequences: list[GenerationSequence], events: Generator[TokenEvent, None, None]
    ) -> None:
        self._sequences = sequences
        self._events = events

    def __next__(self) -> TokenEvent:
        """Return the next token."""
        return next(self._events)

    def close(self) -> None:
        """Generate no more."""
        self._events.close()

    @property
    def speculation(self) -> SpeculationCounts:
        """What guessing tokens brought so far, of all prompts together."""
        counts = [sequence.speculation for sequence in self._sequences]
        return SpeculationCounts(
            proposed=sum(item.proposed for item in counts),
            accepted=sum(item.accepted for item in counts),
            passes=sum(item.passes for item in counts),
        )


class PrefixCache:
    """Keys and values kept between prompts that begin alike, such as the turns of a conversation."""

    def __init__(self) -> None:
        self._passes: Passes | None = None
        self._sequence: GenerationSequence | None = None
        self._speculator: tuple[Speculation, Passes, Speculator] | None = None

    def prepare(self, decoder: Decoder, sequence: GenerationSequence) -> Passes:
        """Return passes over a cache that fits the sequence and holds what it shares with the last."""
        capacity = len(sequence.prompt_ids) + sequence.room
        passes, last = self._passes, self._sequence
        cache = passes.cache if passes is not None and passes.decoder is decoder else None
        if passes is None or cache is None or cache.capacity < capacity:
            # A larger one starts empty; asking for twice as much makes that rare.
            cache = decoder.new_cache(1, min(2 * capacity, sequence.max_tokens))
            self._passes = passes = Passes(decoder, cache)
        elif last is not None:
            # The last prompt token is computed again: its logits are needed.
            shared = _num_shared(last.token_ids, sequence.prompt_ids)
            cache.keep(0, min(shared, len(sequence.prompt_ids) - 1))
        self._sequence = sequence
        return passes

    def speculator(self, speculation: Speculation, passes: Passes) -> Speculator:
        """Return what drafts for these passes; what it learned is kept between prompts as well."""
        if self._speculator is None or self._speculator[:2] != (speculation, passes):
            capacity = passes.cache.capacity if passes.cache is not None else 1
            found = Speculator(speculation, passes.decoder, num_sequences=1, max_tokens=capacity)
            self._speculator = speculation, passes, found
        self._speculator[2].forget(0)  # another text begins
        return self._speculator[2]


@torch.inference_mode()
def generate(
    decoder: Decoder,
    sequences: list[GenerationSequence],
    *,
    passes: Passes | None = None,
    use_cache: bool = True,
    speculator: Speculator | None = None,
) -> Iterator[TokenEvent]:
    """Yield the tokens of all sequences as they come, those of one pass in the sequences' order.

    The cache of `passes` may hold the first tokens of each sequence already; it must have a slot for
    each. Without them, a cache is made that fits. A `speculator` drafts; it needs a cache. Where
    weights change between two tokens, the next one is that of the new weights.
    """
    if passes is None:
        capacity = max(len(item.prompt_ids) + item.room for item in sequences)
        passes = Passes(decoder, decoder.new_cache(len(sequences), capacity) if use_cache else None)
    running = list(range(len(sequences)))
    while running:
        missing = passes.missing({index: sequences[index].token_ids for index in running})
        is_decoding = passes.cache is not None and all(len(new) == 1 for new in missing.values())
        drafts: dict[int, list[int]] = {}
        if speculator is not None and is_decoding:
            drafts = speculator.drafts({index: sequences[index] for index in running})
        began = time.perf_counter()
        if is_decoding:
            tokens = [[*missing[index], *drafts.get(index, ())] for index in running]
            sampler = Sampler(passes.step(tokens, running))
        else:
            sampler = Sampler(decoder.logits(passes.prefill(missing)))
        if speculator is not None and is_decoding:
            num_tokens = len(running) + sum(map(len, drafts.values()))
            speculator.timed(num_tokens, time.perf_counter() - began)
        row = 0
        for index in running:
            sequence, draft = sequences[index], drafts.get(index, [])
            taken = take_next(sequence, index, draft, sampler, row)
            row += 1 + len(draft)
            if passes.cache is not None:  # drafted tokens that were wrong, or after the end
                passes.cache.truncate(index, len(sequence.token_ids) - 1)
            if speculator is not None:
                speculator.learn(index, sequence, len(draft), len(taken.events))
            yield from taken.events
            if taken.error is not None:
                raise taken.error
        running = [index for index in running if sequences[index].finish_reason is None]


def _num_shared(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
