"""Gives memory that was freed back to the system, where the C library keeps it for later."""

import ctypes
from functools import cache


@cache
def _trim() -> "ctypes._FuncPointer | None":
    """Return glibc's malloc_trim; None where another library allocates."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def trim_heap() -> None:
    """Return unused memory: the scratch of loading, the activations of a long prompt.

    glibc keeps freed blocks of up to 32 MiB, which would count against a container's limit for ever.
    """
    trim = _trim()
    if trim is not None:
        trim(ctypes.c_size_t(0))
