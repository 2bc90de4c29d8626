"""Our own compiled kernels, where the package's build found a compiler.

The library has a plain C interface and knows nothing of torch: it gets addresses and sizes. Without
it everything runs on torch's operators; `why_not` says what that costs and what to do.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / "libhanok_kernels.so"


class Native:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.hanok_instruction_set.restype = ctypes.c_char_p
        library.hanok_scratch_floats.restype = size
        library.hanok_scratch_floats.argtypes = [size, size]
        library.hanok_bfloat16_linear.restype = None
        library.hanok_bfloat16_linear.argtypes = [*[pointer] * 5, count, size, size, count]
        self._library = library
        self.instruction_set: str = library.hanok_instruction_set().decode()
        """What the kernels use of this processor."""
        self.max_tokens: int = library.hanok_max_tokens()
        """Rows of x that a product takes at the most."""

    def bfloat16_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ weight.T + bias, sums in float32; the same for any number of threads.

        x: (tokens, in), at most `max_tokens`   weight: (out, in)   bias: (out,)   all bfloat16 on the
        CPU, `weight` contiguous. returns: (tokens, out) bfloat16.
        """
        x = x.contiguous()
        (tokens, columns), rows = x.shape, weight.shape[0]
        # The library only sees addresses: what does not fit would be read out of bounds.
        if not 0 < tokens <= self.max_tokens or columns != weight.shape[1]:
            raise ValueError(f"x is {tokens} x {columns}, the weight {rows} x {weight.shape[1]}")
        if not x.dtype == weight.dtype == torch.bfloat16:
            raise ValueError(f"x is {x.dtype}, the weight {weight.dtype}; both must be bfloat16")
        if bias is not None:
            bias = bias.to(torch.bfloat16).contiguous()
            if bias.shape != (rows,):
                raise ValueError(f"the bias has shape {tuple(bias.shape)}, the weight {rows} rows")
        y = torch.empty(tokens, rows, dtype=torch.bfloat16)
        scratch = torch.empty(self._library.hanok_scratch_floats(tokens, columns))
        self._library.hanok_bfloat16_linear(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            tokens,
            rows,
            columns,
            torch.get_num_threads(),
        )
        return y


@cache
def native() -> Native | None:
    """Return the library, or None where it was not built or does not load."""
    if not LIBRARY.is_file():
        return None
    try:
        return Native(ctypes.CDLL(str(LIBRARY)))
    except OSError:
        return None


def why_not() -> str | None:
    """Return why there is no library, or None when there is one."""
    if native() is not None:
        return None
    cost = "bfloat16 on this CPU runs on torch's operators, which decode up to 1.3 times slower"
    if not LIBRARY.is_file():
        return f"not built: hanok was installed where no C++ compiler could compile them; {cost}"
    return f"{LIBRARY.name} does not load, it was built for another system; {cost}"
