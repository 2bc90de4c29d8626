"""The pool of blocks against a plain model of what it promises."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.engine.blocks import BlockPool

SIZE = 4


class Sequences:
    """Sequences over a pool, as a scheduler keeps them."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.held: list[tuple[str, list[int], list[int]]] = []
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}

    def begin(self, root: str, tokens: list[int]) -> None:
        found = self.pool.match(root, tokens)
        # What is found holds exactly these tokens behind exactly these, and one is left to compute.
        assert len(found) * SIZE < len(tokens)
        for index, block in enumerate(found):
            assert self.contents[block] == (root, tuple(tokens[: (index + 1) * SIZE]))
        missing = self.pool.needed(len(tokens)) - len(found)
        if missing > self.pool.num_available:
            self.pool.release(found)
            return
        blocks = found + self.pool.take(missing)
        for index in range(len(found), len(tokens) // SIZE):
            self.contents[blocks[index]] = (root, tuple(tokens[: (index + 1) * SIZE]))
            blocks[index] = self.pool.keep(root, tokens, blocks[: index + 1])
        self.held.append((root, tokens, blocks))

    def end(self, number: int) -> None:
        if self.held:
            self.pool.release(self.held.pop(number % len(self.held))[2])

    def check(self) -> None:
        used = {block for _, _, blocks in self.held for block in blocks}
        assert self.pool.num_used == len(used)
        assert self.pool.num_used + self.pool.num_available == self.pool.num_blocks
        for root, tokens, blocks in self.held:
            for index in range(len(tokens) // SIZE):
                assert self.contents[blocks[index]] == (root, tuple(tokens[: (index + 1) * SIZE]))


steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=22)),
        st.integers(0, 9),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(steps=steps, num_blocks=st.integers(1, 14))
def test_blocks_hold_what_they_are_found_by_and_none_is_lost(
    steps: list[tuple[str, list[int]] | int], num_blocks: int
) -> None:
    sequences = Sequences(BlockPool(num_blocks, SIZE))
    for step in steps:
        if isinstance(step, int):
            sequences.end(step)
        else:
            sequences.begin(*step)
        sequences.check()
    while sequences.held:
        sequences.end(0)
    assert sequences.pool.num_used == 0
    sequences.pool.forget()
    assert sequences.pool.num_cached == 0
    assert sorted(sequences.pool.take(num_blocks)) == list(range(num_blocks))


def test_what_begins_alike_shares_and_another_root_does_not() -> None:
    pool = BlockPool(8, SIZE)
    tokens = list(range(10))
    blocks = pool.take(3)
    for index in range(2):
        blocks[index] = pool.keep("a", tokens, blocks[: index + 1])
    assert pool.match("b", tokens) == []
    assert pool.match("a", [*tokens[:8], 99]) == blocks[:2]
    assert pool.match("a", tokens[:8]) == blocks[:1]  # one token is left to compute
    assert pool.match("a", [7, *tokens]) == []


def test_the_same_computed_twice_becomes_one() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.take(1), pool.take(1)
    assert pool.keep("a", [1, 2, 3, 4], first) == first[0]
    assert pool.keep("a", [1, 2, 3, 4], second) == first[0]
    assert pool.num_used == 1
    pool.release(first)
    assert pool.num_used == 1
    pool.release(first)
    assert (pool.num_used, pool.num_cached) == (0, 1)


def test_what_was_used_last_is_evicted_last() -> None:
    pool = BlockPool(3, SIZE)
    held = [pool.take(1) for _ in range(3)]
    for number, blocks in enumerate(held):
        pool.keep("a", [number] * SIZE, blocks)
    for number in (1, 0, 2):
        pool.release(held[number])
    pool.take(1)
    found = [bool(pool.match("a", [number] * (SIZE + 1))) for number in range(3)]
    assert found == [True, False, True]


def test_taking_too_much_and_releasing_twice_are_faults() -> None:
    pool = BlockPool(2, SIZE)
    with pytest.raises(ValueError, match="3 blocks are wanted and 2 can be had"):
        pool.take(3)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="is not in use"):
        pool.release(blocks)


def test_an_evicted_block_has_no_heirs() -> None:
    rng = random.Random(0)
    pool = BlockPool(2, SIZE)
    tokens = [rng.randrange(9) for _ in range(2 * SIZE)]
    blocks = pool.take(2)
    blocks[0] = pool.keep("a", tokens, blocks[:1])
    blocks[1] = pool.keep("a", tokens, blocks)
    pool.release(blocks[1:])
    pool.release(blocks[:1])  # out of order: the parent is idle behind its child
    other = pool.take(2)
    pool.release(other)
    assert pool.match("a", [*tokens, 1]) == []
