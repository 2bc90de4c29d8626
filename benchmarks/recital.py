"""Makes a model of random weights say a given text, so that guesses meet text as people write it.

A recited answer replaces what the model would choose, token for token: each pass costs what it costs,
and a guess is right exactly when it is the answer's next token. Any guess may be checked, wrong ones
too. The texts are our own (benchmarks/corpus): `repeating` answers quote or edit their prompts, `new`
ones share next to nothing with theirs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hanok.checkpoint.tokenizer import open_tokenizer

CORPUS = Path(__file__).parent / "corpus"
KINDS = ("repeating", "new")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One prompt and the answer that is recited, as token ids."""

    name: str
    prompt: list[int]
    answer: list[int]


def pieces(kind: str, tokenizer_folder: Path) -> list[Piece]:
    """Return the texts of one kind in a tokenizer's tokens."""
    tokenizer = open_tokenizer(tokenizer_folder)
    found = json.loads((CORPUS / f"{kind}.json").read_text(encoding="utf-8"))
    return [
        Piece(
            name=item["name"],
            prompt=tokenizer.encode(item["prompt"] + "\n\n"),
            answer=tokenizer.encode(item["answer"], add_special_tokens=False),
        )
        for item in found
    ]


class Recital:
    """Lets the answer's next token follow and no other (`hanok.engine.sequence.Mask`)."""

    def __init__(self, answer: Sequence[int]) -> None:
        self._answer = answer
        self._place = 0

    def mask(self, scores: Tensor) -> Tensor:
        """Return the scores with all tokens but the next at -inf; behind the end, as they are."""
        if self._place >= len(self._answer):
            return scores
        token = self._answer[self._place]
        forced = torch.full_like(scores, float("-inf"))
        forced[token] = scores[token]
        return forced

    def accept(self, token_id: int) -> None:
        """Go on behind a token."""
        self._place += 1

    def allowed_prefix(self, token_ids: Sequence[int]) -> int:
        """Return that all guesses may be checked: a wrong one has to cost what it costs."""
        return len(token_ids)

    def forced(self) -> list[int]:
        """Return nothing: what comes next has to be guessed."""
        return []

    def rollback(self, num_tokens: int) -> None:
        """Go back before the last tokens."""
        self._place -= num_tokens
