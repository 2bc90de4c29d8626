"""Opens a checkpoint on disk: its config and, for every tensor, the place of its bytes.

A checkpoint is a folder in the Hugging Face layout, or one weights file with its config next to it.
Safetensors are preferred to pickles, a whole file to an index, a known name to an unknown one.

Invariant: a `Checkpoint` names each tensor once, and every index agrees with its shards about the
location of tensors that both name; what only one of them names is noted. Opening never runs code from
the checkpoint and never follows a name out of its folder.

Cost: opening reads headers only; `read_tensor_bytes` reads one tensor's range and nothing else.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from hanok.checkpoint.formats import ADAPTER_WEIGHTS, no_weights_error, refuse_other_layouts
from hanok.checkpoint.pickles import read_pickle_header
from hanok.checkpoint.safetensors import (
    DTYPE_BITS,
    TensorRef,
    parse_json_object,
    read_header,
)
from hanok.errors import CheckpointError

__all__ = [
    "DTYPE_BITS",
    "INDEX_SUFFIX",
    "PICKLES",
    "SAFETENSORS",
    "Checkpoint",
    "TensorRef",
    "WeightsKind",
    "find_entries",
    "open_checkpoint",
    "read_header",
    "read_object",
    "read_tensor_bytes",
    "weights_in",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsKind:
    """How the weights of one format are named in a folder."""

    whole: str
    index: str
    suffixes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    """Beginnings of file names that hold training state and not weights."""


SAFETENSORS = WeightsKind(
    whole="model.safetensors", index="model.safetensors.index.json", suffixes=(".safetensors",)
)
PICKLES = WeightsKind(
    whole="pytorch_model.bin",
    index="pytorch_model.bin.index.json",
    suffixes=(".bin", ".pt", ".pth"),
    ignored=("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state"),
)
INDEX_SUFFIX = ".index.json"
ITEM_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
LISTED_NAMES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk: what its JSON files say and where its tensors lie."""

    folder: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """Empty where the checkpoint has no generation_config.json."""
    tensors: Mapping[str, TensorRef]
    """In file order."""
    files: tuple[Path, ...]
    """The weight files."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The `__metadata__` of the safetensors files; of shards that differ the last one counts."""
    disagreements: tuple[str, ...] = ()
    """What the index names and no shard has, and vice versa. That need not concern the decoder: an index
    may list a tied head, or buffers that are no longer saved."""


def open_checkpoint(path: str | Path, *, needs_config: bool = True) -> Checkpoint:
    """Return the checkpoint at `path`: a folder, one weights file, or a weights index.

    With `needs_config` false, an absent config.json gives an empty config. Whatever is missing,
    damaged or contradictory is a CheckpointError.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; check the path")
    if needs_config:
        refuse_other_layouts(path, weights_in(path))
    folder, entry = (path, _find_entry(path)) if path.is_dir() else (path.parent, path)
    config_path = folder / "config.json"
    if needs_config and not config_path.is_file():
        raise CheckpointError(
            f"{config_path}: is absent, and without it the architecture is not known; "
            "copy it from where the checkpoint comes from"
        )
    generation_path = folder / "generation_config.json"
    config = read_object(config_path) if config_path.is_file() else {}
    generation_config = read_object(generation_path) if generation_path.is_file() else {}
    shards = _read_index(entry) if entry.name.endswith(INDEX_SUFFIX) else {entry: None}
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    for file in shards:
        found, notes = _read_weights(file)
        _check_names(file, found, tensors)
        tensors |= found
        metadata |= notes
    return Checkpoint(
        folder=folder,
        config=config,
        generation_config=generation_config,
        tensors=tensors,
        files=tuple(shards),
        metadata=metadata,
        disagreements=_disagreements(entry, shards, tensors),
    )


def find_entries(folder: Path, kind: WeightsKind) -> list[Path]:
    """Return the weights of one kind in `folder`: the whole file, else the index, else all others.

    More than one path means that nothing declares which of them is the checkpoint.
    """
    for name in (kind.whole, kind.index):
        if (folder / name).is_file():
            return [folder / name]
    found = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in kind.suffixes
        and file.is_file()
        and not file.name.startswith((".", *kind.ignored))
    )
    return [file for file in found if file.name not in ADAPTER_WEIGHTS] or found


def weights_in(path: Path) -> list[Path]:
    """Return the files of a folder that could be its checkpoint, of either format."""
    if not path.is_dir():
        return [path]
    return [entry for kind in (SAFETENSORS, PICKLES) for entry in find_entries(path, kind)]


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; CheckpointError if it cannot be read or holds no object."""
    return parse_json_object(_read_file(path), str(path))


def read_tensor_bytes(ref: TensorRef) -> bytearray:
    """Return the tensor's bytes in C order; reads only its range of the file.

    Memory: the range, and for a tensor with strides its dense bytes as well.
    """
    data = bytearray(ref.size_bytes)
    view, done = memoryview(data), 0
    try:
        with ref.path.open("rb", buffering=0) as file:
            file.seek(ref.offset_bytes)
            while done < ref.size_bytes and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise CheckpointError(f"{ref.path}: tensor {ref.name!r} cannot be read: {error}") from error
    if done < ref.size_bytes:
        raise CheckpointError(
            f"{ref.path}: tensor {ref.name!r} needs {ref.size_bytes} bytes from byte "
            f"{ref.offset_bytes} on, and the file ends after {done} of them; it was changed or "
            "cut off since it was opened, get it again"
        )
    return data if ref.strides is None else _gather(data, ref.shape, ref.strides, ref.dtype)


