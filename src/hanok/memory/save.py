"""Writes a decoder's weights under the names and in the order of its family's files.

Fused weights are written as the parts that the files have, tied ones once. One tensor is in memory
beyond the model.
"""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from hanok.checkpoint.writer import TensorData, write_safetensors
from hanok.memory.tensors import DTYPE_NAMES, to_file_order
from hanok.models.decoder import Decoder
from hanok.models.family import Source


def save_weights(
    folder: Path,
    decoder: Decoder,
    sources: Mapping[str, Source],
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[Path, ...]:
    """Write the weights as safetensors (sharded when large) and return the files."""
    tensors = []
    for name, parameter in decoder.named_parameters():
        source = sources[name]
        start = 0
        for file_name, rows, shape in zip(
            source.names, source.rows, source.file_shapes(), strict=True
        ):
            part = parameter.detach()[start : start + rows]
            start += rows
            tensors.append(
                TensorData(
                    name=file_name,
                    dtype=DTYPE_NAMES[parameter.dtype],
                    shape=shape,
                    read=_reader(part, source),
                )
            )
    return write_safetensors(folder, tensors, progress=progress)


def _reader(part: Tensor, source: Source) -> Callable[[], memoryview]:
    def read() -> memoryview:
        ordered = part if source.layout == "rows" else to_file_order(part, source)
        host = ordered.cpu().contiguous()
        if host.numel() == 0:
            return memoryview(b"")
        view = memoryview((ctypes.c_char * host.nbytes).from_address(host.data_ptr())).cast("B")
        # The view does not own the memory; a copy of one tensor keeps it alive while it is written.
        return memoryview(bytes(view))

    return read
