"""Times that may be compared: contestants take turns, and a figure comes with its spread.

The load of a machine besides a measurement changes slowly, so contestants that are measured one after
another share it within a round. Each round begins one contestant further on; a ratio is that of the
medians, and its spread that of the rounds.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

MIN_SAMPLE_S = 0.02
"""Shorter calls are made several times for one measurement: a clock and a loop cost a microsecond."""

RunRound = Callable[[Callable[[], dict[str, float]]], dict[str, float]]
"""Makes one round; a caller may wait before it, or repeat a round that was disturbed."""


class Deadline:
    """Shares a time among parts that come one after another."""

    def __init__(self, bound_s: float | None) -> None:
        """`bound_s`: how long all of them may take from now on; None: as long as they do."""
        self._ends = None if bound_s is None else time.perf_counter() + bound_s

    def left_s(self, parts: int = 1) -> float | None:
        """Return how long the next of so many parts may take; None: as long as it does."""
        return None if self._ends is None else (self._ends - time.perf_counter()) / parts


def run_plainly(one_round: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Make a round once, whatever else the machine does."""
    return one_round()


def take_turns(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int,
    run_round: RunRound = run_plainly,
    bound_s: float | None = None,
) -> dict[str, list[float]]:
    """Return the seconds that each contestant reports, one value for each round.

    No round but the first begins when one as long as the longest would not end within `bound_s`.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    began, longest = time.perf_counter(), 0.0
    for index in range(rounds if names else 0):
        start = time.perf_counter()
        if index and bound_s is not None and start - began + longest > bound_s:
            break
        first = index % len(names)
        order = names[first:] + names[:first]

        def one_round(order: Sequence[str] = order) -> dict[str, float]:
            return {name: contestants[name]() for name in order}

        for name, value in run_round(one_round).items():
            seconds[name].append(value)
        longest = max(longest, time.perf_counter() - start)
    return seconds


@dataclass(slots=True, kw_only=True)
class Timer:
    """Times one action, so often in a row that a measurement lasts `min_sample_s`."""

    action: Callable[[], object]
    device: torch.device
    min_sample_s: float = MIN_SAMPLE_S
    calls: int = 1

    def warm_up(self) -> None:
        """Make the action once for what only a first call costs, and once to see how long it takes."""
        self()
        self.calls = max(1, math.ceil(self.min_sample_s / max(self(), 1e-9)))

    def __call__(self) -> float:
        """Return the seconds of one action."""
        self._wait()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.action()
        self._wait()
        return (time.perf_counter() - start) / self.calls

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
