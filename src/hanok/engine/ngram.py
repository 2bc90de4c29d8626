"""Guesses the next tokens from the text so far: what followed when its last tokens stood there before.

Free of cost but for a look-up, and right wherever a text repeats itself: summaries, edits of code,
answers that quote their question (prompt lookup decoding).
"""

from collections.abc import Sequence

LONGEST_KEY = 4  # tokens that are looked for, then one fewer, down to
SHORTEST_KEY = 2
ID_BITS = 24  # of a token id in a key
# How far back the text is compared, and the kinds of guesses by how many tokens before them agree.
MATCHES = (3, 4, 6, 10, 16)
FORCED = len(MATCHES) + 1  # the kind of what a grammar leaves no choice about
PRIORS = (0.3, 0.4, 0.6, 0.8, 0.9, 0.95, 0.95)


class NgramIndex:
    """Where each run of 2 to 4 tokens of one growing text occurred last."""

    def __init__(self) -> None:
        self._places: list[dict[int, int]] = [{} for _ in range(SHORTEST_KEY, LONGEST_KEY + 1)]
        self._masks = [(1 << ID_BITS * n) - 1 for n in range(SHORTEST_KEY, LONGEST_KEY + 1)]
        self._key = 0
        self._done = 0

    def propose(self, tokens: Sequence[int], count: int) -> tuple[list[int], int]:
        """Return `count` tokens that may follow, or none, and how many before them agree.

        They are those after the latest earlier occurrence of the last 4 tokens, else the last 3, else 2.
        If that text runs into the end, it continues with what was just proposed. The
        tokens must begin with those of the last call.
        """
        self._read(tokens)
        end = len(tokens)
        if end <= SHORTEST_KEY:
            return [], 0
        key = self._key << ID_BITS | tokens[-1]
        for length in range(LONGEST_KEY, SHORTEST_KEY - 1, -1):
            index = length - SHORTEST_KEY
            place = self._places[index].get(key & self._masks[index]) if length < end else None
            if place is not None:
                period = end - place
                found = list(tokens[place : place + count])
                while len(found) < count:
                    found.append(found[len(found) - period])
                return found, _agreeing(tokens, place)
        return [], 0

    def _read(self, tokens: Sequence[int]) -> None:
        """Take in all tokens but the last, whose runs are what is looked for."""
        key, (pairs, triples, quads) = self._key, self._places
        pair_mask, triple_mask, quad_mask = self._masks
        start, stop = self._done, len(tokens) - 1
        for place, token in enumerate(tokens[start:stop], start + 1):
            key = (key << ID_BITS | token) & quad_mask
            # The first tokens have no three before them.
            if place >= LONGEST_KEY:
                quads[key] = place
            if place > SHORTEST_KEY:
                triples[key & triple_mask] = place
            if place >= SHORTEST_KEY:
                pairs[key & pair_mask] = place
        self._key, self._done = key, max(stop, start)


def kind_of(agreeing: int) -> int:
    """Return the kind of a guess after so many tokens that agree."""
    return next((kind for kind, most in enumerate(MATCHES) if agreeing < most), len(MATCHES))


def _agreeing(tokens: Sequence[int], place: int) -> int:
    """Return how many tokens before `place` are those at the end, up to the most that matter."""
    most = min(MATCHES[-1], place)
    return next((n for n in range(most) if tokens[place - 1 - n] != tokens[-1 - n]), most)
