"""The readable loop: some prompts, one cache, no scheduler.

All prompts are prefilled in forward passes of at most PREFILL_TOKENS tokens, then every unfinished
sequence gets one token for each pass, or several where the next ones were drafted right. With
`use_cache=False` each pass computes everything again; the tokens are the same, which is what it is for.
"""

import time
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.engine.passes import ShortPasses
from hanok.engine.sequence import (
    GenerationSequence,
    Scores,
    SpeculationCounts,
    TokenEvent,
    take_next,
)
from hanok.engine.speculate import Speculator
from hanok.memory.heap import give_back
from hanok.memory.needs import PREFILL_TOKENS
from hanok.models.decoder import Decoder

LONG_PASS_TOKENS = 256  # whose activations are worth giving back


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


@torch.inference_mode()
def generate(
    decoder: Decoder,
    sequences: list[GenerationSequence],
    *,
    cache: KVCache | None = None,
    use_cache: bool = True,
    speculator: Speculator | None = None,
) -> Iterator[TokenEvent]:
    """Yield the tokens of all sequences as they come, those of one pass in the sequences' order.

    `cache` may hold the first tokens of each sequence already (see `KVCache.lengths`); it must have a
    slot for each. Without one, a cache is made that fits. A `speculator` drafts; it needs a cache.
    """
    if cache is None and use_cache:
        capacity = max(len(item.prompt_ids) + item.room for item in sequences)
        cache = decoder.new_cache(len(sequences), capacity)
    passes = ShortPasses(decoder, cache) if cache is not None else None
    running = list(range(len(sequences)))
    while running:
        drafts: dict[int, list[int]] = {}
        is_decoding = cache is not None and _is_decoding(decoder, sequences, running, cache)
        if speculator is not None and is_decoding:
            drafts = speculator.drafts({index: sequences[index] for index in running})
        began = time.perf_counter()
        if passes is not None and is_decoding:
            tokens = [[sequences[i].token_ids[-1], *drafts.get(i, ())] for i in running]
            scores = Scores(passes.logits(tokens, running))
        else:
            scores = Scores(_forward(decoder, sequences, running, cache))
        if speculator is not None and is_decoding:
            num_tokens = len(running) + sum(map(len, drafts.values()))
            speculator.timed(num_tokens, time.perf_counter() - began)
        row = 0
        for index in running:
            sequence, draft = sequences[index], drafts.get(index, [])
            taken = take_next(sequence, index, draft, scores, row)
            row += 1 + len(draft)
            if cache is not None:  # what was drafted wrong, or behind the end
                cache.truncate(index, len(sequence.token_ids) - 1)
            if speculator is not None:
                speculator.learn(index, sequence, len(draft), len(taken.events))
            yield from taken.events
            if taken.error is not None:
                raise taken.error
        running = [index for index in running if sequences[index].finish_reason is None]


def _is_decoding(
    decoder: Decoder,
    sequences: Sequence[GenerationSequence],
    running: Sequence[int],
    cache: KVCache,
) -> bool:
    """Return whether of each running sequence only the newest token is to be computed."""
    for index in running:
        length = len(sequences[index].token_ids)
        if not decoder.config.shares_angles(cache.computed_for[index], length):
            return False
        if cache.lengths[index] != length - 1:
            return False
    return True


def _forward(
    decoder: Decoder,
    sequences: list[GenerationSequence],
    running: list[int],
    cache: KVCache | None,
) -> Tensor:
    """Return the logits that follow each running sequence, computing what is not in the cache.

    (running, vocab) float32
    """
    lengths = {index: len(sequences[index].token_ids) for index in running}
    past = dict.fromkeys(running, 0)
    if cache is not None:
        for index in running:
            if not decoder.config.shares_angles(cache.computed_for[index], lengths[index]):
                cache.truncate(index, 0)
            past[index] = cache.lengths[index]
    waiting = {index: sequences[index].token_ids[past[index] :] for index in running}
    found: dict[int, Tensor] = {}
    while waiting:
        # Without a cache a sequence is computed whole; with one, long prompts go in chunks.
        chunks: dict[int, list[int]] = {}
        for index, tokens in waiting.items():
            room = PREFILL_TOKENS - sum(map(len, chunks.values()))
            if room <= 0:
                break
            chunks[index] = tokens if cache is None else tokens[:room]
        batch = ForwardBatch.of(
            list(chunks.values()),
            past=[past[index] for index in chunks],
            slots=list(chunks),
            sequence_lengths=[lengths[index] for index in chunks],
            device=decoder.device,
        )
        hidden = decoder(batch, cache)
        ends = dict(zip(chunks, batch.last_tokens(), strict=True))
        done = [index for index in chunks if len(chunks[index]) == len(waiting[index])]
        if done:
            logits = decoder.logits(hidden[[ends[index] for index in done]])
            found |= dict(zip(done, logits, strict=True))
        for index, tokens in chunks.items():
            past[index] += len(tokens)
            waiting[index] = waiting[index][len(tokens) :]
        waiting = {index: tokens for index, tokens in waiting.items() if tokens}
        if len(batch.token_ids) >= LONG_PASS_TOKENS:
            del batch, hidden
            give_back()
    return torch.stack([found[index] for index in running])
