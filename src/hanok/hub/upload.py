"""Sends the bytes of large files to a hub's storage: those that it lacks, in parts, and never twice.

After each part its receipt (an ETag) is noted, so a push that was killed continues after the last whole
part: at most the part that was being sent is sent again, one for each of the connections. Files are
hashed by other threads while earlier ones are sent.

Cost: one reading to hash and one to send; memory does not grow with the files.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus

from hanok.errors import CheckpointError, HubError
from hanok.hub.client import FilePart, Log, Progress, Request
from hanok.hub.journal import Journal, UploadNote
from hanok.hub.local import LocalFile, sha256_of
from hanok.hub.refusals import Refused
from hanok.hub.repository import LFS_HEADERS, Repository, UploadAction

ASKED_AT_ONCE = 16
"""Files that one call asks the hub about, at most; the links in its answer expire."""
HASHERS = 2
"""Files that are hashed at a time; more would only wait for the disk."""
EXPIRED = {HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.GONE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """A large file that is on the hub."""

    file: LocalFile
    sha256: str


class Uploader:
    """Uploads files for a commit that is made later; may be killed and started again."""

    def __init__(
        self,
        repository: Repository,
        journal: Journal,
        *,
        connections: int,
        log: Log,
        progress: Progress,
    ) -> None:
        self._repository = repository
        self._client = repository.client
        self._journal = journal
        self._connections = connections
        self._log = log
        self._progress = progress
        self._lock = threading.Lock()
        self.sent_bytes = 0
        """Of whole parts and files, by this process."""

    def upload(
        self, files: Sequence[LocalFile], is_known: Callable[[LocalFile, str], bool]
    ) -> Iterator[Uploaded]:
        """Upload files and yield each once the hub has it.

        `is_known` says whether the repository has a file with this SHA-256 already, so that the hub need
        not be asked. Raises CheckpointError where a file changed meanwhile.
        """
        with ThreadPoolExecutor(HASHERS) as hasher:
            waiting = [(file, hasher.submit(self._hash, file)) for file in files]
            try:
                while waiting:
                    ready = list(_ready(waiting))
                    del waiting[: len(ready)]
                    yield from self._upload_some(ready, is_known)
            finally:
                for _, future in waiting:
                    future.cancel()

    def _hash(self, file: LocalFile) -> str:
        found = self._journal.hash_of(file)
        if found is None:
            found = sha256_of(file.path)
            _check_unchanged(file)
            self._journal.note_hash(file, found)
        return found

    def _upload_some(
        self,
        files: Sequence[tuple[LocalFile, str]],
        is_known: Callable[[LocalFile, str], bool],
    ) -> Iterator[Uploaded]:
        asked = {oid: file.size for file, oid in files if not is_known(file, oid)}
        actions = self._repository.upload_actions(asked) if asked else {}
        for file, oid in files:
            before = self.sent_bytes
            action = actions.pop(oid, None)  # of two equal files one is sent
            if action is not None:
                self._send(file, oid, action)
            _check_unchanged(file)
            self._progress(max(0, file.size - (self.sent_bytes - before)))
            yield Uploaded(file=file, sha256=oid)

    def _send(self, file: LocalFile, oid: str, action: UploadAction) -> None:
        """Send what the hub lacks of a file; begin anew where it has forgotten the upload."""
        endpoint, repo = self._client.endpoint, self._repository.name
        noted = self._journal.upload(endpoint, repo, oid)
        try:
            self._send_by(file, noted or UploadNote(oid=oid, action=action, etags={}))
        except Refused as error:
            if error.status not in EXPIRED:
                raise
            self._journal.forget_upload(endpoint, repo, oid)
            fresh = self._repository.upload_actions({oid: file.size})[oid]
            if fresh is None:  # it was whole, and the answer that said so was lost
                return
            self._log(
                f"{file.name}: the hub no longer accepts the upload that was begun earlier (HTTP "
                f"{error.status}), so the file is sent from its first byte."
            )
            self._send_by(file, UploadNote(oid=oid, action=fresh, etags={}))

    def _send_by(self, file: LocalFile, note: UploadNote) -> None:
        if note.action.part_bytes is None:
            self._put(file, note.action.url, range(file.size))
        else:
            self._send_parts(file, note, note.action.part_bytes)
        if note.action.verify_url is not None:
            value = {"oid": note.oid, "size": file.size}
            self._client.post(note.action.verify_url, value, f"the check of {file.name}")
        self._journal.forget_upload(self._client.endpoint, self._repository.name, note.oid)

    def _send_parts(self, file: LocalFile, note: UploadNote, part_bytes: int) -> None:
        starts = range(0, file.size, part_bytes)
        parts = [range(start, min(start + part_bytes, file.size)) for start in starts]
        urls = note.action.part_urls
        if len(urls) != len(parts):
            raise HubError(
                f"{file.name}: the hub gives links for {len(urls)} parts of {part_bytes:,} bytes, and "
                f"{len(parts)} are needed. Run it again; if that remains, report it to the hub."
            )
        left = [number for number in range(1, len(parts) + 1) if number not in note.etags]
        if note.etags:
            self._log(f"{file.name}: continuing after {len(note.etags)} of {len(parts)} parts.")
        etags = dict(note.etags)

        def send(number: int) -> None:
            etag = self._put(file, urls[number - 1], parts[number - 1])
            with self._lock:
                etags[number] = etag
                done = UploadNote(oid=note.oid, action=note.action, etags=etags)
                self._journal.note_upload(self._client.endpoint, self._repository.name, done)

        self._for_each(send, left)
        listed = [{"partNumber": number, "etag": etags[number]} for number in sorted(etags)]
        value = {"oid": note.oid, "parts": listed}
        self._client.post(note.action.url, value, f"the end of {file.name}", LFS_HEADERS)

    def _for_each(self, send: Callable[[int], None], numbers: Sequence[int]) -> None:
        if self._connections == 1 or len(numbers) < 2:
            for number in numbers:
                send(number)
            return
        with ThreadPoolExecutor(self._connections) as pool:
            futures = [pool.submit(send, number) for number in numbers]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def _put(self, file: LocalFile, url: str, part: range) -> str:
        request = Request(
            method="PUT",
            url=url,
            what=f"the upload of {file.name}",
            body=FilePart(path=file.path, start=part.start, size=len(part)),
        )
        answer = self._client.call(request, self._progress)
        with self._lock:
            self.sent_bytes += len(part)
        return answer.headers.get("ETag", "")


def _ready(waiting: Iterable[tuple[LocalFile, "Future[str]"]]) -> Iterator[tuple[LocalFile, str]]:
    """Yield the first file once it is hashed, and those after it that are hashed as well."""
    for index, (file, future) in enumerate(waiting):
        if index == ASKED_AT_ONCE or (index and not future.done()):
            return
        yield file, future.result()


def _check_unchanged(file: LocalFile) -> None:
    if not file.is_unchanged():
        raise CheckpointError(
            f"{file.path}: changed while it was pushed, and nothing was committed. Push it once it is "
            "written, or with --follow."
        )
