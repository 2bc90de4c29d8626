"""What repeated measurements allow to be said: intervals of ratios, by Student's t on logarithms.

Rows of one run are compared round by round: what slowed a whole round down slows both rows, and cancels
in their ratio. Runs are compared without pairs (Welch). Where many comparisons are made, each is asked
for more certainty, so that a whole table holds with `LEVEL` (Bonferroni): of twenty tables of rows that
do not differ, one says "faster" or "slower" somewhere.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.95
Verdict = Literal["faster", "slower", "same"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A ratio, and between what it lies; `high` None: nothing is known of it."""

    value: float
    low: float
    high: float | None

    def excludes(self, low: float, high: float) -> bool:
        """Return whether no value from `low` to `high` is in it."""
        return self.low > high or (self.high is not None and self.high < low)

    @property
    def verdict(self) -> Verdict:
        """What a ratio of speeds says: above 1 is faster."""
        if not self.excludes(1.0, 1.0):
            return "same"
        return "faster" if self.low > 1.0 else "slower"


def level_of_each(comparisons: int) -> float:
    """Return the certainty that each of so many comparisons is asked for."""
    return 1 - (1 - LEVEL) / max(1, comparisons)


def paired_ratio(first: Sequence[float], second: Sequence[float], level: float) -> Interval:
    """Return how many times as long `first` takes as `second`, measured in the same rounds."""
    logs = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    if len(logs) < 2:
        return Interval(value=math.exp(logs[0]), low=0.0, high=None)
    return _interval(
        statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs)), len(logs) - 1, level
    )


def unpaired_ratio(first: Sequence[float], second: Sequence[float], level: float) -> Interval:
    """Return how many times as long `first` takes as `second`, measured apart."""
    logs = [[math.log(value) for value in values] for values in (first, second)]
    value = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    if min(map(len, logs)) < 2:
        return Interval(value=math.exp(value), low=0.0, high=None)
    parts = [statistics.variance(item) / len(item) for item in logs]
    error = math.sqrt(sum(parts))
    if error == 0:
        freedom = min(map(len, logs)) - 1
    else:
        terms = [part**2 / (len(item) - 1) for part, item in zip(parts, logs, strict=True)]
        freedom = max(1, math.floor(sum(parts) ** 2 / sum(terms)))
    return _interval(value, error, freedom, level)


def _interval(mean: float, error: float, freedom: int, level: float) -> Interval:
    reach = t_quantile(level, freedom) * error
    return Interval(
        value=math.exp(mean), low=math.exp(mean - reach), high=math.exp(min(700.0, mean + reach))
    )


def t_quantile(level: float, freedom: int) -> float:
    """Return what the magnitude of Student's t stays below with probability `level`."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < level else (low, middle)
    return high


def t_within(t: float, freedom: int) -> float:
    """Return the probability that Student's t lies between -t and t (Abramowitz and Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, is_odd = math.cos(angle), freedom % 2 == 1
    term = cosine if is_odd else 1.0
    total = 0.0
    for index in range(1 if is_odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (index + 1) / (index + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
