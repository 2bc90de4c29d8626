"""The number of drafts on simulated passes and texts: near the best fixed one, off where none pays."""

import random
from collections.abc import Callable, Sequence

import pytest

from hanok.engine.gain import LADDER, Gain, PassTimes

Cost = Callable[[int], float]


def flat(size: int) -> float:
    """Reading weights takes most of a pass, up to a size where computing does."""
    return max(1.0 + 0.03 * (size - 1), 0.12 * size)


def steep(size: int) -> float:
    """Each token costs nearly what the first does: there is nothing to gain."""
    return 0.1 + 0.9 * size


def stepped(size: int) -> float:
    """Up to 8 tokens nearly free, beyond them another kernel."""
    return 1.0 + 0.02 * size if size <= 8 else 2.4 + 0.03 * size


def rate_of(
    chance: float, cost: Cost, lengths: Callable[[int], int], learn: Callable[..., None], seed: int
) -> float:
    """Return the tokens per second of a text whose guesses are right with a chance."""
    chooser, tokens, seconds = random.Random(seed), 0, 0.0
    while tokens < 4000:
        length = lengths(tokens)
        right = 0
        while right < length and chooser.random() < chance:
            right += 1
        took = cost(1 + length)
        seconds += took
        tokens += 1 + right
        learn(length, right, took * chooser.uniform(0.95, 1.1))
    return tokens / seconds


def adapted(chance: float, cost: Cost, *, most: int = 15) -> float:
    gain = Gain((0.5,), most_drafted=most)

    def lengths(_: int) -> int:
        return gain.lengths({0: [0] * most}, 1)[0]

    def learn(length: int, right: int, took: float) -> None:
        gain.times.record(1 + length, took)
        if length:
            gain.learn(0, [0] * length, right, has_ended=False)

    return rate_of(chance, cost, lengths, learn, seed=5)


def fixed(chance: float, cost: Cost, length: int) -> float:
    return rate_of(chance, cost, lambda _: length, lambda *_: None, seed=6)


@pytest.mark.parametrize("cost", [flat, steep, stepped])
@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 0.7, 0.9, 0.98])
def test_as_fast_as_the_best_fixed_number(chance: float, cost: Cost) -> None:
    best = max(fixed(chance, cost, length) for length in (0, *LADDER[:7]))
    assert adapted(chance, cost) > 0.94 * best


@pytest.mark.parametrize("cost", [flat, steep, stepped])
def test_where_no_guess_is_right_trying_costs_little(cost: Cost) -> None:
    assert adapted(0.0, cost) > 0.97 * fixed(0.0, cost, 0)


def test_where_a_text_begins_to_repeat_it_is_noticed() -> None:
    gain = Gain((0.5,), most_drafted=15)
    chooser, drafted, right_of = random.Random(1), [], []
    for step in range(1200):
        chance = 0.0 if step < 800 else 0.95
        length = gain.lengths({0: [0] * 15}, 1)[0]
        right = 0
        while right < length and chooser.random() < chance:
            right += 1
        gain.times.record(1 + length, flat(1 + length))
        if length:
            gain.learn(0, [0] * length, right, has_ended=False)
        drafted.append(length)
        right_of.append(right)
    assert sum(drafted[500:800]) <= 4
    # A try comes within the longest pause, and then it goes on.
    assert sum(right_of[1060:]) > 7 * len(right_of[1060:])


def test_kinds_of_guesses_are_told_apart() -> None:
    """Those of one kind are right, those of the other never; what others learned serves the next."""
    gain = Gain((0.5, 0.5), most_drafted=7)
    for _ in range(60):
        for key, kind in ((0, 0), (1, 1)):
            length = gain.lengths({key: [kind] * 7}, 1)[key]
            gain.times.record(1 + length, flat(1 + length))
            if length:
                gain.learn(key, [kind] * length, length * (kind == 0), has_ended=False)
    assert gain.lengths({7: [0] * 7}, 1) == {7: 7}
    assert gain.lengths({8: [1] * 7}, 1)[8] <= 1


