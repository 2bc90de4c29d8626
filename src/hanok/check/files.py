"""Files of a folder that are unsafe, unfinished, not what they seem, or of another model.

Nothing is opened but the first bytes of small files, and JSON. Imports no torch.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hanok.check.finding import Finding, shown
from hanok.checkpoint.aside import PARTIAL
from hanok.checkpoint.files import INDEX_SUFFIX, PICKLES, SAFETENSORS
from hanok.checkpoint.formats import ADAPTER_WEIGHTS, FOREIGN
from hanok.checkpoint.pickles import ZIP_MAGIC
from hanok.checkpoint.safetensors import LFS_MARK, parse_json_object
from hanok.errors import CheckpointError

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "adapter_config.json",
)
SKIPPED_FOLDERS = (".git", ".cache")
"""Of version control and of huggingface_hub: no part of a model."""
PICKLE_START = b"\x80"  # and the number of the protocol
POINTER_BYTES = 1024  # a Git LFS pointer is shorter
CONSOLIDATED = "consolidated"  # Mistral's and Meta's own layout, published next to the common one
LARGEST_BYTES = 50 * 10**9  # what the hub advises for one file


def files_in(folder: Path) -> list[Path]:
    """Return every file and link below a folder, without those of version control and caches."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - set(SKIPPED_FOLDERS))
        found += [Path(place, name) for name in sorted(names)]
        found += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
    return found


def file_findings(folder: Path, files: Iterable[Path], used: Iterable[Path]) -> Iterator[Finding]:
    """Yield what is wrong with files; `used` are those that the checkpoint is made of."""
    present = list(files)
    in_use = set(used)
    for file in present:
        name = str(file.relative_to(folder))
        if file.is_symlink() and (finding := _link_finding(folder, file, name)):
            yield finding
        if not file.is_file():
            continue
        size = file.stat().st_size
        if PARTIAL.fullmatch(file.name):
            yield Finding(
                level="warning",
                kind="leftover",
                where=name,
                what=f"left by a write that was cut off, {size:,} bytes",
                advice="remove it, unless something is writing the folder now",
                is_mendable=True,
            )
        elif size < POINTER_BYTES and _is_pointer(file):
            yield Finding(
                level="error",
                kind="lfs-pointer",
                where=name,
                what="is a Git LFS pointer and not the file itself",
                advice="fetch it with `git lfs pull`, or download it again",
            )
        elif size > LARGEST_BYTES:
            yield Finding(
                level="note",
                kind="large-file",
                where=name,
                what=f"holds {size / 1e9:.0f} GB, more than the hub advises for one file (50 GB)",
                advice="save it in shards",
            )
    yield from _json_findings(folder)
    yield from _code_findings(folder, present)
    yield from _pickle_findings(folder, in_use)
    yield from _other_weights(folder, in_use)


def _link_finding(folder: Path, file: Path, name: str) -> Finding | None:
    """Return what is wrong with a link; those of huggingface_hub's cache are as they should be."""
    target = file.resolve()
    if not target.exists():
        return Finding(
            level="error",
            kind="broken-link",
            where=name,
            what=f"is a link to {file.readlink()}, which is not there",
            advice="get the file again",
        )
    # A snapshot of the cache: models--org--name/snapshots/REVISION links to models--org--name/blobs.
    root = folder.resolve()
    cache = root.parent.parent if root.parent.name == "snapshots" else root
    if target.is_relative_to(root) or target.is_relative_to(cache / "blobs"):
        return None
    return Finding(
        level="warning",
        kind="outside-link",
        where=name,
        what=f"is a link to {target}, outside the folder",
        advice="copy the file into the folder: a copy or an upload of it may lose the link's target",
    )


