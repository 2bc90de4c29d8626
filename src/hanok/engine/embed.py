"""Texts as vectors: the hidden states of their tokens, pooled to one and scaled to length 1."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hanok.attention.base import ForwardBatch
from hanok.checkpoint.pooling import Pooling
from hanok.engine.passes import Passes
from hanok.errors import GenerationError
from hanok.memory.heap import trim_heap
from hanok.memory.needs import PREFILL_TOKENS
from hanok.models.decoder import Decoder


@torch.inference_mode()
def embed(decoder: Decoder, texts: Sequence[Sequence[int]], pooling: Pooling) -> Tensor:
    """Return a vector of length 1 for the tokens of each text, (texts, hidden) float32 on the CPU.

    No text is empty. As many as have PREFILL_TOKENS tokens together are computed in a pass; a longer
    one by itself, in chunks over a cache. Raises GenerationError where hidden states are not finite.
    """
    found: list[Tensor] = []
    for group in _groups(texts):
        found += _pooled_group(decoder, group, pooling)
        trim_heap()
    return unit_length(torch.stack(found))


def pooled(hidden: Tensor, pooling: Pooling) -> Tensor:
    """Return the sum of (tokens, hidden), or the last: in float64, so that chunks add up to the same."""
    if pooling == "mean":
        return hidden.sum(0, dtype=torch.float64).cpu()
    return hidden[-1].to("cpu", torch.float64)


def finished(total: Tensor, pooling: Pooling, num_tokens: int) -> Tensor:
    """Return the vector of a text, (hidden,) float32, of what `pooled` made of all its chunks.

    Raises GenerationError where it is not finite.
    """
    vector = total / num_tokens if pooling == "mean" else total
    if not vector.isfinite().all():
        raise GenerationError("the hidden states of the text are not finite.")
    return vector.float()


def unit_length(rows: Tensor) -> Tensor:
    """Return (texts, numbers) with each row scaled to length 1."""
    return normalize(rows, dim=-1)


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yield the texts in their order, as many at a time as a pass computes."""
    group: list[Sequence[int]] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > PREFILL_TOKENS:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _pooled_group(
    decoder: Decoder, group: Sequence[Sequence[int]], pooling: Pooling
) -> list[Tensor]:
    if len(group) == 1 and len(group[0]) > PREFILL_TOKENS:
        return [_pooled_alone(decoder, group[0], pooling)]
    lengths = [len(text) for text in group]
    hidden = decoder(ForwardBatch.of([list(text) for text in group], device=decoder.device))
    parts = hidden.split(lengths)
    return [
        finished(pooled(part, pooling), pooling, length)
        for part, length in zip(parts, lengths, strict=True)
    ]


def _pooled_alone(decoder: Decoder, text: Sequence[int], pooling: Pooling) -> Tensor:
    """Compute a long text in chunks, each with the keys and values of those before it."""
    passes = Passes(decoder, decoder.new_cache(1, len(text)))
    total = torch.zeros(decoder.config.hidden_size, dtype=torch.float64)
    for batch, _ in passes.chunks({0: text}):
        part = pooled(passes.run(batch, may_record=False), pooling)
        total = total + part if pooling == "mean" else part
        trim_heap()
    return finished(total, pooling, len(text))
