"""Guesses the next tokens with a smaller model of the same vocabulary."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hanok.engine.passes import Passes
from hanok.engine.sequence import GenerationSequence, LookAhead, totals_and_likeliest
from hanok.errors import OptionError
from hanok.models.decoder import Decoder

if TYPE_CHECKING:
    from hanok.checkpoint.files import Checkpoint
    from hanok.checkpoint.tokenizer import Tokenizer

# Chances of a guess, by how many were made before it, all of them right.
PRIORS = (0.7, 0.7, 0.7, 0.7)


class DraftSource(Protocol):
    """What speculation asks of a model, the one that drafts or the other: a `hanok.Model` has it."""

    decoder: Decoder
    checkpoint: "Checkpoint"
    tokenizer: "Tokenizer | None"

    def check_head(self) -> None:
        """Raise OptionError for a model that generates no tokens."""


def kinds_of(count: int) -> list[int]:
    """Return the kinds of so many guesses."""
    return [min(place, len(PRIORS) - 1) for place in range(count)]


def check_vocabularies(model: DraftSource, draft: DraftSource) -> None:
    """Raise OptionError unless every token id means the same text to both models."""
    names = f"{draft.checkpoint.folder} cannot draft for {model.checkpoint.folder}"
    help_text = "Choose a draft model of the same family, or speculate with n-grams."
    mine, other = model.tokenizer, draft.tokenizer
    if mine is None or other is None:
        if mine is not other:
            lacking = draft if other is None else model
            raise OptionError(
                f"{names}: {lacking.checkpoint.folder} has no tokenizer, so nothing says that token "
                "ids mean the same to both. Add the tokenizer's files to the folder."
            )
        sizes = [item.decoder.config.vocab_size for item in (draft, model)]
        if sizes[0] != sizes[1]:
            raise OptionError(
                f"{names}: the vocabularies have {sizes[0]} and {sizes[1]} tokens. {help_text}"
            )
        return
    wrong = mine.first_difference(other)
    if wrong is not None:
        raise OptionError(
            f"{names}: their vocabularies differ, first at token {wrong}, which is "
            f"{other.spelling(wrong)!r} to the draft model and {mine.spelling(wrong)!r} to the other "
            f"({other.vocab_size} and {mine.vocab_size} tokens). {help_text}"
        )


@dataclass(slots=True)
class _Slot:
    """What a row of the draft model's cache holds."""

    number: int
    sequence: GenerationSequence | None = None
    held: list[int] = field(default_factory=list)
    """The tokens whose keys and values are there."""
    num_checked: int = 0
    """Of these, the first ones that are known to be the sequence's."""


