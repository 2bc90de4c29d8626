"""Numbers as people read them."""


def size(num_bytes: int) -> str:
    """Return bytes in the largest binary unit that they fill."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} B"


def rate(per_s: float) -> str:
    """Return a rate with as many digits as it deserves."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"
