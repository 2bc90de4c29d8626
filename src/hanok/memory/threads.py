"""With how many threads this process computes: torch's operators and our kernels share one number."""

from dataclasses import dataclass

import torch

from hanok.errors import OptionError
from hanok.memory.cpus import CpuBudget, cpu_budget, num_physical_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """How many threads, and why."""

    count: int
    reason: str
    is_held_by_quota: bool
    """Whether a CPU quota is the reason, so that there are fewer than torch would take."""

    def __str__(self) -> str:
        return f"{self.count}, {self.reason}"


def set_threads(asked: int | None = None) -> Threads:
    """Set the number of threads of this process, and return it.

    `asked` is what the user wants, and is done. Without it torch's own number, which knows cores and no
    quotas, goes down to what the CPU quota allows. Any other number was chosen by the user
    (OMP_NUM_THREADS, torch.set_num_threads) and stays. Raises OptionError for less than one thread.
    """
    if asked is not None:
        if asked < 1:
            raise OptionError(f"threads is {asked}; it must be at least 1.")
        torch.set_num_threads(asked)
        return Threads(count=asked, reason="as asked for", is_held_by_quota=False)
    budget = cpu_budget()
    if budget.threads < torch.get_num_threads() in _own_numbers(budget):
        torch.set_num_threads(budget.threads)
    count = torch.get_num_threads()
    if count == budget.threads:
        is_held = budget.quota is not None
        return Threads(count=count, reason=budget.reason, is_held_by_quota=is_held)
    reason = "as OMP_NUM_THREADS or torch.set_num_threads says"
    if count in _own_numbers(budget):
        reason = f"one for each physical core ({len(budget.cores)} hardware threads may be used)"
    return Threads(count=count, reason=reason, is_held_by_quota=False)


def _own_numbers(budget: CpuBudget) -> tuple[int, int]:
    """Return torch's default: a thread for each core, or with MKL for each physical one."""
    return len(budget.cores), num_physical_cores(budget.cores)
