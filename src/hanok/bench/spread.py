"""Median and extremes of what was measured several times, and ratios of two such. Imports no torch."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    @classmethod
    def of_ratio(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Spread":
        """Return the ratio of the medians, with the smallest and the largest within one round."""
        pairs = [first / second for first, second in zip(numerators, denominators, strict=True)]
        middle = statistics.median(numerators) / statistics.median(denominators)
        return cls(middle, min(middle, *pairs), max(middle, *pairs))

    def __str__(self) -> str:
        if self.low == self.high:
            return rounded(self.median)
        return f"{rounded(self.median)} ({rounded(self.low)}–{rounded(self.high)})"


def rounded(value: float) -> str:
    """Return three significant digits, and no digit of a whole number less."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
