"""Writes a decoder's weights under the names and in the order of its family's files.

Fused weights are written as the parts that the files have, all experts' as one where files have them so,
tied ones once. What the decoder left out (a vision tower) is copied from the files it came from. One
tensor is in memory beyond the model.

Parameters that are shards of distributed ones (FSDP) are gathered one by one, which every process takes
part in: the first one writes, the others call `take_part`.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from hanok.checkpoint.files import TensorRef
from hanok.checkpoint.writer import OnShard, TensorData, in_reading_order, write_safetensors
from hanok.errors import UnsupportedError
from hanok.memory.tensors import DTYPE_NAMES, MappedFiles, to_file_order
from hanok.models.decoder import Decoder
from hanok.models.family import Source


def save_weights(
    folder: Path,
    decoder: Decoder,
    sources: Mapping[str, Source],
    *,
    left_out: Sequence[TensorRef] = (),
    progress: Callable[[int], None] | None = None,
    on_shard: OnShard | None = None,
) -> tuple[Path, ...]:
    """Write the weights as safetensors (sharded when large) and return the files.

    `progress` and `on_shard` are those of `write_safetensors`.
    Raises UnsupportedError where adapters are attached: the files would be without them.
    """
    tensors = _tensors(decoder, sources, left_out)
    return write_safetensors(folder, tensors, progress=progress, on_shard=on_shard)


def is_sharded(decoder: Decoder) -> bool:
    """Return whether each process has only shards of some parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in decoder.parameters())


def take_part(
    decoder: Decoder, sources: Mapping[str, Source], left_out: Sequence[TensorRef] = ()
) -> None:
    """Give this process's shards to the one that runs `save_weights` at the same time."""
    for tensor in in_reading_order(_tensors(decoder, sources, left_out)):
        tensor.read()


def _tensors(
    decoder: Decoder, sources: Mapping[str, Source], left_out: Sequence[TensorRef]
) -> list[TensorData]:
    files = MappedFiles()
    tensors = [
        TensorData(
            name=ref.name,
            dtype=ref.dtype,
            shape=ref.shape,
            read=partial(_read, files, ref),
        )
        for ref in left_out
    ]
    stacks: dict[str, list[TensorData]] = {}
    for name, parameter in decoder.named_parameters():
        if ".lora." in name:
            raise UnsupportedError(
                "a model with adapters attached cannot be saved: the files would be without them. "
                "Merge or detach them first (hanok.models.adapters)."
            )
        source = sources[name]
        start = 0
        target = stacks.setdefault(source.stack, []) if source.stack else tensors
        for file_name, rows, shape in zip(
            source.names, source.rows, source.file_shapes(), strict=True
        ):
            chosen = slice(start, start + rows)
            start += rows
            target.append(
                TensorData(
                    name=file_name,
                    dtype=DTYPE_NAMES[parameter.dtype],
                    shape=shape,
                    read=_reader(parameter.detach(), chosen, source),
                )
            )
    return [*tensors, *(_stacked(name, parts) for name, parts in stacks.items())]


def _stacked(name: str, parts: Sequence[TensorData]) -> TensorData:
    """Return one tensor of all experts' matrices, in turn."""
    return TensorData(
        name=name,
        dtype=parts[0].dtype,
        shape=(len(parts), *parts[0].shape),
        read=lambda: b"".join(part.read() for part in parts),
    )


def _reader(parameter: Tensor, rows: slice, source: Source) -> Callable[[], memoryview]:
    def read() -> memoryview:
        gather: Callable[[], Tensor] | None = getattr(parameter, "full_tensor", None)  # a DTensor's
        part = (parameter if gather is None else gather())[rows]
        return bytes_of(part if source.layout == "rows" else to_file_order(part, source))

    return read


def _read(files: MappedFiles, ref: TensorRef) -> memoryview:
    return bytes_of(files.view(ref))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a copy of a tensor's bytes, in C order."""
    host = tensor.cpu().contiguous()
    if host.numel() == 0:
        return memoryview(b"")
    view = memoryview((ctypes.c_char * host.nbytes).from_address(host.data_ptr())).cast("B")
    # The view does not own the memory; a copy of one tensor keeps it alive while it is written.
    return memoryview(bytes(view))
