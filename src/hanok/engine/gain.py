"""How many tokens are worth drafting: what they may save against what checking them takes. Pure.

A pass over a few tokens takes little longer than one over a single token, up to a size that depends on
the machine and the model. Both sides are measured while text is generated: how often a guess of a kind
was right, and how long passes of each size took. Of k drafts the expected number that is accepted is
the sum of the chances that all of the first j are right; the best k gives the most tokens per second.
When none pays, one token is still tried now and then, less and less often, for text changes. Times are
fed in, no clock is read: they decide how fast a text comes, never what it says.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

# Numbers of drafted tokens to choose from: few, because each makes a pass that is recorded for itself
# (engine/native_steps.py), and such that with the token before them they fill the kernels' tiles.
LADDER = (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63, 95, 127, 191, 255)
GROWTH = 0.05  # of a pass for each further token, where nothing is known
SMOOTHING = 0.15  # weight of the newest time
LONGEST = 2.0  # times what is expected; what took longer was disturbed
WARM = 3  # passes of a size until its time counts: the first ones are made in Python, or recorded
STALE = 400  # passes after which a time must be confirmed
KEPT = 0.98  # of what was counted, at each new guess
OWN_WEIGHT, SHARED_WEIGHT = 2.0, 2.0  # guesses that what is known before counts for
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # passes between two tries
DOUBTED = 0.4  # a chance; a guess that was right in spite of it is news
TOGETHER = -1  # whose pause is that of all sequences


@dataclass(slots=True)
class _Time:
    seconds: float
    count: int
    last: int


class PassTimes:
    """How long passes take, by the number of tokens in them."""

    def __init__(self) -> None:
        self._times: dict[int, _Time] = {}
        self._sizes: list[int] = []
        self._passes = 0

    @property
    def largest(self) -> int:
        """The largest size that was measured."""
        return self._sizes[-1] if self._sizes else 0

    def record(self, size: int, seconds: float) -> None:
        """Learn from a pass."""
        self._passes += 1
        size = _rounded(size)
        known = self._times.get(size)
        if known is None:
            insort(self._sizes, size)
            self._times[size] = _Time(seconds, 1, self._passes)
            return
        if known.count < WARM:
            known.seconds = min(known.seconds, seconds)
        else:
            known.seconds += SMOOTHING * (min(seconds, LONGEST * known.seconds) - known.seconds)
        known.count += 1
        known.last = self._passes

    def is_known(self, size: int) -> bool:
        """Return whether enough passes of a size were timed lately."""
        known = self._times.get(_rounded(size))
        return known is not None and self._is_settled(known)

    def of(self, size: int) -> float:
        """Return the seconds of a pass; in an arbitrary unit while nothing was timed.

        What was not timed enough is taken for the better of that time and what its neighbours say, so
        that it is tried.
        """
        size = _rounded(size)
        settled = [item for item in self._sizes if self._is_settled(self._times[item])]
        known = self._times.get(size)
        if known is not None and self._is_settled(known):
            return known.seconds
        expected = self._between(settled or self._sizes, size)
        return expected if known is None else min(expected, known.seconds)

    def _is_settled(self, time: _Time) -> bool:
        return time.count >= WARM and self._passes - time.last < STALE

    def _between(self, sizes: Sequence[int], size: int) -> float:
        if not sizes:
            return _growth(size)
        place = bisect_left(sizes, size)
        if place in (0, len(sizes)):
            nearest = sizes[min(place, len(sizes) - 1)]
            return self._times[nearest].seconds * _growth(size) / _growth(nearest)
        low, high = sizes[place - 1], sizes[place]
        first, second = self._times[low].seconds, self._times[high].seconds
        return first + (second - first) * (size - low) / (high - low)


def _growth(size: int) -> float:
    return 1 + GROWTH * (size - 1)


def _rounded(size: int) -> int:
    """Return the size that a pass is counted under: passes of many tokens share one."""
    step = 1 if size <= 16 else 4 if size <= 64 else 16
    return -(-size // step) * step


@dataclass(slots=True)
class _Counts:
    right: float = 0.0
    tried: float = 0.0

    def add(self, *, is_right: bool) -> None:
        self.right = KEPT * self.right + is_right
        self.tried = KEPT * self.tried + 1

    def chance(self, before: float, weight: float) -> float:
        return (self.right + weight * before) / (self.tried + weight)


@dataclass(slots=True)
class _Pause:
    length: int = FIRST_PAUSE
    waited: int = 0


class Gain:
    """What was learned of the guesses of some sequences, and of the passes that check them.

    `priors` are the chances of each kind of guess before anything is known, `most_drafted` the tokens
    drafted for a sequence at the most. A pass with drafts has at most `most_tokens` tokens, if given.
    """

    def __init__(
        self, priors: Sequence[float], *, most_drafted: int, most_tokens: int | None = None
    ) -> None:
        self.times = PassTimes()
        self.most_drafted = most_drafted
        self._priors = priors
        self._most_tokens = most_tokens
        self._shared = [_Counts() for _ in priors]
        self._own: dict[int, dict[int, _Counts]] = {}
        self._pauses: dict[int, _Pause] = {}

    def lengths(self, guesses: Mapping[int, Sequence[int]], size: int) -> dict[int, int]:
        """Return how many guesses of each sequence to check in a pass over `size` sequences.

        `guesses` has the kind of each guess, for the sequences that have any.
        """
        chosen = dict.fromkeys(guesses, 0)
        if not self._may_draft(size):
            return chosen
        items = [
            (chance, key)
            for key, kinds in guesses.items()
            for chance in self._chances(key, kinds[: self.most_drafted])
        ]
        if len(guesses) > 1:
            items.sort(key=lambda item: -item[0])  # stable: a sequence's stay in order
        expected = [0.0, *accumulate(chance for chance, _ in items)]
        best, count = size / self.times.of(size), 0
        for number in self._ladder(min(len(items), self._room(size))):
            rate = (size + expected[number]) / self.times.of(size + number)
            if rate > best:
                best, count = rate, number
        for _, key in items[:count]:
            chosen[key] += 1
        late = [key for key, number in chosen.items() if self._is_due(key, number)]
        if late and count < self._room(size):
            self._wait_longer(late[0])
            chosen[late[0]] = 1
        return chosen

    def depth(self, guesses: Mapping[int, Sequence[int]], size: int, times: PassTimes) -> int:
        """Return how many guesses of each sequence to make, where each takes a pass of a draft model.

        `times` are those of its passes.
        """
        room = self._room(size)
        if not self._may_draft(size) or not 0 < len(guesses) <= room:
            return 0
        chances = {name: self._chances(name, kinds) for name, kinds in guesses.items()}
        pass_s = times.of(len(guesses)) if times.largest else 0.0
        best, depth = size / self.times.of(size), 0
        for number in self._ladder(min(self.most_drafted, max(map(len, guesses.values())))):
            kept = [found[:number] for found in chances.values()]
            total = sum(map(len, kept))
            if total > room:
                break
            rate = (size + sum(map(sum, kept))) / (self.times.of(size + total) + number * pass_s)
            if rate > best:
                best, depth = rate, number
        if self._is_due(TOGETHER, depth):
            self._wait_longer(TOGETHER)
            return 1
        return depth

    def learn(self, key: int, kinds: Sequence[int], num_right: int, *, has_ended: bool) -> None:
        """Count a sequence's checked guesses; where it `has_ended` with the last right one, no more."""
        if not kinds:
            return
        was_doubted = self._chances(key, kinds[:1])[0] < DOUBTED
        own = self._own.setdefault(key, {})
        num_tried = num_right if has_ended else min(num_right + 1, len(kinds))
        for place, kind in enumerate(kinds[:num_tried]):
            for counts in (self._shared[kind], own.setdefault(kind, _Counts())):
                counts.add(is_right=place < num_right)
        if num_right and was_doubted:  # perhaps the text has changed: try again at once
            self._pauses |= {
                name: _Pause(waited=FIRST_PAUSE) for name in (key, TOGETHER) if name in self._pauses
            }

    def forget(self, key: int) -> None:
        """Drop what is known of a sequence that has ended."""
        self._own.pop(key, None)
        self._pauses.pop(key, None)

    def _may_draft(self, size: int) -> bool:
        """Without the time of a pass without drafts, their gain is unknown."""
        return self._room(size) > 0 and self.times.is_known(size)

    def _room(self, size: int) -> int:
        """Return how many drafts a pass may have; it is at most twice as large as any before."""
        most = 2 * max(size, self.times.largest)
        return (most if self._most_tokens is None else min(most, self._most_tokens)) - size

    def _ladder(self, most: int) -> list[int]:
        return [number for number in LADDER if number <= most]

    def _chances(self, key: int, kinds: Sequence[int]) -> list[float]:
        """Return for each guess the chance that it and all before it are right."""
        own = self._own.get(key, {})
        found = []
        for kind in kinds:
            shared = self._shared[kind].chance(self._priors[kind], SHARED_WEIGHT)
            counts = own.get(kind)
            found.append(shared if counts is None else counts.chance(shared, OWN_WEIGHT))
        return list(accumulate(found, mul))

    def _is_due(self, key: int, chosen: int) -> bool:
        """Return whether a sequence whose guesses did not pay has waited long enough."""
        pause = self._pauses.setdefault(key, _Pause())
        if chosen:
            self._pauses[key] = _Pause()
            return False
        pause.waited += 1
        return pause.waited > pause.length

    def _wait_longer(self, key: int) -> None:
        self._pauses[key] = _Pause(length=min(2 * self._pauses[key].length, LONGEST_PAUSE))
