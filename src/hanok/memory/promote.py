"""Moves mapped weights into memory of the process while the model already works.

Mapping a file is the fastest way to a first token, but decoding from it is slower than from anonymous
memory (measured with our kernel: 20 against 26 GB/s; docs/log.md). So once the model has answered for
the first time, a thread reads one weight after the other into an arena, puts it in the mapped one's
place, and gives the mapped pages back. At any moment the process holds the weights once, and one of
them twice.

What is copied is no longer shared with other processes and cannot be dropped by the kernel, so this
happens only where twice the bytes are available.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hanok.checkpoint.safetensors import TensorRef
from hanok.memory.tensors import Arena, MappedFiles, read_run


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedWeight:
    """A parameter that looks into a file, and where its bytes begin there."""

    parameter: nn.Parameter
    ref: TensorRef


class Promotion:
    """The move of some mapped weights, done once and in the background."""

    def __init__(self, weights: Sequence[MappedWeight], files: MappedFiles) -> None:
        self._weights = weights
        self._files = files
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()

    def start(self) -> None:
        """Begin, unless it was begun before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hanok-promotion", daemon=True)
            self._thread.start()
            # A thread that Python ends while torch copies takes the whole program down with it.
            weakref.finalize(self, _end, self._thread, self._is_over)

    def wait(self) -> None:
        """Return when all weights have moved; at once if the move was not begun."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        sizes = [weight.parameter.nbytes for weight in self._weights]
        arena = Arena(sum(sizes), len(sizes))
        for weight in self._weights:
            if self._is_over.is_set():
                return
            mapped = weight.parameter.data
            copy = arena.empty(tuple(mapped.shape), mapped.dtype)
            read_run(weight.ref, copy)
            # A product that is under way keeps the mapped tensor; the next one gets the copy.
            weight.parameter.data = copy
            self._files.forget(weight.ref, mapped.nbytes)


def _end(thread: threading.Thread, is_over: threading.Event) -> None:
    """Let the move end behind the weight it is at, and wait for that."""
    is_over.set()
    if thread is not threading.current_thread():
        thread.join()
