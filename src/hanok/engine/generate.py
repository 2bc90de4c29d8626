"""The readable loop: some prompts, one cache, no scheduler.

All prompts are prefilled in forward passes of at most PREFILL_TOKENS tokens, then every unfinished
sequence gets one token for each pass. With `use_cache=False` each pass computes everything again; the
tokens are the same, which is what it is for.
"""

import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.checkpoint.stream import StreamDecoder
from hanok.engine import cuda_graph, native_steps
from hanok.engine.cuda_graph import DecodeGraphs
from hanok.engine.native_steps import NativeSteps
from hanok.engine.params import SamplingParams
from hanok.engine.sampling import draw, processed
from hanok.memory.heap import give_back
from hanok.memory.needs import PREFILL_TOKENS
from hanok.models.decoder import Decoder

LONG_PASS_TOKENS = 256  # whose activations are worth giving back
FinishReason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token of one sequence."""

    sequence: int
    token_id: int
    text: str
    """What can be shown now: whole characters, and nothing that may become a stop text."""
    logprob: float
    """Natural logarithm of the model's own probability, before any processor."""
    top_logprobs: tuple[tuple[int, float], ...]
    """The likeliest token ids with their log-probabilities, as many as were asked for."""
    finish_reason: FinishReason | None


class StopTexts:
    """Holds back text that may be the beginning of a stop text, and cuts at the first that appears."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return what can be shown, and whether a stop text was reached (nothing follows then)."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        held = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - held
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def finish(self) -> str:
        """Return what was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Return how many of the last characters are the first ones of `stop`."""
        longest = min(len(self._held), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


@dataclass(slots=True, kw_only=True)
class GenerationSequence:
    """One prompt and what has been generated for it; changed by `generate` alone."""

    prompt_ids: list[int]
    params: SamplingParams
    end_ids: Collection[int]
    """Token ids that end it, `params.stop_token_ids` among them."""
    max_tokens: int
    """Length at which the model's context ends it."""
    decoder: StreamDecoder | None
    """Turns tokens into text; None where the checkpoint has no tokenizer."""
    generated_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stops: StopTexts = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.stops = StopTexts(self.params.stop)
        seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def room(self) -> int:
        """How many tokens can be generated at the most."""
        return min(self.params.max_new_tokens, self.max_tokens - len(self.prompt_ids))

    @property
    def token_ids(self) -> list[int]:
        """Prompt and generated tokens."""
        return self.prompt_ids + self.generated_ids

    def step(self, index: int, logits: Tensor) -> TokenEvent:
        """Choose the next token from its logits, (vocab,) float32, and say what came of it."""
        scores = processed(logits, self.params, self.prompt_ids, self.generated_ids)
        token = draw(scores, self.params, self.generator)
        total = logits.logsumexp(-1)
        best: tuple[tuple[int, float], ...] = ()
        if self.params.top_logprobs:
            top = logits.topk(min(self.params.top_logprobs, len(logits)))
            best = tuple(zip(top.indices.tolist(), (top.values - total).tolist(), strict=True))
        self.generated_ids.append(token)
        text = self._advance(token)
        return TokenEvent(
            sequence=index,
            token_id=token,
            text=text,
            logprob=float(logits[token] - total),
            top_logprobs=best,
            finish_reason=self.finish_reason,
        )

    def _advance(self, token: int) -> str:
        """Decide whether the token ends the sequence; return the text that can be shown."""
        piece = self.decoder.push(token) if self.decoder else ""
        text, is_stopped = self.stops.push(piece)
        if is_stopped:
            self.finish_reason = "stop_sequence"
            return text
        if token in self.end_ids:
            self.finish_reason = "eos_token"
        elif len(self.generated_ids) >= self.room:
            self.finish_reason = "length"
        if self.finish_reason is None:
            return text
        rest, is_stopped = self.stops.push(self.decoder.finish() if self.decoder else "")
        if is_stopped:
            self.finish_reason = "stop_sequence"
            return text + rest
        return text + rest + self.stops.finish()


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
        for index, logits in _forward(decoder, sequences, running, cache, recorded):
            yield sequences[index].step(index, logits)
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
) -> list[tuple[int, Tensor]]:
    """Return the logits that follow each running sequence, computing what is not in the cache."""
    lengths = {index: len(sequences[index].token_ids) for index in running}
    past = dict.fromkeys(running, 0)
    if cache is not None:
        for index in running:
            if not decoder.config.shares_angles(cache.computed_for[index], lengths[index]):
                cache.truncate(index, 0)
            past[index] = cache.lengths[index]
    waiting = {index: sequences[index].token_ids[past[index] :] for index in running}
    if recorded is not None and all(len(tokens) == 1 for tokens in waiting.values()):
        scores = recorded.logits([tokens[0] for tokens in waiting.values()], running)
        return list(zip(running, scores, strict=True))
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
    return [(index, found[index]) for index in running]
