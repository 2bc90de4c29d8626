"""What this processor can multiply, and which instructions the user lets hanok use."""

import os
import platform
from functools import cache
from pathlib import Path

import torch

from hanok.errors import OptionError

CAP = "HANOK_ISA"
INSTRUCTION_SETS = ("portable", "dotprod", "avx2", "avxvnni", "avx512", "amx")  # most basic first
HALVED_ROWS = 32
"""Rows of a product up to which widening a weight takes longer than bfloat16 at half the rate."""
FEW_ROWS = 8
"""Rows of a product up to which reading the weights limits it, whatever multiplies them."""


def instruction_set_cap() -> str | None:
    """Return the best instruction set that the user allows (HANOK_ISA); None: any.

    Raises OptionError for one that is not in INSTRUCTION_SETS.
    """
    # A property of the machine, not of a call: it shall hold for every process started here, and for
    # programs that use hanok as a library.
    cap = os.environ.get(CAP) or None  # noqa: TID251 (a cap on the process, read where kernels are chosen)
    if cap is not None and cap not in INSTRUCTION_SETS:
        known = ", ".join(INSTRUCTION_SETS)
        raise OptionError(f"{CAP}={cap} is not an instruction set. Write one of {known}.")
    return cap


def is_x86() -> bool:
    """Return whether this processor is a 64-bit x86."""
    return platform.machine() in ("x86_64", "AMD64")


@cache
def has_bfloat16_instructions() -> bool:
    """Return whether this CPU multiplies bfloat16 natively (AVX512_BF16 or AMX) and is allowed to."""
    if instruction_set_cap() not in (None, "avx512", "amx"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def halves_bfloat16() -> bool:
    """Return whether products of many rows in bfloat16 take twice as long as in float32.

    So it is with AVX512_BF16 on Intel's processors without AMX (benchmarks/linear.py).
    """
    if torch.cpu._is_amx_tile_supported():
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in lines)


def multiplies(dtype: torch.dtype, device: torch.device, rows: int | None = None) -> bool:
    """Return whether torch multiplies matrices of this dtype on the device at full speed.

    On x86 without such instructions torch's products of 16-bit numbers take up to a hundred times as
    long as those of float32, and with some twice as long: then matrices of many rows are to be widened.
    `rows` are those of the product; None: many. What torch compiles is left as it is: the compiler
    cannot look at the processor.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    if torch.compiler.is_compiling():
        return True
    if not is_x86():
        return True
    if dtype is not torch.bfloat16 or not has_bfloat16_instructions():
        return False
    return (rows is not None and rows <= HALVED_ROWS) or not halves_bfloat16()
