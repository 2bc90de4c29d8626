"""Brings a checkpoint to this machine, from a folder or from the hub; always as safetensors.

From the hub only what is needed is downloaded: the weights in one format, and the small files that come
with them. Pickled weights are converted in place, so a second call finds the work done.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hanok.checkpoint.convert import COMPANION_SUFFIXES, ConvertReport, convert
from hanok.checkpoint.files import PICKLES, SAFETENSORS, find_entries, open_checkpoint
from hanok.checkpoint.hub import is_repo_id
from hanok.errors import CheckpointError

TRAINING_WORDS = ("arguments", "args", "training")
"""In the names of safetensors files that hold no weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A checkpoint on this machine."""

    folder: Path
    was_present: bool
    """Whether its safetensors were here already."""
    report: ConvertReport | None
    """The conversion's report, if there was one."""


def fetch(
    model: str,
    *,
    revision: str | None = None,
    cache_folder: Path | None = None,
    may_convert: bool = True,
    progress: Callable[[int], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Fetched:
    """Return the folder of `model`, a folder or a name on the hub ("org/name", "org/name@revision").

    Downloads are kept in `cache_folder`, huggingface_hub's own by default; endpoint and token are its
    (HF_ENDPOINT, HF_TOKEN). `progress` and `on_start` are those of `convert`. Raises CheckpointError
    if there is no such model, or if it has no weights that can be read.
    """
    path = Path(model)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        if _has_safetensors(folder):
            return Fetched(folder=folder, was_present=True, report=None)
    else:
        name, _, at = model.partition("@")
        if not is_repo_id(name) and not (name and all(c.isalnum() or c in "._-" for c in name)):
            raise CheckpointError(
                f"{model}: no such folder, and no name of a model on the hub (org/name). Check it."
            )
        cached = _cached(name, revision or at or None, cache_folder)
        if cached is not None:
            return Fetched(folder=cached, was_present=True, report=None)
        folder = _download(name, revision or at or None, cache_folder)
        if _has_safetensors(folder):
            return Fetched(folder=folder, was_present=False, report=None)
    if not find_entries(folder, PICKLES):
        raise CheckpointError(
            f"{folder}: has no weights: neither {SAFETENSORS.suffixes[0]} nor "
            f"{', '.join(PICKLES.suffixes)} files."
        )
    if not may_convert:
        raise CheckpointError(
            f"{folder}: has pickles alone, and converting them was switched off. Leave "
            "--no-auto-convert out, or run `hanok convert`."
        )
    report = convert(folder, progress=progress, on_start=on_start)
    return Fetched(folder=folder, was_present=False, report=report)


def wanted(files: Iterable[str]) -> list[str]:
    """Return which files of a repository to download: weights in one format, and what describes them.

    Files below the top are another form of the model, and so are safetensors of other names next to a
    `model.safetensors`.
    """
    top = [file for file in files if "/" not in file]
    weights = [file for file in top if _is_weights(file)]
    if any(file.startswith("model") for file in weights):
        weights = [file for file in weights if file.startswith("model")]
    for suffix in () if weights else PICKLES.suffixes:
        weights = [
            file for file in top if file.endswith(suffix) and not file.startswith(PICKLES.ignored)
        ]
        if weights:
            break
    return [*weights, *(file for file in top if file.endswith(COMPANION_SUFFIXES))]


def _is_weights(file: str) -> bool:
    return file.endswith(SAFETENSORS.suffixes) and not any(word in file for word in TRAINING_WORDS)


def _has_safetensors(folder: Path) -> bool:
    return any(
        _is_weights(entry.name) or entry.name == SAFETENSORS.index
        for entry in find_entries(folder, SAFETENSORS)
    )


def _cached(name: str, revision: str | None, cache_folder: Path | None) -> Path | None:
    """Return the folder of a model that was downloaded whole; None if it was not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, cache_dir=cache_folder, local_files_only=True
            )
        )
        if not _has_safetensors(folder):
            return None
        # An index with missing files is an error here; it comes from an interrupted download.
        open_checkpoint(folder, needs_config=False)
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return folder


def _download(name: str, revision: str | None, cache_folder: Path | None) -> Path:
    # Imported here: it brings an HTTP client that nothing else needs.
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = wanted(HfApi().list_repo_files(name, revision=revision))
        return Path(
            snapshot_download(name, revision=revision, cache_dir=cache_folder, allow_patterns=files)
        )
    except Exception as error:  # Whatever the hub, its client or the network raise.
        raise CheckpointError(
            f"{name} is not a folder here, and cannot be downloaded from the hub: {error}. Check the "
            "name and the network; for a gated or private model accept its terms and log in (`hf auth "
            "login`, or HF_TOKEN)."
        ) from error
