"""Checkpoints of a training: complete ones only, found again by the newest, the others with the reason.

    OUTPUT/checkpoints/step-00000120/
        adapter_config.json, adapter_model.safetensors     what has been learnt, as PEFT reads it
        optimizer.safetensors                              AdamW's moments
        state.json                                         the step and the options
        manifest.json                                      bytes and sha256 of each of these

A checkpoint is written under a temporary name, synced and renamed; older ones are removed only then.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hanok.checkpoint.aside import folder_aside
from hanok.checkpoint.files import open_checkpoint, read_object
from hanok.checkpoint.writer import TensorData, write_json, write_tensors
from hanok.errors import CheckpointError
from hanok.memory.save import bytes_of
from hanok.memory.tensors import DTYPE_NAMES, MappedFiles

FOLDER, OPTIMIZER, STATE, MANIFEST = (
    "checkpoints",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
NAME = re.compile(r"step-(\d{8})")
HASH_BYTES = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The checkpoint that a training goes on from, and why newer ones were left."""

    folder: Path
    step: int
    skipped: tuple[str, ...]


SaveLearnt = Callable[[Path], None]


class CheckpointWriter:
    """Writes the checkpoints of one training below its output folder."""

    def __init__(self, output: Path, keep: int) -> None:
        self._folder = output / FOLDER
        self._keep = keep

    def write(
        self,
        step: int,
        state: Mapping[str, Any],
        optimizer: Iterable[tuple[str, Tensor]],
        save_learnt: SaveLearnt,
    ) -> Path:
        """Write the checkpoint of a step; `save_learnt` writes what was learnt into a folder."""
        target = self._folder / f"step-{step:08}"
        if target.exists():
            if why_incomplete(target) is None:
                return target
            shutil.rmtree(target)  # the training went on from the one before it
        with folder_aside(target) as unfinished:
            save_learnt(unfinished)
            tensors = [
                TensorData(
                    name=name,
                    dtype=DTYPE_NAMES[value.dtype],
                    shape=tuple(value.shape),
                    read=lambda value=value: bytes_of(value),  # type: ignore[misc]  # a default of this turn
                )
                for name, value in optimizer
            ]
            write_tensors(unfinished / OPTIMIZER, tensors)
            write_json(unfinished / STATE, state)
            write_json(unfinished / MANIFEST, manifest_of(unfinished))
            descriptor = os.open(unfinished, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        # Damaged ones of later steps count for none: this one is complete, and stays.
        earlier = [folder for number, folder in _numbered(self._folder) if number <= step]
        for old in earlier[self._keep :]:
            shutil.rmtree(old)
        return target


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and sha256 of each file of a folder, the manifest aside."""
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _hash(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def why_incomplete(folder: Path) -> str | None:
    """Return why a folder is no complete checkpoint; None where it is one."""
    try:
        expected = read_object(folder / MANIFEST)
    except CheckpointError:
        return f"{MANIFEST} is absent or damaged"
    for name, facts in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is absent"
        if file.stat().st_size != facts.get("bytes"):
            return (
                f"{name} has {file.stat().st_size:,} bytes and should have {facts.get('bytes'):,}"
            )
        if _hash(file) != facts.get("sha256"):
            return f"{name} was changed since it was written"
    return None


def find_newest(output: Path) -> Found | None:
    """Return the newest complete checkpoint below an output folder, None where there is none at all.

    Raises CheckpointError where there are some and none is complete.
    """
    skipped: list[str] = []
    for step, folder in _numbered(output / FOLDER):
        reason = why_incomplete(folder)
        if reason is None:
            return Found(folder=folder, step=step, skipped=tuple(skipped))
        skipped.append(f"{folder.name}: {reason}")
    if skipped:
        raise CheckpointError(
            f"{output / FOLDER}: no checkpoint is complete ({'; '.join(skipped)}). Start anew in "
            "another folder."
        )
    return None


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a checkpoint's state and its optimizer's tensors."""
    mapped = MappedFiles()
    tensors = open_checkpoint(folder / OPTIMIZER, needs_config=False).tensors
    return read_object(folder / STATE), {name: mapped.view(ref) for name, ref in tensors.items()}


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return checkpoints with their steps, the newest first."""
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), entry)
        for entry in folder.iterdir()
        if (match := NAME.fullmatch(entry.name)) and entry.is_dir()
    ]
    return sorted(found, reverse=True)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()
