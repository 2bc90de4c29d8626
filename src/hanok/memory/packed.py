"""Keeps what quantizing a checkpoint made in the user's cache folder: the next load only reads it.

A copy is found by what it was made of: the contents of the weight files, the recipe, the order of bytes
that this machine's kernels read, and this version. Contents are hashed once; as long as a file's size,
times and inode stay, its hash is looked up. The file has a name, a beginning and an end of its own, so
that nothing takes it for a checkpoint, and neither a part of one nor another's is ever read.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from hanok.checkpoint.aside import Batch
from hanok.checkpoint.content_hash import content_hashes
from hanok.checkpoint.files import TensorRef
from hanok.errors import CheckpointError
from hanok.kernels.native import native
from hanok.memory.quantize import QuantizedSource
from hanok.memory.tensors import ALIGNMENT, DTYPE_NAMES, read_bytes

SUFFIX = ".packed"
MAGIC = b"hanok packed 1\n\0"
END = b"\0end of hanok packed\n"
HASHES = "hashes.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One tensor of a quantized weight, and where its bytes begin in the file."""

    tensor: Tensor
    offset_bytes: int


class PackedCopy:
    """The copy of some quantized weights, which is there or will be."""

    def __init__(
        self, folder: Path, files: Iterable[Path], items: Sequence[QuantizedSource], recipe: str
    ) -> None:
        self._folder = folder
        self._items = items
        kernels = native()
        described = {
            "version": version("hanok"),
            "recipe": recipe,
            "kernels": kernels.instruction_set if kernels is not None else "torch",
            "files": sorted(self._hashes(files)),
            "weights": [
                [
                    item.source.names,
                    [[str(part.dtype), list(part.shape)] for part in item.stored.parts],
                ]
                for item in items
            ],
        }
        self._header = json.dumps(described).encode()
        self.path = folder / f"{hashlib.sha256(self._header).hexdigest()[:32]}{SUFFIX}"
        start = len(MAGIC) + 8 + len(self._header)
        self._parts: dict[int, list[_Part]] = {}
        for number, item in enumerate(items):
            self._parts[number] = []
            for tensor in item.stored.parts:
                start = -(-start // ALIGNMENT) * ALIGNMENT
                self._parts[number].append(_Part(tensor=tensor, offset_bytes=start))
                start += tensor.nbytes
        self._end = start

    @property
    def is_there(self) -> bool:
        """Whether it can be read: whole, and made of exactly this. Anything else is as if not there."""
        start = MAGIC + struct.pack("<Q", len(self._header)) + self._header
        try:
            with self.path.open("rb") as file:
                if file.read(len(start)) != start:
                    return False
                file.seek(self._end)
                return file.read() == END
        except OSError:
            return False

    def read(self, number: int) -> int:
        """Fill the weight `number` from the file; return its bytes."""
        for part in self._parts[number]:
            tensor = part.tensor
            ref = TensorRef(
                name=self._items[number].source.names[0],
                dtype=DTYPE_NAMES.get(tensor.dtype, "U8"),
                shape=tuple(tensor.shape),
                path=self.path,
                offset_bytes=part.offset_bytes,
                size_bytes=tensor.nbytes,
            )
            read_bytes(ref, tensor.data_ptr(), tensor.nbytes)
        self._items[number].stored.finish()
        return self._items[number].stored.nbytes

    def write(self) -> None:
        """Write it. Raises CheckpointError where that cannot be; nothing is left then."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Its end shows whether all of it reached the disk.
            with Batch(is_durable=False) as batch:
                with batch.open(self.path) as file:
                    file.write(MAGIC + struct.pack("<Q", len(self._header)) + self._header)
                    for parts in self._parts.values():
                        for part in parts:
                            file.write(bytes(part.offset_bytes - file.tell()))
                            file.write(part.tensor.flatten().view(torch.uint8).numpy().data)
                    file.write(END)
                batch.publish()
        except OSError as error:
            raise CheckpointError(
                f"the packed copy of {self._end:,} bytes cannot be kept in {self._folder}: {error}."
            ) from error

    def _hashes(self, files: Iterable[Path]) -> list[str]:
        """Return the hash of each file's contents, and remember those that were not known."""
        try:
            return content_hashes(files, self._folder / HASHES)
        except OSError as error:
            raise CheckpointError(
                f"packed copies cannot be kept in {self._folder}: {error}. Choose another folder."
            ) from error