class DraftModel:
    """A decoder that drafts, with its own cache for up to `num_slots` sequences.

    `vocab_size` is that of the model it drafts for.
    """

    def __init__(
        self, decoder: Decoder, *, num_slots: int, max_tokens: int, vocab_size: int
    ) -> None:
        config = decoder.config
        most = min(max_tokens, config.max_context_tokens)
        while most > 1 and not config.shares_angles(1, most):
            most //= 2
        self.max_tokens = most
        """Length of a sequence beyond which it drafts nothing: its context, or where angles change."""
        self._decoder = decoder
        self._vocab_size = vocab_size
        self._cache = decoder.new_cache(num_slots, self.max_tokens)
        self._passes = Passes(decoder, self._cache)
        self._version = self._passes.weights.number()
        self._free = [_Slot(number) for number in reversed(range(num_slots))]
        self._slots: dict[int, _Slot] = {}

    def room(self, key: int, sequence: GenerationSequence) -> int:
        """Return how many tokens it can draft for a sequence."""
        if key not in self._slots and not self._free:
            return 0
        num_rows = self._decoder.config.vocab_size
        if num_rows < self._vocab_size and max(sequence.token_ids) >= num_rows:
            return 0  # a row of padding, which this model's embedding does not have
        return max(0, self.max_tokens - len(sequence.token_ids))

    def with_slots(
        self, sequences: Mapping[int, GenerationSequence]
    ) -> dict[int, GenerationSequence]:
        """Return those of some sequences that have a row, or can be given one."""
        found: dict[int, GenerationSequence] = {}
        num_free = len(self._free)
        for key, sequence in sequences.items():
            if key in self._slots or num_free:
                num_free -= key not in self._slots
                found[key] = sequence
        return found

    def forget(self, key: int) -> None:
        """Give a sequence's row to another one."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._free.append(slot)

    @torch.inference_mode()
    def catch_up(self, sequences: Mapping[int, GenerationSequence]) -> None:
        """Compute what it has not seen of some sequences, all but the last tokens.

        After a pass with drafts there is nothing to do; this is for prompts, and for what was
        generated while nothing was drafted, or before this model's weights changed.
        """
        before, self._version = self._version, self._passes.weights.number()
        if self._version != before:
            for slot in (*self._slots.values(), *self._free):
                slot.held, slot.num_checked = [], 0
        for key, sequence in sequences.items():
            slot = self._slot(key, sequence)
            missing = sequence.token_ids[len(slot.held) : -1]
            if len(missing) > 1:
                self._passes.prefill({slot.number: missing})
                slot.held += missing

    @torch.inference_mode()
    def propose(
        self, sequences: Mapping[int, GenerationSequence], counts: Mapping[int, int]
    ) -> dict[int, list[int]]:
        """Return the next tokens of each sequence as this model sees them, up to `counts` of each.

        Where tokens are drawn it draws with the numbers that the sequence will draw with: the same
        number gives the same token wherever the two models agree about the distribution. What a grammar
        refuses is not drawn.
        """
        ahead = {
            key: LookAhead(sequence)
            for key, sequence in sequences.items()
            if not sequence.is_greedy
        }
        try:
            return self._ahead(sequences, counts, ahead)
        finally:
            for item in ahead.values():
                item.close()

    def _ahead(
        self,
        sequences: Mapping[int, GenerationSequence],
        counts: Mapping[int, int],
        ahead: Mapping[int, LookAhead],
    ) -> dict[int, list[int]]:
        slots = {key: self._slot(key, sequence) for key, sequence in sequences.items()}
        missing = {
            key: sequence.token_ids[len(slots[key].held) :] for key, sequence in sequences.items()
        }
        drafts: dict[int, list[int]] = {key: [] for key in sequences}
        while missing:
            tokens = list(missing.values())
            logits = self._passes.step(tokens, [slots[key].number for key in missing])
            rows = self._last_rows(logits, tokens)
            likeliest: list[int] = totals_and_likeliest(rows)[1].tolist()
            following: dict[int, list[int]] = {}
            for row, (key, new) in enumerate(missing.items()):
                slots[key].held += new
                token = ahead[key].choose(rows[row]) if key in ahead else likeliest[row]
                if token is None:
                    continue
                drafts[key].append(token)
                if len(drafts[key]) < counts[key] and token not in sequences[key].end_ids:
                    following[key] = [token]
            missing = following
        return drafts

    def _last_rows(self, logits: Tensor, tokens: list[list[int]]) -> Tensor:
        """Return the scores after each sequence's last token, of the other model's tokens."""
        if any(len(item) > 1 for item in tokens):
            ends = torch.tensor([len(item) for item in tokens]).cumsum(0) - 1
            logits = logits[ends.to(logits.device)]
        missing = self._vocab_size - logits.shape[1]
        if missing > 0:
            return F.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self._vocab_size]

    def _slot(self, key: int, sequence: GenerationSequence) -> _Slot:
        """Return a sequence's row; of what it holds, what is not the sequence's is dropped."""
        if key not in self._slots:
            self._slots[key] = self._free.pop()
        slot = self._slots[key]
        if slot.sequence is not sequence:
            slot.sequence, slot.num_checked = sequence, 0
        # At least the last token is computed again: its logits are needed.
        end = min(len(slot.held), len(sequence.token_ids) - 1)
        while slot.num_checked < end:
            if slot.held[slot.num_checked] != sequence.token_ids[slot.num_checked]:
                break
            slot.num_checked += 1
        del slot.held[slot.num_checked :]
        self._cache.truncate(slot.number, slot.num_checked)
        return slot