def test_many_sequences_leave_nothing_to_gain() -> None:
    def drafted(size: int, cost: Cost) -> int:
        gain, chooser = Gain((0.6,), most_drafted=7), random.Random(2)
        total = 0
        for step in range(300):
            lengths = gain.lengths(dict.fromkeys(range(size), [0] * 7), size)
            count = sum(lengths.values())
            gain.times.record(size + count, cost(size + count))
            for key, length in lengths.items():
                right = 0
                while right < length and chooser.random() < 0.6:
                    right += 1
                if length:
                    gain.learn(key, [0] * length, right, has_ended=False)
            total += count if step >= 200 else 0
        return total

    def linear_from_eight(size: int) -> float:
        return max(8.0, float(size))

    assert drafted(2, linear_from_eight) >= 100 * 4
    assert drafted(12, linear_from_eight) < 100


def test_the_likelier_guesses_of_several_sequences_come_first() -> None:
    gain = Gain((0.9, 0.2), most_drafted=7, most_tokens=8)
    for _ in range(3):
        gain.times.record(2, 1.0)
    for _ in range(3):
        gain.times.record(8, 1.1)
    assert gain.lengths({0: [1] * 7, 1: [0] * 7}, 2) == {0: 0, 1: 5}


def test_no_pass_is_larger_than_allowed_or_than_double_the_largest_measured() -> None:
    gain = Gain((0.99,), most_drafted=15, most_tokens=8)
    assert gain.lengths({0: [0] * 15}, 1) == {0: 0}  # nothing is measured
    sizes = []
    for _ in range(12):
        size = 1 + gain.lengths({0: [0] * 15}, 1)[0]
        gain.times.record(size, 1.0)
        gain.learn(0, [0] * (size - 1), size - 1, has_ended=False)
        sizes.append(size)
    assert sizes[:6] == [1, 1, 1, 2, 4, 8]
    assert max(sizes) == 8
    assert gain.lengths(dict.fromkeys(range(8), [0] * 15), 8) == dict.fromkeys(range(8), 0)


def depths(chance: float, cost: Cost, draft_s: float, *, most: int = 7) -> list[int]:
    gain, own, chooser = Gain((0.7,), most_drafted=most), PassTimes(), random.Random(3)
    found = []
    for _ in range(1500):
        depth = gain.depth({0: [0] * most}, 1, own)
        right = 0
        while right < depth and chooser.random() < chance:
            right += 1
        if depth:
            own.record(1, draft_s)
            gain.learn(0, [0] * depth, right, has_ended=False)
        gain.times.record(1 + depth, cost(1 + depth))
        found.append(depth)
    return found


@pytest.mark.parametrize(("chance", "draft_s"), [(0.8, 0.05), (0.6, 0.15), (0.9, 0.3), (0.8, 1.2)])
def test_a_draft_models_own_time_counts(chance: float, draft_s: float) -> None:
    def rate(length: int) -> float:
        expected = sum(chance**place for place in range(length + 1))
        return expected / (flat(1 + length) + length * draft_s)

    found = depths(chance, flat, draft_s)[300:]
    reached = len(found) / sum(1 / rate(depth) for depth in found)  # by time, not exact
    assert reached > 0.93 * max(map(rate, range(8)))
    if draft_s > 1:
        assert sum(found) < 0.02 * len(found)


def test_times_of_sizes_between_and_beyond_are_estimated() -> None:
    times = PassTimes()
    for size, seconds in ((1, 2.0), (9, 6.0)):
        for _ in range(3):
            times.record(size, seconds)
    assert times.of(5) == pytest.approx(4.0)
    assert times.of(16) > 6.0
    assert not times.is_known(5)


def test_the_first_passes_of_a_size_and_disturbed_ones_are_not_believed() -> None:
    times = PassTimes()
    for seconds in (9.0, 5.0, 1.0):
        times.record(4, seconds)
    assert times.of(4) == 1.0
    times.record(4, 100.0)
    assert times.of(4) < 1.2
    settle: Sequence[float] = [1.5] * 60
    for seconds in settle:
        times.record(4, seconds)
    assert times.of(4) == pytest.approx(1.5, rel=0.01)
