"""Probes: they end in time on any machine, find its rate, and ask for no product that it has no
instructions for. Times are made up.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hanok.bench import bandwidth
from hanok.bench.bandwidth import GROWING, SLICE_S, RateProbe, Work, gflop_per_s, read_probe
from hanok.bench.machine import MachineProbe

CPU = torch.device("cpu")
BOUND_S, CALL_S = 0.3, 0.01
SIDES = (128, 256, 512, 1024, 2048)


class Machine:
    """A clock, and work that takes what a machine of some rate needs for it."""

    def __init__(self, rate: float, overhead_s: float = 0.0, first_s: float = 0.0) -> None:
        self.now, self.rate, self.overhead_s, self.first_s = 0.0, rate, overhead_s, first_s
        self.began: float | None = None
        self.calls = 0

    def work(self, side: int) -> Work:
        amount = 2 * side**3

        def call() -> None:
            self.calls += 1
            self.now += self.overhead_s + amount / self.rate
            if self.began is None:  # what only the first call costs is not counted
                self.now += self.first_s
                self.began = self.now

        def prepare() -> Callable[[], object]:
            self.now += side * side / self.rate
            return call

        return Work(amount=amount, prepare=prepare)

    def probe(self) -> RateProbe:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bandwidth.time, "perf_counter", lambda: self.now)
            return RateProbe(list(map(self.work, SIDES)), call_s=CALL_S, bound_s=BOUND_S)

    def best_per_s(self, probe: RateProbe) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bandwidth.time, "perf_counter", lambda: self.now)
            return probe.best_per_s()


@given(rate=st.floats(1e7, 1e15), overhead_s=st.floats(0, 0.02), first_s=st.floats(0, 5))
def test_a_probe_ends_in_time_on_any_machine(
    rate: float, overhead_s: float, first_s: float
) -> None:
    machine = Machine(rate, overhead_s, first_s)
    probe = machine.probe()
    smallest_s = overhead_s + (2 * SIDES[0] ** 3 + SIDES[0] ** 2) / rate
    # Short calls are repeated for a slice of time, which may be going on when the time is over.
    most_s = max(BOUND_S * GROWING, smallest_s) + 2 * SLICE_S
    assert machine.now - (machine.began or 0.0) <= most_s
    began, calls = machine.now, machine.calls
    machine.best_per_s(probe)
    assert machine.now - began <= BOUND_S * (1 - GROWING) or machine.calls == calls + 1


@pytest.mark.parametrize(
    ("rate", "side"), [(0.75e9, 128), (5e9, 256), (1e11, 512), (1e12, 1024), (1e15, 2048)]
)
def test_the_work_grows_until_it_takes_long_enough(rate: float, side: int) -> None:
    machine = Machine(rate)
    probe = machine.probe()
    assert side <= round((probe.amount / 2) ** (1 / 3)) <= 2 * side
    assert machine.best_per_s(probe) == pytest.approx(rate)


def test_a_slow_call_that_does_not_compute_is_no_slow_machine() -> None:
    """Where each call waits for a processor, larger calls show the rate."""
    machine = Machine(1e11, overhead_s=0.008)
    assert machine.best_per_s(machine.probe()) > 0.5e11


class Seen(TorchDispatchMode):
    """Which dtypes were multiplied, and what sums were."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[torch.dtype] = set()
        self.sums: list[tuple[int, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.products.add(args[0].dtype)
        if func.overloadpacket is torch.ops.aten.sum:
            self.sums.append((args[0].numel(), float(result)))
        return result


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing take long: sizes are not tested here."""
    monkeypatch.setattr(bandwidth, "PROBE_S", 0.0)
    monkeypatch.setattr(bandwidth, "READ_BYTES", 2**24)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("has_them", [False, True])
def test_no_product_is_tried_that_torch_has_no_instructions_for(
    has_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On such a processor one product of 2048 rows took a minute."""
    monkeypatch.setattr(
        bandwidth, "multiplies", lambda dtype, device: has_them or dtype is torch.float32
    )
    with Seen() as seen:
        probe = MachineProbe(CPU)
        found = (probe.best(), probe.measure())
    expected = {torch.float32, torch.bfloat16} if has_them else {torch.float32}
    assert seen.products == expected
    assert all(item.gb_per_s > 0 and item.gflop_per_s > 0 for item in found)


@pytest.mark.usefixtures("_small")
def test_the_better_of_two_dtypes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 2e9, torch.bfloat16: 5e9}
    monkeypatch.setattr(bandwidth, "multiplies", lambda dtype, device: True)

    class Fixed:
        def __init__(self, dtype: torch.dtype) -> None:
            self.best_per_s = lambda tries=7: rates[dtype]

    monkeypatch.setattr(bandwidth, "_product_probe", lambda device, dtype, side: Fixed(dtype))
    assert gflop_per_s(CPU, torch.bfloat16) == 5.0
    assert gflop_per_s(CPU, torch.float32) == 2.0
    assert MachineProbe(CPU).measure().gflop_per_s == 5.0


def test_reads_are_of_memory_that_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was never written lies on one page of zeros, which caches hold."""
    ticks = itertools.count()
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(ticks) * 1e-4)
    with Seen() as seen:
        probe = read_probe(CPU, 2**25)
    assert probe.amount == 2**25
    assert {count for count, _ in seen.sums} >= {2**23 // 4, 2**25 // 4}
    assert all(total == count for count, total in seen.sums)
