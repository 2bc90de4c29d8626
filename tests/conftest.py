"""What has to be chosen before anything is imported: which build of our kernels, and where Triton's run.

Without a GPU Triton's kernels run in its interpreter. $HANOK_KERNELS names another build of the CPU
kernels: scripts/sanitize.py tests one with checks inside.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hanok.kernels import native

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "HANOK_KERNELS" in os.environ:
    native.LIBRARY = Path(os.environ["HANOK_KERNELS"])


@pytest.fixture(scope="session")
def kernel_device() -> Iterator[torch.device]:
    """Where Triton's kernels run: a GPU, or this CPU in the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.9.0")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Widen bfloat16, which Triton 3.9's interpreter multiplies by its bit patterns."""
        return original(self, _widened(self, a), _widened(self, b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield torch.device("cpu")


def _widened(builder: Any, handle: Any) -> Any:
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return builder.create_fp_ext(handle, tl.float32)
