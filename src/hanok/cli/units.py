"""Numbers as people read them."""

import math


def size(num_bytes: int) -> str:
    """Return bytes in the largest binary unit that they fill."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} B"


def rate(per_s: float) -> str:
    """Return a rate with as many digits as it deserves."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def finite(value: object) -> object:
    """Return the same with null for numbers that JSON has no word for: infinite, or no number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
