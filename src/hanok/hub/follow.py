"""Watches a folder that is being written: which files are complete, and when all are there.

hanok writes files under temporary names, so a final name is a complete file. Other programs write in
place: a file counts as complete once it is the same in two looks, a safetensors file only if it is as
long as its header says.
"""

from collections.abc import Sequence
from pathlib import Path

from hanok.checkpoint.files import SAFETENSORS, read_header, read_object
from hanok.checkpoint.formats import ADAPTER_CONFIG, CONFIG
from hanok.errors import CheckpointError
from hanok.hub.local import LocalFile, list_folder

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class Watch:
    """Looks at a folder again and again; each complete file is given once, and again if it changes."""

    def __init__(
        self, folder: Path, include: Sequence[str], exclude: Sequence[str], until: str | None
    ) -> None:
        self._folder = folder
        self._include = include
        self._exclude = exclude
        self._until = until
        self._seen: dict[str, LocalFile] = {}
        self._given: dict[str, LocalFile] = {}
        self.left_out: tuple[str, ...] = ()

    def look(self) -> list[LocalFile]:
        """Return the files that have become complete since the last look."""
        if not self._folder.is_dir():  # its writer renames it when it is whole
            return []
        listing = list_folder(self._folder, self._include, self._exclude)
        self.left_out = listing.left_out
        found = {file.name: file for file in listing.files}
        new = [
            file
            for name, file in found.items()
            if self._seen.get(name) == file and self._given.get(name) != file and _is_whole(file)
        ]
        self._seen = found
        self._given.update({file.name: file for file in new})
        return new

    def is_over(self) -> bool:
        """Return whether everything is there, and nothing is being written."""
        is_settled = self._seen == self._given
        return is_settled and bool(self._seen) and self.missing() == ""

    def missing(self) -> str:
        """Return what is still to come, "" if nothing is."""
        if self._until is not None:
            return "" if self._until in self._given else self._until
        if ADAPTER_CONFIG in self._given:
            return "" if ADAPTER_WEIGHTS in self._given else ADAPTER_WEIGHTS
        if CONFIG not in self._given:
            return CONFIG
        if SAFETENSORS.whole in self._given:
            return ""
        if SAFETENSORS.index not in self._given:
            return f"{SAFETENSORS.whole} or {SAFETENSORS.index}"
        index = read_object(self._folder / SAFETENSORS.index)
        shards = {str(name) for name in index.get("weight_map", {}).values()}
        return ", ".join(sorted(shards - self._given.keys()))


def _is_whole(file: LocalFile) -> bool:
    if not file.name.endswith(SAFETENSORS.suffixes):
        return True
    try:
        read_header(file.path)
    except CheckpointError:
        return False
    return True
