"""The watchdog measures what is claimed, and stops a load that the plan did not count on."""

import mmap
import threading
from collections.abc import Callable

import pytest

import hanok
from hanok.errors import BudgetError
from hanok.memory import load as load_module
from hanok.memory import watch
from hanok.memory.budget import Budget, Limit
from hanok.memory.watch import Watchdog

MEBIBYTE = 2**20


def left(num_bytes: int) -> Callable[[], Budget]:
    return lambda: Budget(device="cpu", limits=(Limit(num_bytes=num_bytes, source="the test"),))


def claim(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes)
    for start in range(0, num_bytes, mmap.PAGESIZE):
        memory[start] = 1
    return memory


def look_often(watchdog: Watchdog) -> None:
    """Let the thread have looked, without waiting for a clock."""
    watchdog._error = watchdog._complaint(watchdog._look())


def test_it_measures_what_is_claimed() -> None:
    with Watchdog(None, left(2**60)) as watchdog:
        first = claim(96 * MEBIBYTE)
        look_often(watchdog)
        first.close()
        kept = claim(32 * MEBIBYTE)
        watchdog.check()
    assert watchdog.peak_bytes == pytest.approx(96 * MEBIBYTE, abs=8 * MEBIBYTE)
    assert watchdog.held_bytes == pytest.approx(32 * MEBIBYTE, abs=8 * MEBIBYTE)
    kept.close()
    assert not [item for item in threading.enumerate() if item.name == "hanok-watchdog"]


def test_more_than_planned_is_an_error_with_the_numbers() -> None:
    with Watchdog(10 * MEBIBYTE, left(2**60)) as watchdog:
        memory = claim(120 * MEBIBYTE)
        look_often(watchdog)
        with pytest.raises(
            BudgetError, match=r"claimed 12\d,\d{3},\d{3} bytes where 10,485,760 were"
        ):
            watchdog.check()
        memory.close()


def test_memory_that_others_took_is_an_error_before_it_is_claimed() -> None:
    with Watchdog(500 * MEBIBYTE, left(100 * MEBIBYTE)) as watchdog:
        look_often(watchdog)
        with pytest.raises(
            BudgetError,
            match=r"needs 5\d\d,\d{3},\d{3} bytes more, and only 104,857,600 are left \(the",
        ):
            watchdog.check()


@pytest.mark.parametrize("quant", [None, "int8"])
def test_a_load_is_stopped_and_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch, quant: str | None
) -> None:
    """From the moment the plan is made to the first weight, everything else takes all memory."""
    plan = hanok.plan_load(hanok.BUNDLED, quant=quant, weights="copied", may_measure=False)
    monkeypatch.setattr(load_module, "host_budget", left(0))
    monkeypatch.setattr(watch, "JITTER_BYTES", 0)
    monkeypatch.setattr(watch, "SAMPLE_S", 0.0)
    before = threading.active_count()
    with pytest.raises(BudgetError, match=r"Something else took memory since the plan was made"):
        hanok.load(plan=plan)
    assert threading.active_count() == before


def test_a_load_says_what_it_claimed() -> None:
    report = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied").report
    assert report.planned_bytes is not None
    assert report.peak_bytes >= report.held_bytes >= 0
    assert report.peak_bytes < 1.08 * report.planned_bytes + 32 * MEBIBYTE
    assert report.seconds > 0
