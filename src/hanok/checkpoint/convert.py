"""Converts a checkpoint of pickles to safetensors, tensor by tensor, and verifies the result.

Names that view the same bytes in the same way are written once. The output projection is the name
that is dropped, because a loader that ties weights looks for the embedding; the config then gets
`tie_word_embeddings`, and if it says false, both are written.

Invariant: a file gets its name only after it was read back. For every name of the source, the result has
the same dtype, shape and bytes, under that name or under the one in `ConvertReport.shared`. Existing
files are never overwritten, apart from that one key of config.json; a second run changes nothing, and
removes what a killed one left.

Cost: one tensor of memory; the source is read twice and the result written once and read once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hanok.checkpoint.aside import remove_leftovers
from hanok.checkpoint.files import (
    INDEX_SUFFIX,
    PICKLES,
    SAFETENSORS,
    Checkpoint,
    find_entries,
    open_checkpoint,
    read_object,
    read_tensor_bytes,
    weights_in,
)
from hanok.checkpoint.formats import refuse_other_layouts
from hanok.checkpoint.safetensors import TensorRef, read_header
from hanok.checkpoint.writer import (
    CHUNK_BYTES,
    MAX_SHARD_BYTES,
    METADATA,
    TensorData,
    write_bytes,
    write_json,
    write_safetensors,
)
from hanok.errors import CheckpointError

OUTPUT_NAMES = ("lm_head.weight", "embed_out.weight")
"""Endings of output projections that may be tied to the embedding."""
COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".md")
TIE_KEY = "tie_word_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """What a conversion wrote, or found to be there."""

    files: tuple[Path, ...]
    """The safetensors files, then their index if there is one."""
    num_tensors: int
    num_bytes: int
    """Of the tensors, without headers."""
    shared: Mapping[str, str]
    """For each name that was not written, the name that has its bytes."""
    already_done: bool


def convert(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write the checkpoint `source`, a folder or one file, as safetensors to `destination`.

    Without a destination the files are written next to the source; into another folder, the config,
    tokenizer and text files next to the weights are copied too. `on_start` gets the bytes that will be
    written and verified, and `progress` the bytes done since its last call. A
    destination that holds other weights is a CheckpointError, and so is a result that differs.
    """
    source = Path(source)
    if source.is_dir():
        refuse_other_layouts(source, weights_in(source))
    entry = _find_source(source)
    checkpoint = open_checkpoint(entry, needs_config=False)
    if checkpoint.disagreements:
        raise CheckpointError(
            f"{entry}: {'; '.join(checkpoint.disagreements)}. A conversion could not be known to be "
            "whole; get index and shards again"
        )
    folder = Path(destination) if destination is not None else checkpoint.folder
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; the destination must be a folder")
    kept, shared = _drop_shared(checkpoint)
    companions = _companions(checkpoint, folder, shared)
    remove_leftovers(folder)
    files = _find_done(checkpoint, kept, folder)
    already_done = files is not None
    if files is None:
        if on_start is not None:
            on_start(2 * sum(ref.dense_bytes for ref in kept))
        files = _write(checkpoint, kept, folder, max_shard_bytes, progress)
    for path, content in companions.items():
        if isinstance(content, bytes):
            write_bytes(path, content)
        else:
            write_json(path, content)
    return ConvertReport(
        files=files,
        num_tensors=len(kept),
        num_bytes=sum(ref.dense_bytes for ref in kept),
        shared=shared,
        already_done=already_done,
    )


def _find_source(source: Path) -> Path:
    """Return the weights to convert: in a folder that has both formats, the pickles."""
    if source.is_dir():
        for kind in (PICKLES, SAFETENSORS):
            entries = find_entries(source, kind)
            if len(entries) == 1:
                return entries[0]
    return source


def _drop_shared(checkpoint: Checkpoint) -> tuple[list[TensorRef], dict[str, str]]:
    """Return the tensors to write, and for each dropped name the one that replaces it."""
    groups: dict[tuple[Any, ...], list[TensorRef]] = {}
    for ref in checkpoint.tensors.values():
        # Tensors without elements have no bytes to share.
        region = (ref.path, ref.offset_bytes, ref.dtype, ref.shape, ref.strides)
        groups.setdefault(region if ref.size_bytes else (ref.name,), []).append(ref)
    shared: dict[str, str] = {}
    for group in groups.values():
        keeper = min(group, key=lambda ref: ref.name.endswith(OUTPUT_NAMES))  # the first of them
        for ref in group:
            is_needed = ref.name.endswith(OUTPUT_NAMES) and _says_tied(checkpoint.config) is False
            if ref is not keeper and not is_needed:
                shared[ref.name] = keeper.name
    return [ref for name, ref in checkpoint.tensors.items() if name not in shared], shared


