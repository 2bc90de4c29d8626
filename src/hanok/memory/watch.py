"""Watches what this process claims while it loads: an error with the numbers instead of a kill.

A plan says how much memory loading will claim. A thread looks every few milliseconds at what is claimed
(pages of files that the kernel can drop do not count) and at what the system, its cgroups and limits
still have. When more was claimed than planned, or what is left is less than what is still to come, the
next `check` raises.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from hanok.errors import BudgetError
from hanok.memory.budget import Budget

STATUS = Path("/proc/self/status")
SAMPLE_S = 0.005
TOLERANCE = 1.08  # of a plan, what its predictions are allowed to be wrong by
SLACK_BYTES = 64 * 2**20  # what interpreter and allocators use beyond a plan
JITTER_BYTES = 16 * 2**20  # by which what is available changes from moment to moment


def claimed_bytes() -> int:
    """Return the memory of this process that the kernel cannot take back by dropping pages."""
    if not STATUS.is_file():
        return 0
    found = 0
    for line in STATUS.read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            found += int(line.split()[1]) * 1024
    return found


def resident_bytes() -> int:
    """Return the memory of this process, pages of files included; 0 where none tells."""
    return _status_bytes("VmRSS:")


def peak_resident_bytes() -> int:
    """Return the most memory that this process ever had, pages of files included; 0 where none tells."""
    return _status_bytes("VmHWM:")


def _status_bytes(name: str) -> int:
    if not STATUS.is_file():
        return 0
    lines = STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


class Watchdog:
    """A context in which no more than `planned_bytes` should be claimed; None: it only measures.

    `budget` says what may still be claimed at a moment.
    """

    def __init__(self, planned_bytes: int | None, budget: Callable[[], Budget]) -> None:
        self._planned = planned_bytes
        self._budget = budget
        self._before = claimed_bytes()
        self._stop = threading.Event()
        self._error: BudgetError | None = None
        self._thread = threading.Thread(target=self._run, name="hanok-watchdog", daemon=True)
        self.peak_bytes = 0
        """The most that was claimed at once."""
        self.held_bytes = 0
        """What was claimed when the context ended."""

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.held_bytes = self._look()

    def check(self) -> None:
        """Raise BudgetError if the plan was exceeded, or cannot be carried out any more."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while self._error is None and not self._stop.wait(SAMPLE_S):
            self._error = self._complaint(self._look())

    def _look(self) -> int:
        claimed = max(0, claimed_bytes() - self._before)
        self.peak_bytes = max(self.peak_bytes, claimed)
        return claimed

    def _complaint(self, claimed: int) -> BudgetError | None:
        if self._planned is None:
            return None
        if claimed > self._planned * TOLERANCE + SLACK_BYTES:
            return BudgetError(
                f"loading claimed {claimed:,} bytes where {self._planned:,} were planned; it was "
                "stopped before memory ran out. This is a fault of hanok's plan: please report the "
                "command and config.json."
            )
        budget, missing = self._budget(), self._planned - claimed
        if missing > budget.num_bytes + JITTER_BYTES:
            return BudgetError(
                f"loading needs {missing:,} bytes more, and only {budget.num_bytes:,} are left "
                f"({budget.source}); {claimed:,} of the planned {self._planned:,} were claimed. "
                "Something else took memory since the plan was made. Free some, or allow less with "
                "max_memory."
            )
        return None
