"""Runs units whose weights stay on disk: each is read into one of two buffers while another computes.

Weights come straight from the checkpoint's files, converted on the way as the loader would; nothing is
written anywhere. What a pass reads is the same in every pass, so after the last unit the first one is
read again. Where no more units are streamed than there are buffers, each is read once and stays.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hanok.checkpoint.files import TensorRef
from hanok.memory.plan import STREAM_BUFFERS
from hanok.memory.tensors import ALIGNMENT, read_parameter
from hanok.models.decoder import Decoder
from hanok.models.family import Source

NUM_READERS = 2  # threads; one cannot copy as fast as disks read


class Streamer:
    """The units of a decoder that are read anew in every pass, in the order of the pass.

    Passes may run in several threads: a unit computes for one of them at a time.
    """

    def __init__(
        self,
        decoder: Decoder,
        units: Mapping[str, Mapping[str, Source]],
        tensors: Mapping[str, TensorRef],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._units = list(units.items())
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="hanok-stream")
        self._parameters = {
            name: self._placeholder(decoder, name, device)
            for _, table in self._units
            for name in table
        }
        count = min(STREAM_BUFFERS, len(self._units))
        tables = [table for _, table in self._units]
        self._buffers = [_Buffer(tables, dtype, device) for _ in range(count)]
        self._nothing = torch.empty(0, dtype=dtype, device=device)
        for number, (unit, _) in enumerate(self._units):
            module = decoder.get_submodule(unit)
            module.register_forward_pre_hook(self._before(number))
            module.register_forward_hook(self._after(number), always_call=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def _placeholder(self, decoder: Decoder, name: str, device: torch.device) -> nn.Parameter:
        path, _, leaf = name.rpartition(".")
        nothing = torch.empty(0, dtype=self._dtype, device=device)
        parameter = nn.Parameter(nothing, requires_grad=False)
        decoder.get_submodule(path).register_parameter(leaf, parameter)
        return parameter

    def _before(self, number: int) -> Any:
        def acquire(module: nn.Module, inputs: Any) -> None:
            self._lock.acquire()
            buffer = self._read(number)
            for name, weight in buffer.weights().items():
                self._parameters[name].data = weight
            if len(self._units) > len(self._buffers):
                self._read((number + 1) % len(self._units))
            elif len(self._buffers) > 1:
                self._read(1 - number)

        return acquire

    def _after(self, number: int) -> Any:
        def release(module: nn.Module, inputs: Any, output: Any) -> None:
            for name in self._units[number][1]:
                self._parameters[name].data = self._nothing
            if self._nothing.is_cuda:
                self._read(number).last_use = torch.cuda.current_stream().record_event()
            self._lock.release()

        return release

    def _read(self, number: int) -> "_Buffer":
        """Return the buffer that has a unit, or is getting it from now on."""
        for buffer in self._buffers:
            if buffer.unit == number:
                return buffer
        # An empty one, else the one whose unit comes first again: the last one is computing.
        buffer = min(
            self._buffers,
            key=lambda item: -1 if item.unit < 0 else (item.unit - number) % len(self._units),
        )
        buffer.wait()
        table = self._units[number][1]
        buffer.unit = number
        buffer.readings = [
            self._pool.submit(self._fill, source, buffer, number, name)
            for name, source in table.items()
        ]
        return buffer

    def _fill(self, source: Source, buffer: "_Buffer", number: int, name: str) -> None:
        """Read one parameter into a buffer, and on to the device where that is not the CPU."""
        staged, target = buffer.staged[number][name], buffer.views[number][name]
        read_parameter(self._tensors, source, staged)
        if target is not staged:
            # A separate stream: computation does not wait for the copy.
            stream = torch.cuda.Stream(target.device)  # type: ignore[no-untyped-call]  # torch's
            with torch.cuda.stream(stream):
                if buffer.last_use is not None:
                    stream.wait_event(buffer.last_use)
                target.copy_(staged, non_blocking=True)
            stream.synchronize()


class _Buffer:
    """Memory for one unit at a time, and how each unit's weights lie in it."""

    def __init__(
        self, tables: Sequence[Mapping[str, Source]], dtype: torch.dtype, device: torch.device
    ) -> None:
        sizes = [
            sum(prod(source.shape) for source in table.values()) * dtype.itemsize
            for table in tables
        ]
        self.nbytes = max(sizes)
        size = self.nbytes + max(map(len, tables)) * ALIGNMENT
        # Readers write into it, and are in no inference mode wherever this was made.
        with torch.inference_mode(mode=False):
            memory = torch.empty(size, dtype=torch.uint8, device=device)
            self.views = [_in_turn(memory, table, dtype) for table in tables]
        self.staged = self.views
        """Where the files are read into: pinned memory of the host for a GPU."""
        if device.type == "cuda":
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.staged = [_in_turn(pinned, table, dtype) for table in tables]
        self.last_use: torch.cuda.Event | None = None
        """Behind the last kernels that read it, on a GPU."""
        self.unit = -1
        self.readings: list[Future[None]] = []

    def wait(self) -> None:
        """Return when nothing writes into it any more."""
        for reading in self.readings:
            reading.exception()

    def weights(self) -> Mapping[str, Tensor]:
        """Return its unit's weights when all are there; what reading raised empties it."""
        self.wait()
        try:
            for reading in self.readings:
                reading.result()
        except BaseException:
            self.unit, self.readings = -1, []
            raise
        return self.views[self.unit]


def _in_turn(memory: Tensor, table: Mapping[str, Source], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the parameters of a table as tensors that lie one after the other in some memory."""
    found, offset = {}, 0
    for name, source in table.items():
        num_bytes = prod(source.shape) * dtype.itemsize
        found[name] = memory[offset : offset + num_bytes].view(dtype).view(source.shape)
        offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return found
