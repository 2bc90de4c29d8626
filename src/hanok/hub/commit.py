"""Makes one commit: all of it becomes visible, or nothing, and never twice.

A hub may make a commit and its answer be lost on the way. Before it is asked again, it is asked what it
has: a commit with these files, of these hashes, is this one.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus

from hanok.errors import HubError
from hanok.hub.client import LostAnswerError
from hanok.hub.refusals import SERVER_ERRORS, Refused
from hanok.hub.repository import Addition, Commit, Committed, RemoteFile, Repository

TRIES = 4


def is_in(addition: Addition, remote: Mapping[str, RemoteFile]) -> bool:
    """Return whether a commit holds a file with this content."""
    found = remote.get(addition.name)
    if found is None:
        return False
    if addition.content is None:
        return found.sha256 == addition.sha256
    start = f"blob {len(addition.content)}\0".encode()
    blob = hashlib.sha1(start + addition.content, usedforsecurity=False).hexdigest()
    return found.sha256 is None and found.blob == blob


def make_commit(
    repository: Repository, commit: Commit, revision: str, *, creates_pr: bool
) -> Committed:
    """Make the commit, and return it also where the hub's answer was lost.

    Raises Refused with 412 where another commit came first; HubError where the hub never answered.
    """
    known = set(repository.pull_requests()) if creates_pr else set()
    patience = repository.client.patience
    unclear: HubError | None = None
    for attempt in range(TRIES):
        if unclear is not None:
            wait_s = patience.first_wait_s * 2.0**attempt
            repository.client.log(f"{unclear} Looking whether it was made, in {wait_s:.0f} s.")
            patience.sleep(wait_s)
            if found := _find(repository, commit, revision, known, creates_pr=creates_pr):
                return found
        try:
            return repository.commit(commit, revision, creates_pr=creates_pr)
        except LostAnswerError as error:
            unclear = error
        except Refused as error:
            # After a lost answer, the commit that came first may be this one.
            came_first = unclear is not None and error.status == HTTPStatus.PRECONDITION_FAILED
            if error.status < SERVER_ERRORS and not came_first:
                raise
            if came_first:
                found = _find(repository, commit, revision, known, creates_pr=creates_pr)
                if found is None:
                    raise
                return found
            unclear = error
    if found := _find(repository, commit, revision, known, creates_pr=creates_pr):
        return found
    raise HubError(
        f"{unclear} It was tried {TRIES} times, and the hub does not have it. All files are "
        "uploaded: push again later, or a part of the files at a time (--include)."
    )


def _find(
    repository: Repository,
    commit: Commit,
    revision: str,
    known: Collection[str],
    *,
    creates_pr: bool,
) -> Committed | None:
    """Return the commit if the hub has it."""
    if creates_pr:
        new = {ref: at for ref, at in repository.pull_requests().items() if ref not in known}
    else:
        head = repository.head(revision).commit
        new = {} if head == commit.parent else {revision: head}
    for ref, at in new.items():
        if _holds(repository.files(at), commit.additions, commit.deletions):
            number = ref.rpartition("/")[2]
            pull_request = f"{repository.url}/discussions/{number}" if creates_pr else None
            url = f"{repository.url}/commit/{at}"
            return Committed(commit=at, url=url, pull_request=pull_request)
    return None


def _holds(
    remote: Mapping[str, RemoteFile], additions: Sequence[Addition], deletions: Sequence[str]
) -> bool:
    return all(is_in(item, remote) for item in additions) and not remote.keys() & set(deletions)
