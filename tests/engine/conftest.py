"""What tests of speculation share."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from hanok.engine.gain import Gain, PassTimes


class AnyLength(Gain):
    """Checks some of the guesses, so that a test does not depend on how fast this machine is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.random = random.Random(7)

    def lengths(self, guesses: Mapping[int, Sequence[int]], size: int) -> dict[int, int]:
        return {key: self.random.randint(0, len(kinds)) for key, kinds in guesses.items()}

    def depth(self, guesses: Mapping[int, Sequence[int]], size: int, times: PassTimes) -> int:
        return self.random.randint(0, self.most_drafted) if guesses else 0


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanok.engine.speculate.Gain", AnyLength)
