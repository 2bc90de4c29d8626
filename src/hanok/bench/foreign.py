"""How much of the CPUs other programs use while something is measured. Imports no torch."""

import os
import resource
import time
from pathlib import Path

STAT = Path("/proc/stat")
TICK_S = 0.05  # the system counts in ticks of some milliseconds


class ForeignLoad:
    """How many cores other programs use from now on, time stolen from a virtual machine included."""

    def __init__(self) -> None:
        self._wall, self._own, self._all = time.perf_counter(), _own_s(), _busy_s()

    def cores(self) -> float | None:
        """Return it; None where the system does not say."""
        now = _busy_s()
        if now is None or self._all is None:
            return None
        foreign = (now - self._all) - (_own_s() - self._own)
        return max(0.0, foreign / max(TICK_S, time.perf_counter() - self._wall))


def _own_s() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _busy_s() -> float | None:
    """Return the CPU seconds that everything on the machine has used."""
    try:
        values = STAT.read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, stolen = map(int, values)
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
