"""The weights of a folder by their headers: shards and their index, as far as they can be read.

What `open_checkpoint` refuses as a whole is looked at piece by piece here, so that one damaged shard
does not hide what is wrong elsewhere. Imports no torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hanok.check.adapter import adapter_weights
from hanok.check.finding import Finding, plural, shown
from hanok.checkpoint.files import (
    INDEX_SUFFIX,
    PICKLES,
    SAFETENSORS,
    Checkpoint,
    WeightsKind,
    find_entries,
    read_object,
)
from hanok.checkpoint.formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, foreign_weights
from hanok.checkpoint.pickles import ADVICE, read_pickle_header
from hanok.checkpoint.safetensors import TensorRef, parse_json_object, read_header
from hanok.errors import CheckpointError, HanokError

SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the files of a checkpoint hold."""

    entry: Path | None
    """The file or index that readers begin with; None where nothing says which."""
    files: tuple[Path, ...]
    """The weights files that could be read."""
    tensors: Mapping[str, TensorRef]
    is_whole: bool
    """Whether every file that there should be could be read."""
    unread: tuple[Path, ...] = ()
    """Those that could not."""
    promised: frozenset[str] = frozenset()
    """The tensors that an index lists."""

    def checkpoint(
        self, folder: Path, config: Mapping[str, Any], generation_config: Mapping[str, Any]
    ) -> Checkpoint:
        """Return the weights as `open_checkpoint` would, had it accepted the index."""
        return Checkpoint(
            folder=folder,
            config=config,
            generation_config=generation_config,
            tensors=self.tensors,
            files=self.files,
        )


NOTHING = Weights(entry=None, files=(), tensors={}, is_whole=False)


def read_weights(folder: Path) -> tuple[Weights, list[Finding]]:
    """Return the weights of a folder as far as they can be read, and what is wrong with them."""
    adapter = adapter_weights(folder)
    if adapter is not None:
        return _one_file(adapter)
    for kind in (SAFETENSORS, PICKLES):
        entries = find_entries(folder, kind)
        if len(entries) > 1:
            return _without_index(folder, kind, entries)
        if entries and entries[0].name.endswith(INDEX_SUFFIX):
            return _with_index(entries[0])
        if entries and (_is_named(entries[0], kind) or (folder / CONFIG).is_file()):
            return _one_file(entries[0])
    foreign = foreign_weights(folder)
    if foreign or (folder / CONFIG).is_file():
        what = f"no weights that hanok reads, but {foreign}" if foreign else "no weights"
        return NOTHING, [
            Finding(
                level="warning" if foreign else "error",
                kind="no-weights",
                where="folder",
                what=f"holds {what}",
                advice="get the *.safetensors files of the model",
            )
        ]
    return NOTHING, []


def shards_of(folder: Path, kind: WeightsKind) -> list[Path]:
    """Return the shards of a folder if their names count them completely, else nothing."""
    found = {}
    totals = set()
    for file in sorted(folder.iterdir()):
        match = SHARD.fullmatch(file.name)
        if match and file.suffix in kind.suffixes and file.is_file():
            found[int(match[1])] = file
            totals.add(int(match[2]))
    is_complete = len(totals) == 1 and sorted(found) == list(range(1, max(totals) + 1))
    return list(found.values()) if is_complete else []


