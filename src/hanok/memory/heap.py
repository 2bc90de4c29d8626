"""Gives memory that was freed back to the system, where the C library keeps it for later."""

import ctypes
from functools import cache

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MAPPED_BYTES = 2**24


@cache
def _trim() -> "ctypes._FuncPointer | None":
    """Return glibc's malloc_trim; None where another library allocates."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def give_back_at_once() -> None:
    """Let blocks of 16 MiB and more be given back as soon as they are freed, from now on.

    glibc keeps freed blocks for later ones of their size. Those of a training have so many sizes and
    lives that what is kept grows beyond what is used. Smaller blocks stay: claiming their pages anew
    costs more time than they are worth.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    except (OSError, AttributeError):
        return  # another library allocates


def trim_heap() -> None:
    """Return unused memory: the scratch of loading, the activations of a long prompt.

    glibc keeps freed blocks of up to 32 MiB, which would count against a container's limit for ever.
    """
    trim = _trim()
    if trim is not None:
        trim(ctypes.c_size_t(0))
