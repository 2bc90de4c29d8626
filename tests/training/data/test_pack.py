"""Packing: nothing is lost or split, no pack is too large, and the order is a function of the seed."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.training.data.pack import pack, pack_epoch, shuffled, take_times

LENGTHS = st.lists(st.integers(1, 64), max_size=80)


def packed_naively(lengths: list[int], size: int) -> list[int]:
    """The tokens of each pack of best-fit decreasing, by looking at every pack each time."""
    tokens: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i in range(len(tokens)) if tokens[i] + length <= size]
        if fitting:
            tokens[max(fitting, key=tokens.__getitem__)] += length
        else:
            tokens.append(length)
    return tokens


def first_fit(lengths: list[int], size: int) -> int:
    tokens: list[int] = []
    for length in lengths:
        place = next((i for i, used in enumerate(tokens) if used + length <= size), None)
        if place is None:
            tokens.append(length)
        else:
            tokens[place] += length
    return len(tokens)


@given(LENGTHS, st.integers(64, 200), st.integers(0, 5), st.integers(0, 3))
def test_nothing_is_lost_or_split_and_no_pack_is_too_large(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    packs = pack_epoch(lengths, size, range(len(lengths)), seed, epoch)
    assert sorted(index for found in packs for index in found) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in found) for found in packs]
    assert all(0 < count <= size for count in tokens)
    assert sorted(tokens) == sorted(packed_naively(lengths, size))
    # Two packs that are half empty would have been one.
    assert sum(2 * count <= size for count in tokens) <= 1


@given(LENGTHS, st.integers(64, 200), st.integers(0, 5))
def test_the_largest_pack_is_first(lengths: list[int], size: int, seed: int) -> None:
    packs = pack_epoch(lengths, size, range(len(lengths)), seed, 0)
    sizes = [(sum(lengths[i] for i in found), max(lengths[i] for i in found)) for found in packs]
    assert sizes[:1] == sorted(sizes, reverse=True)[:1]


@given(LENGTHS, st.integers(0, 5), st.integers(0, 3))
def test_the_order_is_reproducible(lengths: list[int], seed: int, epoch: int) -> None:
    order = range(len(lengths))
    assert pack_epoch(lengths, 64, order, seed, epoch) == pack_epoch(
        lengths, 64, order, seed, epoch
    )


def test_seed_and_epoch_change_the_order() -> None:
    lengths = [Random(3).randint(1, 64) for _ in range(300)]
    found = [pack_epoch(lengths, 64, range(300), *at) for at in ((0, 0), (0, 1), (1, 0))]
    assert found[0] != found[1] != found[2] != found[0]


def test_the_order_is_the_same_in_every_version() -> None:
    assert shuffled(list(range(8)), "0/0/documents") == [2, 3, 5, 6, 0, 4, 1, 7]


@pytest.mark.parametrize("spread", [0.3, 0.8, 1.5])
def test_fewer_packs_than_first_fit(spread: float) -> None:
    """On lengths as texts have them; of chosen lengths first fit may be the better one."""
    numbers = Random(7)
    for size in (512, 2048):
        lengths = [min(size, max(1, int(numbers.lognormvariate(5, spread)))) for _ in range(2000)]
        packs = pack_epoch(lengths, size, range(2000), 0, 0)
        assert len(packs) <= first_fit(lengths, size)
        assert sum(lengths) / (len(packs) * size) > 0.97


def test_a_document_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="document 1 has 65 tokens, a pack 64"):
        pack([3, 65], 64, [0, 1])


@given(st.integers(1, 40), st.integers(0, 5))
def test_a_fraction_takes_each_document_once_in_several_epochs(count: int, seed: int) -> None:
    indices = range(100, 100 + 4 * count)
    found = Counter(i for epoch in range(4) for i in take_times(indices, 0.25, seed, epoch))
    assert found == Counter(indices)


def test_whole_times_repeat() -> None:
    assert Counter(take_times([4, 7], 2.5, 0, 0)).most_common()[0][1] == 3
    assert len(take_times([4, 7], 2.5, 0, 0)) == 5
    assert take_times([], 0.5, 0, 0) == []
