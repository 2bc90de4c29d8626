"""One prompt and what follows: the next token from its scores, its text, and when it ends.

The loop of `generate.py` and the engine both run sequences; what a sequence becomes depends on its own
prompt, options and seed alone.
"""

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import compress
from math import isfinite
from typing import Literal, Protocol

import torch
from torch import Tensor

from hanok.checkpoint.stream import StreamDecoder
from hanok.engine.params import SamplingParams
from hanok.engine.sampling import draw, one_thread, processed
from hanok.errors import GenerationError, HanokError
from hanok.kernels.native import native_for

FinishReason = Literal["length", "eos_token", "stop_sequence"]
Ranked = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token of one sequence."""

    sequence: int
    token_id: int
    text: str
    """What can be shown now: whole characters, and nothing that may become a stop text."""
    logprob: float
    """Natural logarithm of the model's own probability, before any processor (`model_logprobs`)."""
    top_logprobs: Ranked
    """The likeliest token ids with their log-probabilities, as many as were asked for."""
    finish_reason: FinishReason | None


class Mask(Protocol):
    """What may follow, by a grammar; see `engine/grammar.py`."""

    def mask(self, scores: Tensor) -> Tensor:
        """Return the scores, (vocab,), with tokens that may not follow at -inf."""

    def accept(self, token_id: int) -> None:
        """Continue after a token."""

    def allowed_prefix(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens may follow, one after another; nothing changes."""

    def forced(self) -> list[int]:
        """Return tokens of a text that has to follow; none where there is a choice."""

    def rollback(self, num_tokens: int) -> None:
        """Go back before the last tokens that were accepted."""


class StopTexts:
    """Cuts a text where the first stop text begins, or ends, and holds back what may become one.

    Stop texts are looked for in the text with special tokens spelled out, shown or not.
    """

    def __init__(self, stops: Sequence[str], *, are_included: bool = False) -> None:
        self._stops = tuple(stops)
        self._are_included = are_included
        self.reached: str | None = None
        """The stop text that was reached."""
        self._held = ""
        """Perhaps the beginning of a stop text. Where these are included, it is given already."""
        self._shows: list[bool] = []
        """Of each character held: whether it is shown, or of a special token that is not."""

    def push(self, text: str, *, passed_over: str = "") -> tuple[str, bool]:
        """Return what can be shown, and whether a stop text was reached (nothing follows then).

        `passed_over` follows `text` and is never shown: how a special token is spelled.
        """
        if not self._stops:
            return text, False
        begin = len(self._held) if self._are_included else 0
        known = self._held + text + passed_over
        shows = [*self._shows, *[True] * len(text), *[False] * len(passed_over)]
        found = [(at, stop) for stop in self._stops if (at := known.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self.reached = stop
            end, kept = at + len(stop) if self._are_included else at, len(known)
        else:
            kept = len(known) - max(self._overlap(known, stop) for stop in self._stops)
            end = len(known) if self._are_included else kept
        self._held, self._shows = known[kept:], shows[kept:]
        return _shown(known[begin:end], shows[begin:end]), bool(found)

    def finish(self) -> str:
        """Return what was held back, when no more text comes."""
        held = "" if self._are_included else _shown(self._held, self._shows)
        self._held, self._shows = "", []
        return held

    def _overlap(self, text: str, stop: str) -> int:
        """Return how many of the last characters are the first ones of `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _shown(text: str, shows: Sequence[bool]) -> str:
    return "".join(compress(text, shows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The next token of a sequence."""

    token_id: int
    logprob: float
    top_logprobs: Ranked


@dataclass(slots=True, kw_only=True)
class SpeculationCounts:
    """What guessing tokens brought a sequence (engine/speculate.py)."""

    proposed: int = 0
    """Tokens that were guessed and checked."""
    accepted: int = 0
    """Of these, those that were right."""
    passes: int = 0
    """Passes that gave it tokens: one for each token but the accepted ones."""


@dataclass(slots=True, kw_only=True)
class GenerationSequence:
    """One prompt and what has been generated for it."""

    prompt_ids: list[int]
    params: SamplingParams
    end_ids: Collection[int]
    """Token ids that end it, `params.stop_token_ids` among them."""
    max_tokens: int
    """Length at which the model's context ends it."""
    text_stream: StreamDecoder | None
    """Turns tokens into text; None where the checkpoint has no tokenizer."""
    grammar: Mask | None = None
    """What the answer has to be, if not any text."""
    generated_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    speculation: SpeculationCounts = field(default_factory=SpeculationCounts)
    token_ids: list[int] = field(init=False)
    """Prompt and generated tokens."""
    stops: StopTexts = field(init=False)
    seed: int = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = [*self.prompt_ids]
        self.stops = StopTexts(self.params.stop, are_included=self.params.include_stop)
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def room(self) -> int:
        """How many tokens can be generated at the most."""
        return min(self.params.max_new_tokens, self.max_tokens - len(self.prompt_ids))

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the one with the largest logit, whatever came before."""
        params = self.params
        return (
            params.temperature == 0
            and params.repetition_penalty == 1.0
            and not (params.logit_bias or params.presence_penalty or params.frequency_penalty)
            and not (params.watermark_delta or self.grammar or self._banned_ids)
        )

    @property
    def _banned_ids(self) -> Collection[int]:
        """End tokens, while there are too few others."""
        return self.end_ids if len(self.generated_ids) < self.params.min_new_tokens else ()

    def scores(self, logits: Tensor) -> Tensor:
        """Return what the next token is drawn from, of its logits, (vocab,) float32."""
        if self.grammar is not None:
            logits = self.grammar.mask(logits)
        return processed(
            logits, self.params, self.prompt_ids, self.generated_ids, banned=self._banned_ids
        )

    def take(self, index: int, choice: Choice | GenerationError) -> TokenEvent:
        """Append a token and return its event; raise what choosing it failed with."""
        if isinstance(choice, GenerationError):
            raise choice
        self.generated_ids.append(choice.token_id)
        self.token_ids.append(choice.token_id)
        if self.grammar is not None:
            self.grammar.accept(choice.token_id)
        return TokenEvent(
            sequence=index,
            token_id=choice.token_id,
            text=self._advance(choice.token_id),
            logprob=choice.logprob,
            top_logprobs=choice.top_logprobs,
            finish_reason=self.finish_reason,
        )

    def _advance(self, token: int) -> str:
        """Decide whether the token ends the sequence; return the text that can be shown."""
        piece, passed_over = "", ""
        if self.text_stream is not None:
            piece, passed_over = self.text_stream.push(token), self.text_stream.passed_over(token)
        text, is_stopped = self.stops.push(piece, passed_over=passed_over)
        if token in self.end_ids:
            self.finish_reason = "eos_token"
        elif is_stopped:
            self.finish_reason = "stop_sequence"
        elif len(self.generated_ids) >= self.room:
            self.finish_reason = "length"
        if is_stopped or self.finish_reason is None:
            return text
        rest, is_stopped = self.stops.push(self.text_stream.finish() if self.text_stream else "")
        if is_stopped:
            self.finish_reason = "stop_sequence"
            return text + rest
        return text + rest + self.stops.finish()


class LookAhead:
    """What a sequence would choose by the logits of another model, one token after another.

    It draws with the numbers that the sequence will draw with, and follows its grammar. `close` leaves
    the sequence as it was.
    """

    def __init__(self, sequence: GenerationSequence) -> None:
        self._sequence = sequence
        self._generator = sequence.generator.clone_state()
        self._generated = [*sequence.generated_ids]
        self._num_accepted = 0

    def choose(self, logits: Tensor) -> int | None:
        """Return the next token, of its logits, (vocab,) float32; None where the grammar has none."""
        sequence = self._sequence
        params, grammar = sequence.params, sequence.grammar
        banned = sequence.end_ids if len(self._generated) < params.min_new_tokens else ()
        try:
            if grammar is not None:
                logits = grammar.mask(logits)
            scores = processed(logits, params, sequence.prompt_ids, self._generated, banned=banned)
            token = draw(scores, params, self._generator)
            if grammar is not None:
                grammar.accept(token)
                self._num_accepted += 1
        except (HanokError, RuntimeError, ValueError):  # what is really chosen will say so
            return None
        self._generated.append(token)
        return token

    def close(self) -> None:
        """Roll the grammar back."""
        if self._sequence.grammar is None or not self._num_accepted:
            return
        try:
            self._sequence.grammar.rollback(self._num_accepted)
        except HanokError:
            return  # this sequence's alone: choosing its next token will say so


class Sampler:
    """Chooses the next tokens of sequences, each from a row of logits.

    A choice depends on its row and its sequence alone, and so does what goes wrong with it. What takes
    the whole vocabulary of every row is computed for all rows at once.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._totals, likeliest = totals_and_likeliest(logits)
        self._numbers: list[float] = self._totals.tolist()
        self._likeliest: list[int] = likeliest.tolist()
        logprobs = logits.gather(1, likeliest[:, None])[:, 0] - self._totals
        self._logprobs: list[float] = logprobs.tolist()

    def choose(self, row: int, sequence: GenerationSequence) -> Choice | GenerationError:
        """Return the next token of a sequence; its generator draws, nothing else changes."""
        if not isfinite(self._numbers[row]):
            return GenerationError(
                f"the scores of token {len(sequence.token_ids)} are not finite numbers; the weights "
                "may be damaged, or too large for the dtype that is computed in."
            )
        logits, total, params = self._logits[row], self._totals[row], sequence.params
        token, logprob = self._likeliest[row], self._logprobs[row]
        if not sequence.is_greedy:
            try:
                with one_thread(logits.device):
                    scores = sequence.scores(logits)
                    token = draw(scores, params, sequence.generator)
            except (HanokError, RuntimeError, ValueError) as error:
                return GenerationError(f"choosing a token failed: {error}")
            if not params.model_logprobs:
                logits, total = scores, totals_and_likeliest(scores[None])[0][0]
            logprob = float(logits[token] - total)
        top = ranked(logits - total, params.top_logprobs) if params.top_logprobs else ()
        return Choice(token_id=token, logprob=logprob, top_logprobs=top)


def totals_and_likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(sum(exp)) and the largest entry of each row of logits, (rows, vocab) float32.

    Each token waits for them, and where other programs use the cores a few thousand numbers that torch
    shares out among threads take longer than the model's pass: our kernels share what is worth it.
    """
    kernels = native_for(logits)
    if kernels is None or not logits.numel():
        return logits.logsumexp(-1), logits.argmax(-1)
    return kernels.log_sum_exp(logits)


def choose(
    sequences: Sequence[GenerationSequence], logits: Tensor
) -> list[Choice | GenerationError]:
    """Return the next token of each sequence from its row of logits, (sequences, vocab) float32."""
    sampler = Sampler(logits)
    return [sampler.choose(row, sequence) for row, sequence in enumerate(sequences)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a pass gave a sequence: its next tokens, and what went wrong after them, if anything."""

    events: list[TokenEvent]
    error: GenerationError | None = None


def take_next(
    sequence: GenerationSequence, index: int, draft: Sequence[int], sampler: Sampler, row: int
) -> Taken:
    """Append the next token, and as many after it as were drafted right.

    The rows of the sequence begin at `row`, one after its last token and one after each drafted one.
    Each token is chosen as if none had been drafted; the first that is another one ends it, for the
    later rows follow a token that was not chosen.
    """
    events: list[TokenEvent] = []
    error: GenerationError | None = None
    for place in range(len(draft) + 1):
        try:
            events.append(sequence.take(index, sampler.choose(row + place, sequence)))
        except GenerationError as found:
            error = found
        except Exception as found:  # a grammar's, a decoder's: this sequence's alone
            error = GenerationError(f"taking a token failed: {found!r}")
            error.__cause__ = found
        if error is not None or sequence.finish_reason is not None or place == len(draft):
            break
        if events[-1].token_id != draft[place]:
            break
    sequence.speculation.proposed += len(draft)
    sequence.speculation.accepted += num_right(draft, events)
    sequence.speculation.passes += 1
    return Taken(events=events, error=error)


def num_right(draft: Sequence[int], events: Sequence[TokenEvent]) -> int:
    """Return how many of the drafted tokens came."""
    return sum(event.token_id == token for event, token in zip(events, draft, strict=False))


def ranked(logprobs: Tensor, number: int) -> Ranked:
    """Return so many of the likeliest tokens, those that are possible at all."""
    top = logprobs.topk(min(number, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple((token, value) for token, value in pairs if value > float("-inf"))
