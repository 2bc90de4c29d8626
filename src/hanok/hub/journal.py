"""What a push notes on disk so that a killed one continues: hashes of files, finished parts of uploads.

One small file for each, replaced atomically, so a killed process leaves the last whole note. Links to a
hub's storage are credentials until they expire; the folder is readable by its owner alone.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hanok.checkpoint.aside import Batch
from hanok.hub.local import LocalFile
from hanok.hub.repository import UploadAction

KEPT_S = 30 * 24 * 3600.0
SETTLED_NS = 10**9
"""A file changed less than this before it was hashed may change again within one tick of its clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadNote:
    """An upload in parts that was begun: how it goes on, and what each finished part was answered."""

    oid: str
    action: UploadAction
    etags: Mapping[int, str]
    """By the part's number, from 1."""


class Journal:
    """The notes of all pushes of a user, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prune(self) -> None:
        """Remove notes older than a month; links in them have long expired."""
        oldest = time.time() - KEPT_S
        for path in self._folder.glob("*/*.json"):
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def hash_of(self, file: LocalFile) -> str | None:
        """Return a file's SHA-256 if it was hashed before and has not changed since."""
        found = self._read(self._hash_path(file))
        is_same = found is not None and found.get("file") == _identity(file)
        return found["sha256"] if found is not None and is_same else None

    def note_hash(self, file: LocalFile, digest: str) -> None:
        """Note a file's SHA-256."""
        if time.time_ns() - file.modified_ns > SETTLED_NS:
            self._write(self._hash_path(file), {"file": _identity(file), "sha256": digest})

    def upload(self, endpoint: str, repo: str, oid: str) -> UploadNote | None:
        """Return what is noted of an upload of these bytes to this repository."""
        found = self._read(self._upload_path(endpoint, repo, oid))
        try:
            if found is None or found["oid"] != oid:
                return None
            action = UploadAction(
                **{**found["action"], "part_urls": tuple(found["action"]["part_urls"])}
            )
            etags = {int(number): etag for number, etag in found["etags"].items()}
        except (KeyError, TypeError, ValueError):
            return None  # written by another version
        return UploadNote(oid=oid, action=action, etags=etags)

    def note_upload(self, endpoint: str, repo: str, note: UploadNote) -> None:
        """Note how far an upload is."""
        value = {"oid": note.oid, "action": asdict(note.action), "etags": dict(note.etags)}
        self._write(self._upload_path(endpoint, repo, note.oid), value)

    def forget_upload(self, endpoint: str, repo: str, oid: str) -> None:
        """Remove the note of an upload that is finished, or cannot go on."""
        self._upload_path(endpoint, repo, oid).unlink(missing_ok=True)

    def rate(self, endpoint: str) -> float | None:
        """Return the bytes per second of the last push to a hub."""
        found = self._read(self._path("rates", endpoint))
        rate = (found or {}).get("bytes_per_s")
        return rate if isinstance(rate, float) and rate > 0 else None

    def note_rate(self, endpoint: str, bytes_per_s: float) -> None:
        """Note how fast a push to a hub was."""
        self._write(self._path("rates", endpoint), {"bytes_per_s": bytes_per_s})

    def _hash_path(self, file: LocalFile) -> Path:
        return self._path("hashes", str(file.path.resolve()))

    def _upload_path(self, endpoint: str, repo: str, oid: str) -> Path:
        return self._path("uploads", f"{endpoint}\n{repo}\n{oid}")

    def _path(self, kind: str, key: str) -> Path:
        return self._folder / kind / f"{sha256(key.encode()).hexdigest()[:40]}.json"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.mkdir(exist_ok=True)
        with Batch(is_durable=False) as batch:
            with batch.open(path) as file:
                file.write(json.dumps(value).encode())
            batch.publish()


def _identity(file: LocalFile) -> list[int]:
    return [file.size, file.modified_ns, file.inode]
