"""A CPU in place of a GPU: Triton interprets the kernels, and hanok chooses as it would on a GPU.

So everything that benchmarks/gpu.py does can be tried without a GPU, except what only a compiled kernel
or a recorded graph gets wrong.
"""

import os
from typing import Any

from hanok.attention.triton import TritonAttention
from hanok.engine import cuda_graph
from hanok.quant.kernels.triton import TritonLayout


def choose_interpreter() -> None:
    """Let this process and those that it starts interpret kernels; call it before triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"


def replace_gpu() -> None:
    """Make hanok choose its GPU kernels in this process, from now on and on any device."""
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Widen bfloat16, which Triton 3.9's interpreter multiplies by its bit patterns."""
        return original(self, _widened(self, a), _widened(self, b), *rest)

    InterpreterBuilder.create_dot = create_dot
    TritonAttention.why_not = lambda *_: None
    TritonLayout.why_not = lambda *_: None
    # A step from buffers in place then runs plainly each time.
    cuda_graph.why_not = cuda_graph.why_not_static


def _widened(builder: Any, handle: Any) -> Any:
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return builder.create_fp_ext(handle, tl.float32)
