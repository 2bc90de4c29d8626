"""Moves mapped weights into memory of the process while the model already works.

Mapping a file is the fastest way to a first token, but decoding from it is slower than from anonymous
memory (measured with our kernel: 20 against 26 GB/s; docs/log.md). So after each of the first passes a
few weights are read into an arena, take the mapped ones' places, and the mapped pages are released. At
any moment the process holds the weights once, and one of them twice.

Weights move between two passes, in the thread that computes them, and only while all of them hold what
the file holds. As soon as one has changed, or may (`requires_grad`), nothing moves any more: an update
is never overwritten, however it was made.

What is copied is no longer shared with other processes and cannot be dropped by the kernel, so this
happens only where twice the bytes are available.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hanok.checkpoint.safetensors import TensorRef
from hanok.memory.tensors import Arena, MappedFiles, read_run

STEP_BYTES = 1 << 26  # moved after each pass: some milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedWeight:
    """A parameter that looks into a file, and where its bytes begin there."""

    parameter: nn.Parameter
    ref: TensorRef


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A mapped weight, and how its parameter was when it was loaded."""

    weight: MappedWeight
    version: int
    address: int

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing is known to have written to the parameter, and no training is about to."""
        parameter = self.weight.parameter
        return (
            not parameter.requires_grad
            and parameter._version == self.version
            and parameter.data_ptr() == self.address
        )


class Promotion:
    """The move of the mapped weights of a decoder, step by step."""

    def __init__(
        self, decoder: nn.Module, weights: Sequence[MappedWeight], files: MappedFiles
    ) -> None:
        self._left = deque(
            _Loaded(item, item.parameter._version, item.parameter.data_ptr()) for item in weights
        )
        self._decoder = decoder
        self._files = files
        self._arena: Arena | None = None
        self._lock = threading.Lock()
        hook = decoder.register_load_state_dict_pre_hook
        hook(lambda *_: self.cancel())  # type: ignore[no-untyped-call]  # torch's

    @property
    def is_over(self) -> bool:
        """Whether nothing will move any more: all has, or a weight has changed."""
        return not self._left

    def advance(self, num_bytes: int = STEP_BYTES) -> None:
        """Move weights of `num_bytes` together, at least one; call it between passes.

        Another thread may be computing: a product that is under way keeps the mapped tensor. No thread
        may be writing to a parameter.
        """
        if not self._left or not self._lock.acquire(blocking=False):
            return
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._move(num_bytes)
        finally:
            self._lock.release()

    def finish(self) -> None:
        """Move all that is left."""
        while not self.is_over:
            self.advance()

    def cancel(self) -> None:
        """Leave the others where they are: weights have changed, or are about to."""
        with self._lock:
            self._left.clear()

    def _move(self, num_bytes: int) -> None:
        known = {id(parameter) for parameter in self._decoder.parameters()}
        if not all(item.is_unchanged and id(item.weight.parameter) in known for item in self._left):
            self._left.clear()
            return
        if self._arena is None:
            sizes = [item.weight.parameter.nbytes for item in self._left]
            self._arena = Arena(sum(sizes), len(sizes))
        while self._left and num_bytes > 0:
            weight = self._left.popleft().weight
            mapped = weight.parameter.data
            copy = self._arena.empty(tuple(mapped.shape), mapped.dtype)
            read_run(weight.ref, copy)
            if not _same_bytes(mapped, copy):  # written to through `.data`, which counts no version
                self._left.clear()
                return
            weight.parameter.data = copy
            self._files.forget(weight.ref, mapped.nbytes)
            num_bytes -= mapped.nbytes


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