def _json_findings(folder: Path) -> Iterator[Finding]:
    for name in JSON_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            data = path.read_bytes()
            parse_json_object(data, name)
        except (OSError, CheckpointError) as error:
            yield Finding(
                level="error",
                kind="json",
                where=name,
                what=str(error).removeprefix(f"{name} "),
                advice="correct it, or get the file again",
            )
            continue
        try:
            parse_json_object(data, name, is_strict=True)
        except CheckpointError as error:
            yield Finding(
                level="warning",
                kind="json-twice",
                where=name,
                what=str(error).removeprefix(f"{name} "),
                advice="remove one of them; readers take the last",
            )


def _code_findings(folder: Path, files: Iterable[Path]) -> Iterator[Finding]:
    code = [str(file.relative_to(folder)) for file in files if file.suffix == ".py"]
    if code:
        yield Finding(
            level="note",
            kind="code",
            where=shown(code),
            what="Python code, which transformers runs with trust_remote_code=True",
            advice="read it before it runs; hanok never runs it",
        )


def _pickle_findings(folder: Path, used: set[Path]) -> Iterator[Finding]:
    pickles = [file for file in folder.iterdir() if file.suffix in (*PICKLES.suffixes, ".pkl")]
    for file in sorted(pickles):
        if not file.is_file() or not (file in used or _is_pickle(file)):
            continue
        if file in used:
            what = "the weights are a pickle, which runs code in programs that load it carelessly"
            advice = "hanok convert writes them as safetensors; hanok runs nothing of it"
        elif file.name.startswith(PICKLES.ignored):
            what = "training state, a pickle: not needed to run the model, and code when loaded"
            advice = "remove it before publishing"
        else:
            what = (
                f"a pickle of {file.stat().st_size:,} bytes next to the weights, which is not read"
            )
            advice = "remove it: the weights are here already, and a pickle runs code when loaded"
        yield Finding(level="warning", kind="pickle", where=file.name, what=what, advice=advice)


def _other_weights(folder: Path, used: set[Path]) -> Iterator[Finding]:
    if used:
        stray = [
            file
            for file in sorted(folder.iterdir())
            if file.suffix in SAFETENSORS.suffixes
            and file.is_file()
            and file not in used
            and not file.name.startswith(".")
            and file.name not in ADAPTER_WEIGHTS
            and not file.name.startswith(PICKLES.ignored)
        ]
        own_layout = [file for file in stray if file.name.startswith(CONSOLIDATED)]
        if own_layout:
            yield Finding(
                level="note",
                kind="other-format",
                where=shown(file.name for file in own_layout),
                what="a second copy of the weights, in the layout of Mistral or Meta",
                advice="keep it for programs that read it; nothing checks that both are the same",
            )
        for file in stray:
            if file in own_layout:
                continue
            yield Finding(
                level="warning",
                kind="unused-weights",
                where=file.name,
                what=f"{file.stat().st_size:,} bytes of weights that no index names and no reader loads",
                advice="remove it, or get the index that belongs to it",
            )
    for pattern, format_name in FOREIGN.items():
        for file in sorted(folder.glob(pattern)):
            yield Finding(
                level="note",
                kind="other-format",
                where=str(file.relative_to(folder)),
                what=f"weights in the format of {format_name}, which were not checked",
                advice="make it again whenever the weights or the tokens change",
            )
    indexes = [
        file.name
        for kind in (SAFETENSORS, PICKLES)
        if (file := folder / kind.index).is_file() and (folder / kind.whole).is_file()
    ]
    for name in indexes:
        yield Finding(
            level="warning",
            kind="unused-index",
            where=name,
            what=f"is next to {name.removesuffix(INDEX_SUFFIX)}, which readers take instead",
            advice="remove the one that is out of date",
        )


def _is_pickle(file: Path) -> bool:
    """Return whether a file begins as what torch.save or pickle writes."""
    return _start_of(file, len(ZIP_MAGIC)).startswith((ZIP_MAGIC, PICKLE_START))


def _is_pointer(file: Path) -> bool:
    return _start_of(file, len(LFS_MARK)) == LFS_MARK


def _start_of(file: Path, count: int) -> bytes:
    """Return the first bytes of a file; none where it may not be read, which others report."""
    try:
        with file.open("rb") as opened:
            return opened.read(count)
    except OSError:
        return b""