def _says_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the config ties the output to the embedding; None if it does not say."""
    text_config = config.get("text_config")
    nested = text_config.get(TIE_KEY) if isinstance(text_config, dict) else None
    said = [value for value in (config.get(TIE_KEY), nested) if isinstance(value, bool)]
    return all(said) if said else None


def _companions(
    checkpoint: Checkpoint, folder: Path, shared: Mapping[str, str]
) -> dict[Path, bytes | dict[str, Any]]:
    """Return the files to write next to the weights: bytes, or an object to be written as JSON.

    A different file of that name in `folder` is a CheckpointError, before anything is written.
    """
    wanted: dict[Path, bytes | dict[str, Any]] = {}
    in_place = folder.resolve() == checkpoint.folder.resolve()
    if not in_place:
        for file in sorted(checkpoint.folder.iterdir()):
            is_companion = file.suffix in COMPANION_SUFFIXES and file.is_file()
            if is_companion and not file.name.endswith(INDEX_SUFFIX):
                wanted[folder / file.name] = file.read_bytes()
    config_path = folder / "config.json"
    drops_output = any(name.endswith(OUTPUT_NAMES) for name in shared)
    has_config = (checkpoint.folder / "config.json").is_file()
    if has_config and drops_output and _says_tied(checkpoint.config) is None:
        wanted[config_path] = {**checkpoint.config, TIE_KEY: True}
    missing: dict[Path, bytes | dict[str, Any]] = {}
    for path, content in wanted.items():
        if in_place or not path.exists():
            missing[path] = content
        elif content != (path.read_bytes() if isinstance(content, bytes) else read_object(path)):
            raise CheckpointError(
                f"{path}: exists and differs from {checkpoint.folder / path.name}; remove it or "
                "choose another destination"
            )
    return missing


def _find_done(
    checkpoint: Checkpoint, kept: Sequence[TensorRef], folder: Path
) -> tuple[Path, ...] | None:
    """Return the safetensors in `folder` if they are those of the checkpoint, None without any."""
    entries = find_entries(folder, SAFETENSORS) if folder.is_dir() else []
    if not entries:
        return None
    is_source = checkpoint.files[0].resolve() in {entry.resolve() for entry in entries}
    existing = checkpoint if is_source else open_checkpoint(folder, needs_config=False)
    wanted = {ref.name: (ref.dtype, ref.shape) for ref in kept}
    found = {name: (ref.dtype, ref.shape) for name, ref in existing.tensors.items()}
    if found != wanted:
        name = min(dict(wanted.items() ^ found.items()))
        raise CheckpointError(
            f"{folder}: holds safetensors that differ from {checkpoint.files[0]}: tensor {name!r} "
            f"is {found.get(name, 'absent')} there and {wanted.get(name, 'absent')} in the source; "
            "delete them or choose another destination"
        )
    indexes = (entry for entry in entries if entry.name.endswith(INDEX_SUFFIX))
    return (*existing.files, *indexes)


def _write(
    checkpoint: Checkpoint,
    kept: Sequence[TensorRef],
    folder: Path,
    max_shard_bytes: int,
    progress: Callable[[int], None] | None,
) -> tuple[Path, ...]:
    """Write the tensors, compare them with the source, and return the files."""
    tensors = [
        TensorData(
            name=ref.name,
            dtype=ref.dtype,
            shape=ref.shape,
            read=partial(read_tensor_bytes, ref),
        )
        for ref in kept
    ]
    return write_safetensors(
        folder,
        tensors,
        max_shard_bytes=max_shard_bytes,
        metadata={**checkpoint.metadata, **METADATA},
        progress=progress,
        # Before the files are renamed: a second run takes renamed files as verified.
        verify=lambda files: _verify(files, kept, progress),
    )


def _verify(
    files: Sequence[Path], kept: Sequence[TensorRef], progress: Callable[[int], None] | None
) -> None:
    """Refuse files that do not give back every tensor byte for byte."""
    written: dict[str, TensorRef] = {}
    for path in files:
        written |= read_header(path)[0]
    for ref in kept:
        copy = written.get(ref.name)
        if copy is None or (copy.dtype, copy.shape) != (ref.dtype, ref.shape):
            raise CheckpointError(
                f"tensor {ref.name!r} of {ref.path} came back as {copy}; the new files were "
                "removed, and the disk should be checked"
            )
        wanted = memoryview(read_tensor_bytes(ref))
        with copy.path.open("rb") as file:
            file.seek(copy.offset_bytes)
            for start in range(0, len(wanted), CHUNK_BYTES):
                part = wanted[start : start + CHUNK_BYTES]
                if file.read(len(part)) != part:
                    raise CheckpointError(
                        f"{copy.path}: tensor {ref.name!r} differs from {ref.path} after byte "
                        f"{start}; the new files were removed, and the disk should be checked"
                    )
                if progress is not None:
                    progress(len(part))
