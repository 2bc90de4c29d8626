"""Processes for benchmarks/gpu.py, each with a CUDA context of its own, so that none breaks another.

A kernel that reads a wrong address makes every later call of its process fail, and one that hangs
never lets go. Processes are forked from one that has imported torch and never touches a GPU, since a
fork of a process with a CUDA context cannot use one.
"""

import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import gpu_interpreter

PRELOADED = (  # none of them may touch a GPU while it is imported
    *("torch", "hanok.engine.model", "hanok.engine.passes", "hanok.attention.triton"),
    *("hanok.quant.kernels.triton", "hanok.quant.recipe", "hanok.memory.quantize"),
    *(
        "hanok.kernels.triton_attention",
        "hanok.kernels.triton_linear",
        "hanok.kernels.triton_elementwise",
    ),
)
ENDING_S = 10.0


class WorkerError(Exception):
    """How a process ended that was to answer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception in a worker, as it is told to the program."""

    text: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Return its name and the beginning of what it says, in one line."""
        return cls(" ".join(f"{type(error).__name__}: {error}".split())[:300])


class Worker:
    """A process that runs `target(connection, *arguments)`."""

    def __init__(self, target: Callable[..., None], *arguments: Any, is_dry: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_run, args=(is_dry, target, theirs, *arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Send to the process; what it can no longer read is lost, and `receive` says why."""
        try:
            self.connection.send(message)
        except OSError:
            return

    def receive(self, timeout_s: float) -> Any:
        """Return its next message. Raises TimeoutError, or WorkerError when it has ended."""
        if not self.connection.poll(max(0.0, timeout_s)):
            raise TimeoutError
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join(ENDING_S)
            code = self._process.exitcode
            raise WorkerError(f"its process ended with status {code}") from None

    def end(self) -> None:
        """End the process, whatever it does; one that the driver holds is not waited for."""
        self._process.kill()
        self._process.join(ENDING_S)
        self.connection.close()


def ready(workers: Iterable[Worker], timeout_s: float) -> list[Worker]:
    """Return the workers that sent something or ended, at the latest after `timeout_s`."""
    found = {worker.connection: worker for worker in workers}
    return [found[item] for item in wait(list(found), max(0.0, timeout_s))]


def _run(
    is_dry: bool, target: Callable[..., None], connection: Connection, *arguments: Any
) -> None:
    if is_dry:
        gpu_interpreter.replace_gpu()
    target(connection, *arguments)