def index_of(tensors: Mapping[str, TensorRef], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the index that belongs to shards; other keys of `old` are kept."""
    metadata = old.get("metadata")
    kept = dict(metadata) if isinstance(metadata, dict) else {}
    names = sorted(tensors)
    return {
        **old,
        "metadata": {**kept, "total_size": total_bytes(tensors)},
        "weight_map": {name: tensors[name].path.name for name in names},
    }


def total_bytes(tensors: Mapping[str, TensorRef]) -> int:
    """Return the bytes of tensors without headers, as an index counts them."""
    return sum(ref.dense_bytes for ref in tensors.values())


def _is_named(file: Path, kind: WeightsKind) -> bool:
    """Return whether a file is weights by its name; a .bin may be anything."""
    return file.name == kind.whole or kind is SAFETENSORS or file.name in ADAPTER_WEIGHTS


def _one_file(file: Path) -> tuple[Weights, list[Finding]]:
    if file.name in ADAPTER_WEIGHTS and not (file.parent / ADAPTER_CONFIG).is_file():
        finding = Finding(
            level="error",
            kind="adapter",
            where=file.name,
            what=f"holds an adapter's weights, and {ADAPTER_CONFIG} is missing",
            advice="get it from where the adapter comes from",
        )
        return NOTHING, [finding]
    try:
        tensors, metadata = _header(file)
    except HanokError as error:
        unread = Weights(entry=file, files=(), tensors={}, is_whole=False, unread=(file,))
        return unread, [_damaged(file, error)]
    weights = Weights(entry=file, files=(file,), tensors=tensors, is_whole=True)
    return weights, [*_format_findings(file, metadata)]


def _without_index(
    folder: Path, kind: WeightsKind, entries: Sequence[Path]
) -> tuple[Weights, list[Finding]]:
    shards = shards_of(folder, kind)
    names = shown(entry.name for entry in entries)
    if shards != list(entries):
        finding = Finding(
            level="error",
            kind="no-index",
            where="folder",
            what=f"holds {names}, and neither {kind.whole} nor {kind.index} says which is the model",
            advice="remove the files that are not, or get the index",
        )
        return NOTHING, [finding]
    weights, findings = _read_shards(shards, {})
    missing = Finding(
        level="error",
        kind="no-index",
        where=kind.index,
        what=f"is missing next to {plural(len(shards), 'shard')}, so readers find no weights",
        advice="rebuild it from the shards",
        is_mendable=weights.is_whole,
    )
    return replace(weights, entry=folder / kind.index), [missing, *findings]


def _with_index(index: Path) -> tuple[Weights, list[Finding]]:
    kind = SAFETENSORS if index.name == SAFETENSORS.index else PICKLES
    try:
        content = parse_json_object(index.read_bytes(), index.name, is_strict=True)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index.name} has no weight_map from tensor names to files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{index.name} puts tensor {name!r} into {file!r}, which is no file of the folder"
                )
    except (OSError, CheckpointError) as error:
        shards = shards_of(index.parent, kind)
        weights, findings = _read_shards(shards, {}) if shards else (NOTHING, [])
        broken = Finding(
            level="error",
            kind="index",
            where=index.name,
            what=str(error).removeprefix(f"{index.name} "),
            advice="rebuild it from the shards" if shards else "get it again",
            is_mendable=weights.is_whole,
        )
        return replace(weights, entry=index), [broken, *findings]
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    present = [index.parent / name for name in names if name not in missing]
    weights, findings = _read_shards(present, weight_map)
    if missing:
        findings.insert(
            0,
            Finding(
                level="error",
                kind="shard-missing",
                where=index.name,
                what=f"lacks {plural(len(missing), 'file')} of those it names: {shown(missing)}",
                advice="download them into the folder",
            ),
        )
    is_whole = weights.is_whole and not missing
    findings += _index_findings(index, content, weight_map, weights.tensors, is_whole=is_whole)
    return replace(
        weights, entry=index, is_whole=is_whole, promised=frozenset(weight_map)
    ), findings


def _read_shards(
    shards: Sequence[Path], weight_map: Mapping[str, str]
) -> tuple[Weights, list[Finding]]:
    """Return what shards hold; of a tensor in two of them the one that the index names counts."""
    tensors: dict[str, TensorRef] = {}
    findings: list[Finding] = []
    readable: list[Path] = []
    unread: list[Path] = []
    is_whole = True
    for file in shards:
        try:
            found, metadata = _header(file)
        except HanokError as error:
            findings.append(_damaged(file, error))
            unread.append(file)
            is_whole = False
            continue
        readable.append(file)
        findings += _format_findings(file, metadata)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            is_whole = False
            findings.append(
                Finding(
                    level="error",
                    kind="tensor-twice",
                    where=file.name,
                    what=f"has {plural(len(twice), 'tensor')} that {tensors[twice[0]].path.name} has "
                    f"too: {shown(twice)}",
                    advice="remove the file that does not belong to the model",
                )
            )
        for name, ref in found.items():
            if name not in tensors or weight_map.get(name) == file.name:
                tensors[name] = ref
    return Weights(
        entry=None,
        files=tuple(readable),
        tensors=tensors,
        is_whole=is_whole,
        unread=tuple(unread),
    ), findings


def _header(file: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    if file.suffix in SAFETENSORS.suffixes:
        return read_header(file)
    return read_pickle_header(file), {"format": "pt"}


def _index_findings(
    index: Path,
    content: Mapping[str, Any],
    weight_map: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
    *,
    is_whole: bool,
) -> Iterator[Finding]:
    """Yield where an index and its shards say different things."""
    elsewhere = [
        f"{name} (in {tensors[name].path.name})"
        for name, file in sorted(weight_map.items())
        if name in tensors and tensors[name].path.name != file
    ]
    if elsewhere:
        yield Finding(
            level="error",
            kind="index-shard",
            where=index.name,
            what=f"gives {plural(len(elsewhere), 'tensor')} to another file than has it: "
            f"{shown(elsewhere)}",
            advice="rebuild it from the shards",
            is_mendable=is_whole,
        )
    if not is_whole:
        return
    for kind, names, what in (
        ("index-absent", weight_map.keys() - tensors.keys(), "lists {} that no file has: "),
        ("index-unlisted", tensors.keys() - weight_map.keys(), "does not list {} of its files: "),
    ):
        if names:
            yield Finding(
                level="warning",
                kind=kind,
                where=index.name,
                what=what.format(plural(len(names), "tensor")) + shown(sorted(names)),
                advice="rebuild it from the shards, unless a shard is of another version",
                is_mendable=True,
            )
    metadata = content.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    wanted = total_bytes(tensors)
    if said != wanted:
        yield Finding(
            level="warning",
            kind="total-size",
            where=index.name,
            what=f"says total_size {said!r}, and the tensors have {wanted} bytes",
            advice=f"write {wanted}",
            is_mendable=True,
        )


def _format_findings(file: Path, metadata: Mapping[str, str]) -> Iterator[Finding]:
    if file.suffix in SAFETENSORS.suffixes and "format" not in metadata:
        yield Finding(
            level="note",
            kind="no-format",
            where=file.name,
            what="has no `format` in its metadata, which older versions of transformers demand",
            advice="nothing for newer ones; a save writes it",
        )


def _damaged(file: Path, error: Exception) -> Finding:
    text = str(error)
    is_code = ADVICE.partition(".")[0] in text
    return Finding(
        level="error",
        kind="pickled-code" if is_code else "damaged",
        where=file.name,
        what=text.removeprefix(f"{file}: ").removeprefix("is "),
        advice="use the weights as safetensors" if is_code else "get the file again",
    )


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object of a file; empty where it is absent or broken, which is another finding."""
    try:
        return read_object(folder / name) if (folder / name).is_file() else {}
    except CheckpointError:
        return {}
