"""What a checkpoint's files hold beside the decoder: a vision tower, layers that guess tokens ahead.

It is never read, takes no memory, and is said wherever a checkpoint is looked at. Imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hanok.checkpoint.files import TensorRef
from hanok.models.family import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Weights in a checkpoint's files that the decoder does not use, and that are never read."""

    name: str
    """What they are: "the vision tower"."""
    num_tensors: int
    num_bytes: int

    def __str__(self) -> str:
        count = f"{self.num_tensors} tensor{'s' * (self.num_tensors > 1)}"
        return f"left out: {self.name}, {count} of {self.num_bytes:,} bytes"


def left_out(family: Family, tensors: Mapping[str, TensorRef]) -> tuple[LeftOut, ...]:
    """Return what of the files is not read because it is no part of the decoder."""
    found = []
    for name, refs in left_out_tensors(family, tensors).items():
        size = sum(ref.size_bytes for ref in refs)
        found.append(LeftOut(name=name, num_tensors=len(refs), num_bytes=size))
    return tuple(found)


def left_out_tensors(
    family: Family, tensors: Mapping[str, TensorRef]
) -> dict[str, list[TensorRef]]:
    """Return the tensors of each thing that the family leaves out and the files have."""
    found = {
        name: [ref for key, ref in tensors.items() if re.fullmatch(pattern, key)]
        for name, pattern in family.left_out.items()
    }
    return {name: refs for name, refs in found.items() if refs}
