"""How fast this machine reads memory: what decoding one sequence is limited by."""

import time

import torch

READ_BYTES = 2**29  # larger than caches; a device whose cache is larger still would look faster
REPEATS = 7


def read_gb_per_s(device: torch.device) -> float:
    """Return the best rate at which torch reads a large tensor there, in GB/s.

    On a CPU it is added up; on other devices it is copied, and the bytes are counted one way.
    """
    values = torch.ones(READ_BYTES // 4, device=device)
    target = None if device.type == "cpu" else torch.empty_like(values)
    best = 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        if target is None:
            values.sum()
        else:
            target.copy_(values)
            torch.accelerator.synchronize(device)
        best = max(best, values.nbytes / (time.perf_counter() - start))
    return best / 1e9
