"""The cache that huggingface_hub and transformers share: blobs by their hashes, snapshots of commits.

    models--owner--name/blobs/HASH                 a file's content
    models--owner--name/snapshots/COMMIT/NAME      a link to it
    models--owner--name/refs/REVISION              the commit that a branch or tag was

A blob gets its name once its hash is right, and a snapshot appears once all its blobs are there.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath

from hanok.checkpoint.writer import write_bytes
from hanok.errors import HubError
from hanok.hub.repository import RemoteFile

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Cache:
    """The part of the cache that belongs to one repository."""

    def __init__(self, folder: Path, repo: str) -> None:
        # Imported here: it brings an HTTP client.
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=repo, repo_type="model")
        self.folder = folder / name
        self._locks = folder / ".locks" / name

    def blob(self, etag: str) -> Path:
        """Return where a content is, or will be."""
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """Return where the bytes that were received so far are."""
        return self.folder / "blobs" / f"{etag}.incomplete"

    @contextmanager
    def lock(self, etag: str) -> Iterator[None]:
        """Let one process at a time receive a content; the others find it there."""
        for folder in (self._locks, self.folder / "blobs"):
            folder.mkdir(parents=True, exist_ok=True)
        with (self._locks / f"{etag}.lock").open("ab") as file:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def publish(self, commit: str, revision: str, files: Mapping[str, RemoteFile]) -> Path:
        """Make the snapshot of a commit of blobs that are all there; return its folder."""
        snapshot = self.folder / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            target = snapshot / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link = os.path.relpath(self.blob(file.etag), target.parent)
            _replace(target, partial(os.symlink, link))
        if revision != commit:
            ref = self.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(ref, commit.encode())
        return snapshot


def check_names(files: Mapping[str, RemoteFile]) -> None:
    """Raise HubError for a file whose name or hash would lead out of the cache."""
    for name, file in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not HASH.fullmatch(file.etag):
            raise HubError(
                f"the repository has a file called {name!r} with the hash {file.etag!r}, which cannot "
                "be stored. Nothing was pulled; leave it out with --exclude."
            )


def place(blob: Path, target: Path, *, is_link: bool) -> None:
    """Put a blob under a name of a plain folder, as a hard link where that is possible, or a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_link:
        with suppress(OSError):  # another file system, or one without links
            _replace(target, lambda aside: aside.hardlink_to(blob.resolve()))
            return
    _replace(target, lambda aside: shutil.copyfile(blob, aside))


def _replace(target: Path, make: Callable[[Path], object]) -> None:
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        make(aside)
        aside.replace(target)
    finally:
        # Two names of one file are left as they are by a rename.
        aside.unlink(missing_ok=True)
