"""The GPUs of this machine as places of a plan."""

from collections.abc import Mapping

import torch

from hanok.memory.budget import Budget, Limit
from hanok.memory.places import DATA_SHEETS, DataSheet
from hanok.memory.plan import Place

CLOCK_HZ = 1000  # of a kHz, which torch tells clocks in


def gpu_places(allowed: Mapping[str, int]) -> list[Place]:
    """Return every GPU that torch sees; `allowed` are the user's own limits by number.

    Free is what the driver says and what torch has claimed there and does not use.
    """
    return [_place(index, allowed.get(str(index))) for index in range(torch.cuda.device_count())]


def _place(index: int, allowed: int | None) -> Place:
    free, _ = torch.cuda.mem_get_info(index)
    free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    properties = torch.cuda.get_device_properties(index)
    limits = [Limit(num_bytes=free, source=f"free on {properties.name}")]
    if allowed is not None:
        limits.append(Limit(num_bytes=allowed, source="max_memory"))
    sheet = _data_sheet(properties.name)
    # Both edges of the clock carry a bit of each wire of the bus.
    rate = 2.0 * properties.memory_clock_rate * CLOCK_HZ * properties.memory_bus_width / 8
    return Place(
        name=str(index),
        kind="gpu",
        budget=Budget(device=str(index), limits=tuple(limits)),
        bytes_per_s=rate,
        flops_per_s=sheet.teraflops * 1e12 if sheet else 200 * rate,
        rate_source=f"{rate / 1e9:,.0f} GB/s, from its clock and bus",
    )


def _data_sheet(name: str) -> DataSheet | None:
    words = name.lower().replace(" ", "")
    return next((sheet for known, sheet in DATA_SHEETS.items() if known in words), None)
