"""Speculation: several tokens are guessed cheaply, and one pass of the model checks them all.

A pass over a few tokens costs little more than one over a single token. The guesses come from the text
itself (`engine/ngram.py`) or from a smaller model (`engine/draft.py`); how many are made is decided by
what was measured (`engine/gain.py`), none where none pays.

What is generated is what would be without it, token for token, drawn ones included. At each position the
model's own token is chosen exactly as ever: from the same logits, through the same processors, with the
next number of the sequence's generator (`sequence.take_next`). Guesses only decide how many positions
one pass can settle: the first that is not the chosen token ends it, and the chosen token is kept. This
accepts a guess x with the model's probability p(x), and what comes otherwise is drawn from p without x:
for guesses that do not depend on the draw, the same as rejection sampling (arXiv 2211.17192), which
keeps the distribution; here the text of a seed stays as well. A draft model may look ahead at the number
that will be drawn (`DraftModel.propose`): the token is still chosen from p with that number alone, so
nothing is changed but how often the guess is right.

Our CPU kernels compute the same logits bit for bit, whatever else is in the batch.
They do for quantized weights; for others in passes of up to 8 tokens, so drafts end there. On other
devices rounding may decide between two tokens that are almost equally likely, as it does for batches.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from hanok.engine import draft, ngram
from hanok.engine.draft import DraftModel, DraftSource, check_vocabularies
from hanok.engine.gain import Gain, PassTimes
from hanok.engine.ngram import FORCED, NgramIndex, kind_of
from hanok.engine.sequence import GenerationSequence
from hanok.errors import HanokError, OptionError
from hanok.kernels.native import native
from hanok.models.decoder import Decoder
from hanok.models.linear import Linear

Method = Literal["ngram", "draft"]
MOST_TOKENS = 255
NGRAM_TOKENS, DRAFT_TOKENS = (
    15,
    7,
)  # by default; with the token before them they fill the kernels' tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How tokens are guessed."""

    method: Method = "ngram"
    """"ngram": from the text so far; "draft": by a smaller model."""
    draft: DraftSource | None = None
    """The smaller model, with the same vocabulary."""
    max_tokens: int | None = None
    """Tokens guessed for one pass at the most; None: 15 from the text, 7 by a model."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise OptionError(f"speculation {self.method!r} is unknown; it is 'ngram' or 'draft'.")
        if self.method == "draft" and self.draft is None:
            raise OptionError("speculation by a draft model needs one: give draft=hanok.load(…).")
        if self.method == "ngram" and self.draft is not None:
            raise OptionError("a draft model is given, but method is 'ngram'; say method='draft'.")
        if self.max_tokens is not None and not 1 <= self.max_tokens <= MOST_TOKENS:
            raise OptionError(f"max_tokens is {self.max_tokens}; it must be 1 to {MOST_TOKENS}.")

    def check(self, model: DraftSource) -> None:
        """Raise OptionError where a model's tokens cannot be guessed so."""
        model.check_head()
        for item in (model, *([self.draft] if self.draft is not None else [])):
            if reason := item.decoder.config.why_not_truncated():
                raise OptionError(
                    f"tokens cannot be guessed ahead: {reason}. Wrong guesses would stay in it. "
                    "Leave speculation out."
                )
        if self.draft is not None:
            self.draft.check_head()
            check_vocabularies(model, self.draft)

    @property
    def most_drafted(self) -> int:
        """Tokens guessed for one pass at the most."""
        return self.max_tokens or (NGRAM_TOKENS if self.method == "ngram" else DRAFT_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Guesses of a sequence's next tokens."""

    tokens: list[int]
    kinds: list[int]
    """What kind of guess each is: those of a kind are right about equally often."""

    def cut(self, length: int) -> "Draft":
        """Return the first guesses."""
        return Draft(tokens=self.tokens[:length], kinds=self.kinds[:length])


class Proposer(Protocol):
    """Where guesses come from."""

    def propose(
        self, sequences: Mapping[int, GenerationSequence], limits: Mapping[int, int], size: int
    ) -> dict[int, Draft]:
        """Return what to check for some of the sequences, of each at most as many as `limits` says.

        `size` sequences are in the next pass.
        """

    def forget(self, key: int) -> None:
        """Drop a sequence that has ended."""


class Speculator:
    """Drafts for the sequences of one decoder, and learns from what became of the drafts.

    `num_sequences` may have a draft model's memory at a time, of at most `max_tokens` tokens each.
    """

    def __init__(
        self, speculation: Speculation, decoder: Decoder, *, num_sequences: int, max_tokens: int
    ) -> None:
        self._config = decoder.config
        self._most_drafted = speculation.most_drafted
        self._gain = Gain(
            ngram.PRIORS if speculation.draft is None else draft.PRIORS,
            most_drafted=self._most_drafted,
            most_tokens=most_exact_tokens(decoder),
        )
        self._proposer: Proposer = _NgramProposer(self._gain)
        if speculation.draft is not None:
            model = DraftModel(
                speculation.draft.decoder,
                num_slots=num_sequences,
                max_tokens=max_tokens,
                vocab_size=decoder.config.vocab_size,
            )
            self._proposer = _ModelProposer(model, self._gain)
        self._drafts: dict[int, Draft] = {}

    def drafts(self, sequences: Mapping[int, GenerationSequence]) -> dict[int, list[int]]:
        """Return what to check in the next pass, for those of its sequences where it pays.

        All of them wait for their next token.
        """
        limits = {key: self._limit(sequence) for key, sequence in sequences.items()}
        limits = {key: limit for key, limit in limits.items() if limit}
        self._drafts = self._proposer.propose(sequences, limits, len(sequences)) if limits else {}
        return {key: found.tokens for key, found in self._drafts.items()}

    def learn(self, key: int, sequence: GenerationSequence, num_drafted: int, num_new: int) -> None:
        """Take note that of a sequence's drafts so many were checked, which gave it `num_new` tokens."""
        if num_drafted and num_new:
            # One token more than those that were right, unless the last right one ended the text.
            kinds, has_ended = self._drafts[key].kinds, sequence.finish_reason is not None
            self._gain.learn(key, kinds[:num_drafted], num_new - 1, has_ended=has_ended)

    def timed(self, num_tokens: int, seconds: float) -> None:
        """Take note of how long a pass over so many tokens took, all of them next ones or drafts."""
        self._gain.times.record(num_tokens, seconds)

    def forget(self, key: int) -> None:
        """Drop a sequence that has ended."""
        self._gain.forget(key)
        self._proposer.forget(key)
        self._drafts.pop(key, None)

    def _limit(self, sequence: GenerationSequence) -> int:
        """Return how many tokens may be drafted: what can still follow, less the one that comes anyway.

        Where angles depend on the length (dynamic and longrope scaling), none that would change them.
        """
        left = sequence.room - len(sequence.generated_ids) - 1
        count, length = min(left, self._most_drafted), len(sequence.token_ids)
        return count if count > 0 and self._config.shares_angles(length, length + count) else 0


def most_exact_tokens(decoder: Decoder) -> int | None:
    """Return how many tokens of a pass are computed as each alone is; None: any number, or none."""
    if decoder.device.type != "cpu" or native() is None:
        return None
    limits = [item.exact_tokens for item in decoder.modules() if isinstance(item, Linear)]
    return min((limit for limit in limits if limit is not None), default=None)


def _forced(sequence: GenerationSequence) -> list[int]:
    """Return what the grammar leaves no choice about, up to the end of the text."""
    try:
        return [] if sequence.grammar is None else _to_end(sequence, sequence.grammar.forced())
    except HanokError:  # choosing the next token will meet it and say so
        return []


def _possible(sequence: GenerationSequence, tokens: list[int]) -> list[int]:
    """Cut guesses after the end of the text, and before what the grammar refuses."""
    tokens = _to_end(sequence, tokens)
    if sequence.grammar is None or not tokens:
        return tokens
    try:
        return tokens[: sequence.grammar.allowed_prefix(tokens)]
    except HanokError:  # as above
        return []


def _to_end(sequence: GenerationSequence, tokens: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in sequence.end_ids]
    return tokens[: ends[0] + 1] if ends else tokens


class _NgramProposer:
    """Guesses from each text itself, or its grammar; they cost nothing, so all are made and then cut."""

    def __init__(self, gain: Gain) -> None:
        self._gain = gain
        self._indexes: dict[int, NgramIndex] = {}

    def propose(
        self, sequences: Mapping[int, GenerationSequence], limits: Mapping[int, int], size: int
    ) -> dict[int, Draft]:
        """See `Proposer`. If a guess is right, one more token agrees before the next."""
        found: dict[int, Draft] = {}
        for key, limit in limits.items():
            sequence, index = sequences[key], self._indexes.setdefault(key, NgramIndex())
            tokens = _forced(sequence)[:limit]
            kinds = [FORCED] * len(tokens)
            if not tokens:
                guessed, agreeing = index.propose(sequence.token_ids, limit)
                tokens = _possible(sequence, guessed)
                kinds = [kind_of(agreeing + place) for place in range(len(tokens))]
            if tokens:
                found[key] = Draft(tokens=tokens, kinds=kinds)
        kinds_of = {key: item.kinds for key, item in found.items()}
        lengths = self._gain.lengths(kinds_of, size) if found else {}
        return {key: found[key].cut(length) for key, length in lengths.items() if length}

    def forget(self, key: int) -> None:
        """See `Proposer`."""
        self._indexes.pop(key, None)


class _ModelProposer:
    """Guesses of a model; each costs a pass of it, so it is decided first how many are made."""

    def __init__(self, model: DraftModel, gain: Gain) -> None:
        self._model = model
        self._gain = gain
        self._times = PassTimes()

    def propose(
        self, sequences: Mapping[int, GenerationSequence], limits: Mapping[int, int], size: int
    ) -> dict[int, Draft]:
        """See `Proposer`."""
        rooms = {key: min(n, self._model.room(key, sequences[key])) for key, n in limits.items()}
        kinds = {key: draft.kinds_of(count) for key, count in rooms.items() if count}
        depth = self._gain.depth(kinds, size, self._times)
        if not depth:
            return {}
        chosen = self._model.with_slots({key: sequences[key] for key in kinds})
        counts = {key: min(depth, rooms[key]) for key in chosen}
        self._model.catch_up(chosen)
        began = time.perf_counter()
        guessed = self._model.propose(chosen, counts)
        passes = max([1, *map(len, guessed.values())])
        self._times.record(len(chosen), (time.perf_counter() - began) / passes)
        return {
            key: Draft(tokens=tokens, kinds=kinds[key][: len(tokens)])
            for key, tokens in guessed.items()
            if tokens
        }

    def forget(self, key: int) -> None:
        """See `Proposer`."""
        self._model.forget(key)
