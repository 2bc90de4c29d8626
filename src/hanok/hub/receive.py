"""Receives one file of a repository: continued where an earlier call ended, and checked by its hash."""

import hashlib
import http.client
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

from hanok.errors import HubError
from hanok.hub.cache import Cache
from hanok.hub.client import Progress, Request
from hanok.hub.local import READ_BYTES
from hanok.hub.repository import RemoteFile, Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """Receives files of one commit into a cache; may be used by several threads."""

    repository: Repository
    cache: Cache
    commit: str
    verify: bool
    """Whether contents that are there already are hashed, too."""
    progress: Progress

    def receive(self, file: RemoteFile) -> int:
        """Bring a file's content into the cache, and return the bytes that were received.

        Raises HubError where what comes has another hash than the hub says: it is removed.
        """
        with self.cache.lock(file.etag):
            if self._is_there(file):
                self.progress(file.size)
                return 0
            partial = self.cache.partial(file.etag)
            kept = partial.stat().st_size if partial.exists() else 0
            received = self._continue(file, partial)
            if received is None and kept:
                self.repository.client.log(
                    f"{file.name}: with what was received earlier its hash is wrong; all of it is "
                    "received again."
                )
                received = self._continue(file, partial)
            if received is None:
                raise HubError(
                    f"{file.name}: what the hub sends does not have the hash that the hub gives, "
                    f"{file.etag}. It was removed. Pull again; if that remains, the file on the hub or "
                    "a proxy on the way is damaged."
                )
            partial.replace(self.cache.blob(file.etag))
            return received

    def _is_there(self, file: RemoteFile) -> bool:
        blob = self.cache.blob(file.etag)
        if not blob.exists():
            return False
        is_whole = blob.stat().st_size == file.size
        if is_whole and self.verify:
            digest = _digest_of(file)
            _hash_into(digest, blob)
            is_whole = digest.hexdigest() == file.etag
        if not is_whole:
            self.repository.client.log(
                f"{file.name}: the copy in the cache is damaged; it is removed and received again."
            )
            blob.unlink()
        return is_whole

    def _continue(self, file: RemoteFile, partial: Path) -> int | None:
        """Receive what is missing; None if the hash is wrong, and then nothing is kept."""
        if partial.exists() and partial.stat().st_size > file.size:
            partial.unlink()
        digest = _digest_of(file)
        have = _hash_into(digest, partial) if partial.exists() else 0
        self.progress(have)
        start, failures = have, 0
        patience = self.repository.client.patience
        while have < file.size or not partial.exists():
            before = have
            try:
                have, digest = self._stream(file, partial, have, digest)
                reason = "the connection ended early"
            except (OSError, http.client.HTTPException) as error:
                have = partial.stat().st_size if partial.exists() else 0
                digest = _digest_of(file)
                if have:
                    _hash_into(digest, partial)
                reason = str(error) or type(error).__name__
            if have == file.size:
                break
            failures = 1 if have > before else failures + 1
            if failures >= patience.tries:
                raise HubError(
                    f"{file.name}: {reason}, {failures} times in a row. What was received is kept; pull "
                    "again to continue."
                )
            wait_s = patience.first_wait_s * 2.0 ** (failures - 1)
            self.repository.client.log(
                f"{file.name}: {reason} after {have:,} of {file.size:,} bytes; going on in "
                f"{wait_s:.0f} s."
            )
            patience.sleep(wait_s)
        if digest.hexdigest() != file.etag:
            partial.unlink()
            self.progress(-have)
            return None
        return max(0, have - start)

    def _stream(
        self, file: RemoteFile, partial: Path, have: int, digest: "hashlib._Hash"
    ) -> tuple[int, "hashlib._Hash"]:
        """Receive once, from byte `have` on; return how many bytes there are then, and their hash."""
        path = f"/{self.repository.name}/resolve/{self.commit}/{quote(file.name)}"
        request = Request(
            method="GET",
            url=self.repository.client.url(path),
            what=f"the file {file.name} of {self.repository.name}",
            headers={"Range": f"bytes={have}-"} if have else {},
        )
        with self.repository.client.open(request) as response:
            if have and response.status != HTTPStatus.PARTIAL_CONTENT:
                self.progress(-have)
                have, digest = 0, _digest_of(file)  # a server without ranges begins again
            with partial.open("ab" if have else "wb") as target:
                while have < file.size:
                    data = response.read(min(READ_BYTES, file.size - have))
                    if not data:
                        break
                    target.write(data)
                    digest.update(data)
                    have += len(data)
                    self.progress(len(data))
        return have, digest


def _digest_of(file: RemoteFile) -> "hashlib._Hash":
    """Return the hash of nothing, of the kind that names this file's content."""
    if file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)


def _hash_into(digest: "hashlib._Hash", path: Path) -> int:
    """Add a file's bytes to a hash, and return how many they are."""
    count = 0
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
            count += len(data)
    return count
