"""Merges an adapter into the weights it was trained over, as files: one tensor in memory at a time.

W + scale x B A is computed in float32 and rounded once to the dtype of W. Everything else of the base's
folder is copied.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from hanok.checkpoint.adapter_files import PREFIX, A, AdapterFiles, B, open_adapter
from hanok.checkpoint.aside import folder_aside
from hanok.checkpoint.card import Step, add_step
from hanok.checkpoint.convert import COMPANION_SUFFIXES
from hanok.checkpoint.files import INDEX_SUFFIX, open_checkpoint
from hanok.checkpoint.safetensors import TensorRef
from hanok.checkpoint.writer import TensorData, write_safetensors
from hanok.errors import CheckpointError
from hanok.memory.account import Understood, understand
from hanok.memory.save import bytes_of
from hanok.memory.tensors import MappedFiles
from hanok.models.family import Source, sources


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    progress: Callable[[int], None] | None = None,
    step: Step | None = None,
) -> int:
    """Write a checkpoint whose weights have an adapter in them; return how many weights changed.

    `step` is written into its card. Raises CheckpointError where the adapter does not fit the base,
    where a merged weight is not finite, or where the output exists and is not empty; UnsupportedError
    for a quantized base.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another folder.")
    checkpoint = open_checkpoint(base)
    understood = understand(checkpoint)
    files = open_adapter(adapter)
    places = _places(understood)
    paths = set(files.paths())
    if unknown := sorted(paths - places.keys()):
        raise CheckpointError(
            f"{files.folder}: {unknown[0]} is no product of {base}. Check that the adapter was "
            "trained on this base."
        )
    changed = {places[path][0]: (path, places[path][1]) for path in paths}
    mapped = MappedFiles()
    # As it was opened: matrices of all experts in one tensor are one tensor in the result too.
    tensors = [
        TensorData(
            name=ref.name,
            dtype=ref.dtype,
            shape=ref.shape,
            read=partial(_read, mapped, ref, files, changed.get(ref.name)),
        )
        for ref in checkpoint.tensors.values()
    ]
    folder = understood.checkpoint.folder
    with folder_aside(target) as unfinished:
        write_safetensors(unfinished, tensors, metadata={"format": "pt"}, progress=progress)
        for file in sorted(folder.iterdir()):
            is_companion = file.suffix in COMPANION_SUFFIXES and file.is_file()
            if is_companion and not file.name.endswith(INDEX_SUFFIX):
                shutil.copyfile(file, unfinished / file.name)
        if step is not None:
            add_step(unfinished, step)
    return len(changed)


def _places(understood: Understood) -> dict[str, tuple[str, Source]]:
    """Return the tensor that each product is in the files, by the path that adapters know it by."""
    usual: Mapping[str, Source] = sources(understood.family, understood.config, ())
    return {
        path.removesuffix(".weight"): (stored, source)
        for name, source in understood.table.items()
        if not source.stack
        for path, stored in zip(usual[name].names, source.names, strict=True)
        if path.endswith(".weight")
    }


def _read(
    mapped: MappedFiles, ref: TensorRef, files: AdapterFiles, place: tuple[str, Source] | None
) -> memoryview:
    weight = mapped.view(ref)
    if place is None:
        return bytes_of(weight)
    path, source = place
    a, b = (mapped.view(files.tensors[f"{PREFIX}{path}{end}"]).float() for end in (A, B))
    delta = b @ a * files.config.scale_of(path)
    if source.layout == "columns":
        delta = delta.t()
    if weight.shape != delta.shape:
        raise CheckpointError(
            f"{files.folder}: the adapter of {path} is {list(delta.shape)}, and {ref.name} "
            f"{list(weight.shape)}. Check that it was trained on this base."
        )
    merged = (weight.float() + delta).to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise CheckpointError(
            f"{ref.name} would have numbers that are not finite; nothing was written."
        )
    return bytes_of(merged)
