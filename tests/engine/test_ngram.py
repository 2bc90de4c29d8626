"""The index against a plain search through the text, for texts that grow token by token and in leaps."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.engine.ngram import FORCED, MATCHES, PRIORS, NgramIndex, kind_of


def searched(tokens: list[int], count: int) -> tuple[list[int], int]:
    """Look through the whole text for the latest earlier place where its last tokens stand."""
    end = len(tokens)
    for length in (4, 3, 2):
        for place in range(end - 1, length - 1, -1):
            if tokens[place - length : place] == tokens[end - length :]:
                text = [*tokens]
                for number in range(count):
                    text.append(text[place + number])
                agreeing = 0
                while agreeing < min(place, MATCHES[-1]) and (
                    tokens[place - 1 - agreeing] == tokens[end - 1 - agreeing]
                ):
                    agreeing += 1
                return text[end:], agreeing
    return [], 0


@settings(max_examples=400)
@given(
    text=st.lists(st.integers(0, 3), max_size=60),
    leaps=st.lists(st.integers(1, 9), max_size=30),
    count=st.integers(1, 12),
)
def test_it_finds_what_a_search_finds(text: list[int], leaps: list[int], count: int) -> None:
    index, length = NgramIndex(), 0
    for leap in [*leaps, 60]:
        length = min(len(text), length + leap)
        assert index.propose(text[:length], count) == searched(text[:length], count)


def test_a_longer_agreement_wins_over_a_later_one() -> None:
    tokens = [1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]
    assert NgramIndex().propose(tokens, 2) == ([50, 9], 4)


def test_a_period_goes_on() -> None:
    assert NgramIndex().propose([8, 1, 2, 3, 1, 2, 3], 7) == ([1, 2, 3, 1, 2, 3, 1], 3)
    assert NgramIndex().propose([5, 5, 5], 4) == ([5, 5, 5, 5], 2)


def test_large_ids_are_told_apart() -> None:
    tokens = [2**23, 1, 2**22, 7, 0, 2**23 + 1, 2**22, 8, 1, 2**22]
    assert NgramIndex().propose(tokens, 1) == ([7], 2)


def test_kinds_grow_with_the_agreement() -> None:
    kinds = [kind_of(agreeing) for agreeing in range(2, 40)]
    assert kinds == sorted(kinds)
    assert set(kinds) == set(range(FORCED))
    assert len(PRIORS) == FORCED + 1
