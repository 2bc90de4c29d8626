"""Turns, spreads and timers: with scripted contestants and a scripted clock."""

import itertools

import pytest
import torch

from hanok.bench import turns
from hanok.bench.spread import Spread
from hanok.bench.turns import Deadline, Timer, run_plainly, take_turns


def test_each_round_begins_one_contestant_further_on() -> None:
    order: list[str] = []

    def contestant(name: str, value: float) -> float:
        order.append(name)
        return value

    found = take_turns(
        {name: lambda name=name, i=i: contestant(name, i) for i, name in enumerate("abc")},
        rounds=4,
    )
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert found == {"a": [0.0] * 4, "b": [1.0] * 4, "c": [2.0] * 4}


def test_a_round_may_be_repeated_by_the_caller() -> None:
    values = itertools.count()
    found = take_turns({"a": lambda: next(values)}, 2, run_round=lambda one: (one(), one())[1])
    assert found == {"a": [1, 3]}


def test_a_ratio_is_of_medians_and_spreads_over_rounds() -> None:
    # Medians 4 and 2; within rounds 6/2, 4/1, 2/4.
    assert Spread.of_ratio([6.0, 4.0, 2.0], [2.0, 1.0, 4.0]) == Spread(2.0, 0.5, 4.0)
    # The ratio of the medians lies outside of the rounds' ratios: the spread reaches to it.
    ratio = Spread.of_ratio([1.0, 10.0, 20.0], [2.0, 19.0, 1.0])
    assert ratio.low <= ratio.median <= ratio.high
    assert Spread.of([3.0, 1.0, 20.0]) == Spread(3.0, 1.0, 20.0)


def test_short_actions_are_made_until_a_sample_is_long_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    first = [True]

    def action() -> None:
        now[0] += 1.0 if first[0] else 0.003  # the first call also loads and compiles
        first[0] = False

    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    timer = Timer(action=action, device=torch.device("cpu"), min_sample_s=0.02)
    timer.warm_up()
    assert timer.calls == 7
    before = now[0]
    assert timer() == pytest.approx(0.003)
    assert now[0] - before == pytest.approx(7 * 0.003)


@pytest.mark.parametrize(
    ("bound_s", "rounds"), [(None, 5), (100.0, 5), (9.0, 3), (8.9, 2), (-1.0, 1)]
)
def test_rounds_end_before_the_time_does(
    bound_s: float | None, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def contestant() -> float:
        now[0] += 3.0
        return 3.0

    found = take_turns({"a": contestant}, 5, run_plainly, bound_s)
    assert found == {"a": [3.0] * rounds}
    assert take_turns({}, 5, run_plainly, bound_s) == {}


def test_parts_share_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    deadline = Deadline(60.0)
    assert deadline.left_s(3) == 20.0
    now[0] = 10.0  # the first took less
    assert deadline.left_s(2) == 25.0
    assert deadline.left_s() == 50.0
    assert Deadline(None).left_s(3) is None
