"""How much of the CPUs this process may use, and what limits it. Imports no torch.

The least of the affinity mask, which a container's cpuset is part of, and the CPU quota of every cgroup
above this process (versions 1 and 2). A quota is time: threads beyond it do not compute at the same
time, they use it up early and then all stand still until the next period, those that the others wait for
too. So there are as many threads as the quota has whole CPUs, and at least one.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hanok.memory.cgroups import Cgroup, cgroups, read_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuQuota:
    """CPU time that a cgroup allows."""

    cpus: float
    """Seconds of CPU time in each second."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuBudget:
    """What this process may use of the CPUs."""

    cores: tuple[int, ...]
    """Numbers of the cores it may run on, ascending."""
    num_machine_cores: int
    """How many cores this machine has."""
    quotas: tuple[CpuQuota, ...]
    """Of each cgroup that has one."""

    @property
    def cpus(self) -> float:
        """Seconds of CPU time in each second."""
        quota = self.quota
        return float(len(self.cores)) if quota is None else quota.cpus

    @property
    def threads(self) -> int:
        """How many threads can compute all the time; 1 where not even one can."""
        return max(1, int(self.cpus))

    @property
    def quota(self) -> CpuQuota | None:
        """The least quota, where it allows less than the cores."""
        least = min(self.quotas, key=_cpus_of, default=None)
        return least if least is not None and least.cpus < len(self.cores) else None

    @property
    def reason(self) -> str:
        """Why it is so many threads, as the rest of a sentence that begins with their number."""
        quota, count = self.quota, len(self.cores)
        if quota is not None:
            return f"limited by {quota.source} ({count} core{'s' * (count > 1)} may be used)"
        if count < self.num_machine_cores:
            return f"limited by the affinity mask ({self.num_machine_cores} cores are there)"
        return "one for each core"


def _cpus_of(quota: CpuQuota) -> float:
    return quota.cpus


def cpu_budget(root: Path = Path("/")) -> CpuBudget:
    """Return what this process may use of the CPUs; `root` is where /proc and /sys are looked for."""
    num_machine_cores = os.cpu_count() or 1
    # Not every system has affinity masks.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = os.sched_getaffinity(0) if has_affinity else range(num_machine_cores)
    return CpuBudget(
        cores=tuple(sorted(cores)),
        num_machine_cores=num_machine_cores,
        quotas=tuple(_quotas(root)),
    )


def num_physical_cores(cores: tuple[int, ...], root: Path = Path("/")) -> int:
    """Return how many of `cores` are distinct cores, not hardware threads of the same one."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = [read_lines(root / topology.format(core)) for core in cores]
    return len({tuple(lines) or core for core, lines in zip(cores, siblings, strict=True)})


def _quotas(root: Path) -> Iterator[CpuQuota]:
    for group in cgroups("cpu", root):
        file, words = _quota_and_period(group)
        if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
            cpus = int(words[0]) / int(words[1])
            yield CpuQuota(cpus=cpus, source=f"cgroup {group.name}: {file} {cpus:.2f} CPUs")


def _quota_and_period(group: Cgroup) -> tuple[str, list[str]]:
    """Return the file with a group's quota, and quota and period in microseconds, if there is one."""
    if group.version == 2:
        return "cpu.max", " ".join(read_lines(group.folder / "cpu.max")).split()
    files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    return files[0], [word for file in files for word in read_lines(group.folder / file)[:1]]
