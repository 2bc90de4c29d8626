"""How fast this machine reads memory and multiplies: what decoding and prompts are limited by."""

import time

import torch

READ_BYTES = 2**29  # larger than caches; a device whose cache is larger still would look faster
REPEATS = 7
# Sides of the matrices whose product shows how fast a device multiplies: a CPU needs tens of
# milliseconds for them, a GPU is kept busy.
CPU_SIDE, OTHER_SIDE = 2048, 8192


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


def gflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate at which torch multiplies large square matrices there, in GFLOP/s.

    On a CPU they are multiplied in float32 too: without instructions for `dtype` that is faster, and
    what an implementation may do.
    """
    if device.type != "cpu":
        return _product_gflop_per_s(device, dtype, OTHER_SIDE)
    return max(_product_gflop_per_s(device, kind, CPU_SIDE) for kind in {dtype, torch.float32})


def _product_gflop_per_s(device: torch.device, dtype: torch.dtype, side: int) -> float:
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    target = torch.empty_like(left)
    best = 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(left, right, out=target)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best / 1e9
