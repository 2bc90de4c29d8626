"""The most memory that this process holds while something runs.

The kernel counts it (VmHWM) and, where it is asked to, begins to count anew. Where that is not
permitted a thread looks every few milliseconds, and may miss what is held between two looks.
"""

import threading
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
SAMPLE_S = 0.002
COUNTED = "the kernel's count (VmHWM)"
SAMPLED = f"looking every {SAMPLE_S * 1000:.0f} ms"


class PeakMemory:
    """A context; `num_bytes` says afterwards what was held at the most."""

    def __init__(self) -> None:
        self.source = COUNTED if _reset() else SAMPLED
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        if self.source == SAMPLED:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        else:
            self.num_bytes = status_bytes("VmHWM")

    def _look(self) -> None:
        self.num_bytes = status_bytes("VmRSS")
        while not self._stop.wait(SAMPLE_S):
            self.num_bytes = max(self.num_bytes, status_bytes("VmRSS"))


def _reset() -> bool:
    """Let the kernel's count begin anew; return whether it did."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def status_bytes(name: str) -> int:
    """Return a number of /proc/self/status; 0 where there is none."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
