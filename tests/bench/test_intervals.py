"""Intervals: Student's t against its density and known tables, and how often intervals are right."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.bench.intervals import (
    Interval,
    level_of_each,
    paired_ratio,
    t_quantile,
    t_within,
    unpaired_ratio,
)


def density(t: float, freedom: int) -> float:
    """Student's t, by its definition."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    return float(
        scale / math.sqrt(freedom * math.pi) * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
    )


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12, 31])
@pytest.mark.parametrize("t", [0.3, 1.0, 2.5, 6.0])
def test_the_probability_is_the_integral_of_the_density(t: float, freedom: int) -> None:
    steps = 4000
    width = 2 * t / steps
    middles = (-t + width * (index + 0.5) for index in range(steps))
    integral = width * sum(density(middle, freedom) for middle in middles)
    assert t_within(t, freedom) == pytest.approx(integral, abs=1e-5)


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    [(0.95, 1, 12.706), (0.95, 4, 2.776), (0.99, 5, 4.032), (0.998, 14, 3.787), (0.95, 200, 1.972)],
)
def test_quantiles_are_those_of_printed_tables(level: float, freedom: int, expected: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(expected, abs=1e-3)


def noisy(draws: random.Random, middle: float, sigma: float, count: int) -> list[float]:
    return [middle * math.exp(draws.gauss(0, sigma)) for _ in range(count)]


def test_intervals_hold_the_true_ratio_as_often_as_they_say() -> None:
    draws, inside, trials = random.Random(1), 0, 600
    for _ in range(trials):
        rounds = noisy(draws, 1.0, 0.2, 5)  # what slows a whole round down
        first = [2.0 * r * n for r, n in zip(rounds, noisy(draws, 1.0, 0.03, 5), strict=True)]
        second = [1.0 * r * n for r, n in zip(rounds, noisy(draws, 1.0, 0.03, 5), strict=True)]
        found = paired_ratio(first, second, 0.9)
        assert found.high is not None
        inside += found.low <= 2.0 <= found.high
        assert found.excludes(1.0, 1.0)  # the noise of rounds cancels
    assert 0.87 <= inside / trials <= 0.93
    # Without pairs the noise of rounds stays.
    draws, inside = random.Random(2), 0
    for _ in range(trials):
        found = unpaired_ratio(noisy(draws, 2.0, 0.1, 6), noisy(draws, 1.0, 0.3, 4), 0.9)
        assert found.high is not None
        inside += found.low <= 2.0 <= found.high
    assert 0.86 <= inside / trials <= 0.95


def test_rows_that_do_not_differ_are_rarely_called_anything() -> None:
    """One table in twenty may say "faster" or "slower" of some row, however many rows it has."""
    draws, wrong, tables, rows = random.Random(3), 0, 300, 20
    level = level_of_each(rows)
    for _ in range(tables):
        first = noisy(draws, 1.0, 0.05, 5)
        verdicts = {
            paired_ratio(first, noisy(draws, 1.0, 0.05, 5), level).verdict for _ in range(rows)
        }
        wrong += verdicts != {"same"}
    assert wrong / tables <= 0.07


def test_one_round_says_nothing() -> None:
    for found in (paired_ratio([4.0], [1.0], 0.95), unpaired_ratio([4.0], [1.0, 1.0], 0.95)):
        assert found.value == pytest.approx(4.0)
        assert (found.low, found.high, found.verdict) == (0.0, None, "same")


def test_verdicts() -> None:
    assert Interval(value=2.0, low=1.5, high=2.5).verdict == "faster"
    assert Interval(value=0.5, low=0.4, high=0.9).verdict == "slower"
    assert Interval(value=1.2, low=0.9, high=1.5).verdict == "same"


@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=9),
    st.floats(0.1, 10),
)
def test_a_ratio_has_no_unit(values: list[float], factor: float) -> None:
    other = [value * 1.5 for value in reversed(values)]
    one = paired_ratio(values, other, 0.95)
    scaled = paired_ratio([v * factor for v in values], [v * factor for v in other], 0.95)
    assert scaled.value == pytest.approx(one.value)
    assert scaled.low == pytest.approx(one.low)
    turned = paired_ratio(other, values, 0.95)
    assert turned.value == pytest.approx(1 / one.value)
    assert one.high is not None
    assert turned.low == pytest.approx(1 / one.high, rel=1e-6)
