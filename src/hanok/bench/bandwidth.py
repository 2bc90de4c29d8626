"""How fast this machine reads memory and multiplies: what decoding and prompts are limited by.

A probe is bounded in time. It begins with a call that any machine makes at once, and makes it larger
until a call takes long enough to be timed or the time is over: large matrices take a laptop minutes that
a server multiplies in milliseconds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hanok.kernels.processor import multiplies

PROBE_S = 0.3  # of finding one rate, of one dtype
GROWING = 2 / 3  # of that, for finding the size; repeating has the rest
REPEATS = 7
# What else runs takes a processor away for some milliseconds at a time, and without one of its threads
# a product waits. So each size is called for about as long, and a larger one is tried after a long call
# if it was this much faster than the one before it: that one did not compute all the time.
SLICE_S, FASTER = 0.015, 1.5
# Long enough for one call. A read in less time may be one of caches.
READ_CALL_S, PRODUCT_CALL_S = 0.02, 0.01
# The largest read: larger than caches. A device whose cache is larger still would look faster.
READ_BYTES = 2**29
# Sides of the largest matrices: a GPU is kept busy by them.
CPU_SIDE, OTHER_SIDE = 2048, 8192
MIN_READ_BYTES, MIN_SIDE = 2**23, 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What may be timed."""

    amount: float
    """Bytes or FLOP of one call."""
    prepare: Callable[[], Callable[[], object]]
    """Makes what the call needs and returns it; the call ends when the device has finished."""


class RateProbe:
    """A call that is large enough to be timed, found within a bound of time."""

    def __init__(self, works: Sequence[Work], *, call_s: float, bound_s: float) -> None:
        """Try some of `works`, which grow, as long as larger calls are faster and `bound_s` last.

        Calls that are expected to take up to `call_s` are not tried one by one. What only a first call
        costs, loading a library for example, is not in `bound_s`.
        """
        self._repeat_s = bound_s * (1 - GROWING)
        works[0].prepare()()
        ends = time.perf_counter() + bound_s * GROWING
        self._amount = self._seconds = self._slope = 0.0
        self._is_faster = True
        self._prepare(works[0])
        rest = works[1:]
        while rest:
            index = self._next(rest, call_s, ends - time.perf_counter())
            if index is None:
                break
            self._prepare(rest[index])
            rest = rest[index + 1 :]

    def _prepare(self, work: Work) -> None:
        """Make what a larger call needs, and see how long it takes compared with the previous one."""
        before, before_s = self._amount, self._seconds
        start = time.perf_counter()
        self._call, self._amount = work.prepare(), work.amount
        now = time.perf_counter()
        self._prepare_s, ends = now - start, now + SLICE_S
        self._seconds = self._timed()
        while time.perf_counter() < ends:
            self._seconds = min(self._seconds, self._timed())
        self._slope = max(0.0, self._seconds - before_s) / (self._amount - before)
        self._is_faster = self._amount * before_s > FASTER * before * self._seconds or not before

    def _next(self, works: Sequence[Work], call_s: float, left_s: float) -> int | None:
        """Return which of the larger ones is tried now; None: none, or there is no time."""
        found = None
        for index, work in enumerate(works):
            times = work.amount / self._amount
            expected_s = times * self._seconds
            is_short = expected_s <= call_s
            if not is_short and not (index == 0 and self._is_faster):
                break
            if not is_short:
                expected_s = self._seconds + self._slope * (work.amount - self._amount)
            if times * self._prepare_s + expected_s > left_s:
                break
            found = index
        return found

    @property
    def amount(self) -> float:
        """Bytes or FLOP of the call that was found."""
        return self._amount

    def best_per_s(self, tries: int = REPEATS) -> float:
        """Return the best rate of several calls, at least one: bytes or FLOP a second."""
        began = time.perf_counter()
        best = self._timed()
        for _ in range(1, tries):
            if time.perf_counter() - began + best > self._repeat_s:
                break
            best = min(best, self._timed())
        return self.amount / best

    def _timed(self) -> float:
        start = time.perf_counter()
        self._call()
        return max(1e-9, time.perf_counter() - start)


def read_probe(device: torch.device, max_bytes: int = READ_BYTES) -> RateProbe:
    """Return a probe of how fast torch reads a tensor of `max_bytes` there, or of less.

    On a CPU it is added up; on other devices it is copied, and the bytes are counted one way.
    """
    values = torch.empty(max_bytes // 4, device=device)
    copy = None if device.type == "cpu" else torch.empty_like(values)
    written = 0

    def prepare(size: int) -> Callable[[], object]:
        nonlocal written
        part = values[: size // 4]
        part[written:].fill_(1)  # what was never written lies on one page of zeros
        written = max(written, len(part))
        if copy is None:
            return part.sum
        target = copy[: len(part)]
        return lambda: _finished(device, target.copy_(part))

    works = [
        Work(amount=size, prepare=partial(prepare, size))
        for size in _halves(max_bytes, MIN_READ_BYTES)
    ]
    return RateProbe(works, call_s=READ_CALL_S, bound_s=PROBE_S)


def product_probes(
    device: torch.device, dtype: torch.dtype, max_side: int | None = None
) -> list[RateProbe]:
    """Return probes of how fast torch multiplies square matrices there, one for each dtype that counts.

    On a CPU float32 counts beside `dtype`, being faster on some and what an implementation may do, and
    `dtype` only where torch has instructions for it: without, its products take a hundred times as long.
    """
    dtypes, side = [dtype], max_side or OTHER_SIDE
    if device.type == "cpu":
        kinds = dict.fromkeys((torch.float32, dtype))
        dtypes, side = [kind for kind in kinds if multiplies(kind, device)], max_side or CPU_SIDE
    return [_product_probe(device, kind, side) for kind in dtypes]


def _product_probe(device: torch.device, dtype: torch.dtype, max_side: int) -> RateProbe:
    def prepare(side: int) -> Callable[[], object]:
        left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        target = torch.empty_like(left)
        return lambda: _finished(device, torch.mm(left, right, out=target))

    works = [
        Work(amount=2 * side**3, prepare=partial(prepare, side))
        for side in _halves(max_side, MIN_SIDE)
    ]
    return RateProbe(works, call_s=PRODUCT_CALL_S, bound_s=PROBE_S)


def _halves(largest: int, least: int) -> list[int]:
    """Return a size, its half and so on down to the least, the smallest first."""
    sizes = [largest]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


def _finished(device: torch.device, result: torch.Tensor) -> torch.Tensor:
    """Return what was computed when it is there."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return result


def read_gb_per_s(device: torch.device) -> float:
    """Return the best rate at which torch reads a large tensor there, in GB/s."""
    return read_probe(device).best_per_s() / 1e9


def gflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate at which torch multiplies large square matrices there, in GFLOP/s.

    It is that of the better of `dtype` and, on a CPU, float32 (`product_probes`).
    """
    return max(probe.best_per_s() for probe in product_probes(device, dtype)) / 1e9
