"""What tests share: the profile of hypothesis; kernels, threads, and the interpreter of Triton."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from hanok.kernels import native

# The same examples in every run, and no failure because the machine was busy.
settings.register_profile("hanok", derandomize=True, deadline=None)
settings.load_profile("hanok")

# Without a GPU Triton's kernels run in its interpreter, chosen before anything imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        type=Path,
        metavar="LIBRARY",
        help="compiled kernels to test instead of the package's own (scripts/sanitize.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--kernels")
    if library is not None:
        if not library.is_file():
            raise pytest.UsageError(f"--kernels: there is no file {library}")
        native.LIBRARY = library.resolve()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes `kernels` those of each instruction set that this processor has."""
    if "kernels" not in metafunc.fixturenames:
        return
    found = [pytest.param(item, id=item.instruction_set) for item in native.instruction_sets()]
    missing = pytest.param(None, marks=pytest.mark.skip(f"the kernels are {native.why_not()}"))
    metafunc.parametrize("kernels", found or [missing], scope="session")


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
