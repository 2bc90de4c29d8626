"""How much memory a call takes while it runs, beyond what the process held before it.

On Linux the kernel keeps the largest size that a process ever had in memory, and lets it be reset: the
difference counts everything, results and the scratch of compiled libraries included, in whole pages.
Freed blocks are given back first, or the call would reuse them unseen. A GPU's allocator counts itself.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from hanok.memory.budget import host_budget
from hanok.memory.heap import trim_heap

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # man 5 proc: resets the high-water mark


def peak_growth_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most that the process, or a GPU's allocator, grew by during the call.

    None where neither tells. A first call should have been made: it loads code and fills caches.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    trim_heap()
    try:
        RESET.write_text(RESET_PEAK)
        before = _kib("VmRSS")
    except (OSError, KeyError):
        return None
    call()
    return max(0, _kib("VmHWM") - before) * 2**10


def free_bytes(device: torch.device) -> int:
    """Return what may still be claimed: of a GPU what its driver says, else the least of all limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_budget().num_bytes


def _kib(key: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[key].split()[0])
