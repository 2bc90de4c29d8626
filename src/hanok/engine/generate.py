"""The readable loop: some prompts, one cache, no scheduler.

All prompts are prefilled in forward passes of at most PREFILL_TOKENS tokens, then every unfinished
sequence gets one token for each pass. With `use_cache=False` each pass computes everything again; the
tokens are the same, which is what it is for.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.engine import cuda_graph, native_steps
from hanok.engine.cuda_graph import DecodeGraphs
from hanok.engine.native_steps import NativeSteps
from hanok.engine.sequence import GenerationSequence, TokenEvent, choose
from hanok.memory.heap import give_back
from hanok.memory.needs import PREFILL_TOKENS
from hanok.models.decoder import Decoder

LONG_PASS_TOKENS = 256  # whose activations are worth giving back


@torch.inference_mode()
def generate(
    decoder: Decoder,
    sequences: list[GenerationSequence],
    *,
    cache: KVCache | None = None,
    use_cache: bool = True,
) -> Iterator[TokenEvent]:
    """Yield the tokens of all sequences as they come, those of one pass in the sequences' order.

    `cache` may hold the first tokens of each sequence already (see `KVCache.lengths`); it must have a
    slot for each. Without one, a cache is made that fits.
    """
    if cache is None and use_cache:
        capacity = max(len(item.prompt_ids) + item.room for item in sequences)
        cache = decoder.new_cache(len(sequences), capacity)
    recorded = _recorded_steps(decoder, cache) if cache is not None else None
    running = list(range(len(sequences)))
    while running:
        rows = _forward(decoder, sequences, running, cache, recorded)
        choices = choose([sequences[index] for index in running], rows)
        for index, choice in zip(running, choices, strict=True):
            yield sequences[index].take(index, choice)
        running = [index for index in running if sequences[index].finish_reason is None]


def _recorded_steps(decoder: Decoder, cache: KVCache) -> DecodeGraphs | NativeSteps | None:
    """Return what makes the passes over single tokens again without Python, where something can."""
    if cuda_graph.why_not(decoder, cache) is None:
        return DecodeGraphs(decoder, cache)
    return NativeSteps(decoder, cache) if native_steps.why_not(decoder, cache) is None else None


def _forward(
    decoder: Decoder,
    sequences: list[GenerationSequence],
    running: list[int],
    cache: KVCache | None,
    recorded: "DecodeGraphs | NativeSteps | None",
) -> Tensor:
    """Return the logits that follow each running sequence, computing what is not in the cache.

    (running, vocab) float32, valid until the next call
    """
    lengths = {index: len(sequences[index].token_ids) for index in running}
    past = dict.fromkeys(running, 0)
    if cache is not None:
        for index in running:
            if not decoder.config.shares_angles(cache.computed_for[index], lengths[index]):
                cache.truncate(index, 0)
            past[index] = cache.lengths[index]
    waiting = {index: sequences[index].token_ids[past[index] :] for index in running}
    if recorded is not None and all(len(tokens) == 1 for tokens in waiting.values()):
        return recorded.logits([tokens[0] for tokens in waiting.values()], running)
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