def _gather(
    data: bytearray, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str
) -> bytearray:
    """Return the elements of a strided view in C order; `data` starts at its first element."""
    item_bytes = DTYPE_BITS[dtype] // 8
    dense: list[tuple[int, int, int]] = []  # (extent, stride in data, stride in the result)
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if dense and stride == dense[-1][1] * dense[-1][0]:
            inner = dense.pop()  # both dimensions advance evenly, so they are one
            dense.append((inner[0] * extent, inner[1], inner[2]))
        elif extent != 1:
            dense.append((extent, stride, step))
        step *= extent
    result = bytearray(step * item_bytes)
    if not result:
        return result
    item_format = ITEM_FORMATS[item_bytes]
    source = memoryview(data).cast(item_format)
    target = memoryview(result).cast(item_format)
    # One copy in C per row: rows run along the longest dimension, so there are few of them.
    dense.sort()
    extent, stride, jump = dense.pop() if dense else (1, 1, 1)
    for index in itertools.product(*(range(dimension[0]) for dimension in dense)):
        begin = sum(i * dimension[1] for i, dimension in zip(index, dense, strict=True))
        to = sum(i * dimension[2] for i, dimension in zip(index, dense, strict=True))
        if stride:
            row = source[begin : begin + (extent - 1) * stride + 1 : stride]
        else:
            row = memoryview(source[begin : begin + 1].tobytes() * extent).cast(item_format)
        target[to : to + (extent - 1) * jump + 1 : jump] = row
    return result


def _find_entry(folder: Path) -> Path:
    """Return the one weights file or index of `folder`, safetensors first."""
    for kind in (SAFETENSORS, PICKLES):
        entries = find_entries(folder, kind)
        if len(entries) > 1:
            raise CheckpointError(
                f"{folder}: holds {_listed(entry.name for entry in entries)}, and neither "
                f"{kind.whole} nor {kind.index} says which of them is the checkpoint; give the "
                "path of one file, or get the index that belongs to the shards"
            )
        if entries:
            return entries[0]
    raise no_weights_error(folder, _listed(sorted(file.name for file in folder.iterdir())))


def _read_weights(file: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    if file.suffix in SAFETENSORS.suffixes:
        return read_header(file)
    if file.suffix in PICKLES.suffixes:
        return read_pickle_header(file), {}
    raise CheckpointError(
        f"{file}: is not a weights file; known endings are .safetensors, .bin, .pt and .pth"
    )


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    """Return the tensor names that an index promises for each of its shards."""
    weight_map = parse_json_object(_read_file(index), str(index), is_strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: has no weight_map from tensor names to files, so it is not a weights index; "
            "get it again"
        )
    shards: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        _check_inside(index, name, file_name)
        shards.setdefault(file_name, set()).add(name)
    missing = [name for name in sorted(shards) if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: names {len(missing)} of {len(shards)} shards that are missing: "
            f"{_listed(missing)}; download them into {index.parent}"
        )
    return {index.parent / name: shards[name] for name in sorted(shards)}


def _check_inside(index: Path, name: str, file_name: Any) -> None:
    """Refuse a shard name that could lead out of the folder of the index.

    Only the spelling counts: a shard may be a symbolic link, as in the Hugging Face cache.
    """
    if not isinstance(file_name, str) or not file_name:
        raise CheckpointError(f"{index}: the shard of tensor {name!r} is {file_name!r}, no name")
    for pure in (PurePosixPath(file_name), PureWindowsPath(file_name)):
        if pure.anchor or ".." in pure.parts or "\0" in file_name:
            raise CheckpointError(
                f"{index}: the shard of tensor {name!r} is {file_name!r}, which lies outside "
                f"{index.parent}; such an index is damaged or malicious and is not followed"
            )


def _check_names(
    file: Path, found: Mapping[str, TensorRef], earlier: Mapping[str, TensorRef]
) -> None:
    """Refuse a shard that repeats a tensor."""
    for name in found:
        if name in earlier:
            raise CheckpointError(
                f"tensor {name!r} is in two files, {earlier[name].path} and {file}, so it is not "
                "clear which one counts; remove the file that does not belong to the checkpoint"
            )


def _disagreements(
    index: Path, shards: Mapping[Path, set[str] | None], tensors: Mapping[str, TensorRef]
) -> tuple[str, ...]:
    """Return what only the index or only a shard names; a tensor in another shard is an error."""
    promised = {name: file for file, names in shards.items() for name in names or ()}
    if not promised:
        return ()
    for name, file in sorted(promised.items()):
        if name in tensors and tensors[name].path != file:
            raise CheckpointError(
                f"{index}: gives tensor {name!r} to {file.name}, and it lies in "
                f"{tensors[name].path.name}; shards and index are of different versions, get them again"
            )
    found = []
    if absent := sorted(promised.keys() - tensors.keys()):
        found.append(
            f"{index.name} lists {len(absent)} tensors that no shard has: {_listed(absent)}"
        )
    if extra := sorted(tensors.keys() - promised.keys()):
        found.append(f"{index.name} does not list {len(extra)} tensors of shards: {_listed(extra)}")
    return tuple(found)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - LISTED_NAMES
    return ", ".join(names[:LISTED_NAMES]) + (f" and {rest} more" if rest > 0 else "")
