"""One model's repository on a hub: what it holds, and the calls that change it.

The wire protocol is huggingface.co's: JSON under /api, git-lfs's batch call for large files, and commits
as lines of JSON.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import quote

from hanok.errors import HubError, OptionError
from hanok.hub.client import Client, Request
from hanok.hub.local import LocalFile
from hanok.hub.refusals import Refused

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
FILES_PER_CALL = 256
LFS_HEADERS: Mapping[str, str] = {
    "Accept": "application/vnd.git-lfs+json",
    "Content-Type": "application/vnd.git-lfs+json",
}
NEXT_PAGE = re.compile(r'<([^>]+)>;\s*rel="next"')

Mode = Literal["regular", "lfs"]
"""How a hub wants a file: within the commit, or uploaded before it (git-lfs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who a token belongs to, and what it may do."""

    name: str
    organizations: tuple[str, ...]
    role: str
    """The token's: "read", "write" or "fineGrained"; "" where the hub does not say."""
    writable: frozenset[str]
    """Users, organizations and repositories that a fine-grained token may write to."""
    may_discuss: bool
    """Whether a fine-grained token may open pull requests anywhere."""

    def why_not(self, repo: str, *, creates_pr: bool) -> str | None:
        """Return why this account cannot write to a repository, as far as that can be known."""
        owner = repo.partition("/")[0]
        if self.role == "read":
            return 'the token has the role "read". Make one with the role "write"'
        is_member = owner == self.name or owner in self.organizations
        if not is_member and not creates_pr:
            places = ", ".join([self.name, *self.organizations])
            return (
                f"{self.name} is not a member of {owner}. Push to one of {places}, become a member, or "
                "propose the change with --create-pr"
            )
        is_listed = bool(self.writable & {owner, repo})
        if self.role == "fineGrained" and not is_listed and not (creates_pr and self.may_discuss):
            return (
                f"the fine-grained token has no write access to {owner}. Add it in its settings, "
                'or use one with the role "write"'
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a commit."""

    name: str
    size: int
    blob: str
    """git's SHA-1 of the file, or of what stands for it in git where `sha256` is given."""
    sha256: str | None

    @property
    def etag(self) -> str:
        """What names its content, also in the cache that transformers shares."""
        return self.sha256 or self.blob


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The newest commit of a revision."""

    commit: str
    is_private: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadAction:
    """How the hub wants one large file to be sent."""

    url: str
    """One PUT of all its bytes, or for parts what is called after the last one."""
    part_bytes: int | None
    part_urls: tuple[str, ...]
    verify_url: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A file of a commit to be made: its content, or the hash of what was uploaded."""

    name: str
    size: int
    content: bytes | None
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A commit to be made: all of it, or nothing."""

    message: str
    description: str
    parent: str | None
    additions: Sequence[Addition]
    deletions: Sequence[str]

    def lines(self) -> bytes:
        """Return it as the hub reads it: one JSON object a line."""
        return b"".join(json.dumps(item).encode() + b"\n" for item in self._items())

    def _items(self) -> Iterator[dict[str, Any]]:
        head = {"summary": self.message, "description": self.description}
        if self.parent is not None:
            head["parentCommit"] = self.parent
        yield {"key": "header", "value": head}
        for file in self.additions:
            if file.content is not None:
                content = base64.b64encode(file.content).decode()
                value = {"content": content, "path": file.name, "encoding": "base64"}
                yield {"key": "file", "value": value}
            else:
                value = {"path": file.name, "algo": "sha256", "oid": file.sha256 or ""}
                yield {"key": "lfsFile", "value": {**value, "size": file.size}}
        for name in self.deletions:
            yield {"key": "deletedFile", "value": {"path": name}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What the hub says of a commit that it made."""

    commit: str
    url: str
    pull_request: str | None


def account_of(client: Client) -> Account:
    """Return who the token belongs to; HubError without one."""
    if not client.has_token:
        raise HubError(
            f"there is no token for {client.endpoint}. Log in with `hf auth login`, or set HF_TOKEN; "
            f'make a token with the role "write" at {client.endpoint}/settings/tokens.'
        )
    found = client.get("/api/whoami-v2", "who you are").object()
    token = (found.get("auth") or {}).get("accessToken") or {}
    fine = token.get("fineGrained") or {}
    scopes = [
        (item.get("entity") or {}, item.get("permissions") or []) for item in fine.get("scoped", [])
    ]
    return Account(
        name=found.get("name", ""),
        organizations=tuple(item["name"] for item in found.get("orgs") or [] if "name" in item),
        role=token.get("role", ""),
        writable=frozenset(
            entity.get("name", "") for entity, granted in scopes if "repo.write" in granted
        ),
        may_discuss="discussion.write" in (fine.get("global") or []),
    )


class Repository:
    """A model's repository, "owner/name"; it may not exist yet."""

    def __init__(self, client: Client, name: str) -> None:
        owner, _, own = name.partition("/")
        if not NAME.fullmatch(owner) or not NAME.fullmatch(own):
            raise OptionError(
                f"{name!r} names no repository: give owner/name, of letters, digits, -, _ and dots."
            )
        self.client = client
        self.name = name
        self._api = f"/api/models/{name}"

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self.client.endpoint}/{self.name}"

    def head(self, revision: str) -> Head:
        """Return the commit of a branch, tag or commit; Refused with 404 where there is none."""
        path = f"{self._api}/revision/{quote(revision, safe='')}"
        found = self.client.get(path, f"{self.name} at {revision}").object()
        return Head(commit=found["sha"], is_private=bool(found.get("private")))

    def files(self, commit: str) -> dict[str, RemoteFile]:
        """Return all files of a commit by their names."""
        what = f"the files of {self.name}"
        path = f"{self._api}/tree/{quote(commit, safe='')}?recursive=true&expand=false"
        found: dict[str, RemoteFile] = {}
        while path:
            answer = self.client.get(path, what)
            for item in answer.object():
                if item.get("type") == "file":
                    large = item.get("lfs") or {}
                    found[item["path"]] = RemoteFile(
                        name=item["path"],
                        size=large.get("size", item["size"]),
                        blob=item["oid"],
                        sha256=large.get("oid"),
                    )
            following = NEXT_PAGE.search(answer.headers.get("Link", ""))
            path = following[1] if following else ""
        return found

    def create(self, *, is_private: bool) -> None:
        """Create it; one that exists already is left as it is."""
        owner, _, own = self.name.partition("/")
        value = {"name": own, "organization": owner, "type": "model", "private": is_private}
        value["visibility"] = "private" if is_private else "public"
        try:
            self.client.post("/api/repos/create", value, f"creating {self.name}")
        except Refused as error:
            if error.status != HTTPStatus.CONFLICT:
                raise

    def create_branch(self, branch: str, start: str) -> None:
        """Create a branch at a commit; one that exists already is left as it is."""
        path = f"{self._api}/branch/{quote(branch, safe='')}"
        what = f"creating the branch {branch} of {self.name}"
        try:
            self.client.post(path, {"startingPoint": start}, what)
        except Refused as error:
            if error.status != HTTPStatus.CONFLICT:
                raise

    def modes(
        self, files: Sequence[LocalFile], revision: str, *, creates_pr: bool
    ) -> tuple[dict[str, Mode], list[str]]:
        """Return how the hub wants each file, and which of them its .gitignore leaves out."""
        path = f"{self._api}/preupload/{quote(revision, safe='')}{'?create_pr=1' if creates_pr else ''}"
        modes: dict[str, Mode] = {}
        ignored: list[str] = []
        for start in range(0, len(files), FILES_PER_CALL):
            some = files[start : start + FILES_PER_CALL]
            sizes = {file.name: file.size for file in some}
            value = {
                "files": [
                    {
                        "path": file.name,
                        "sample": base64.b64encode(file.sample()).decode(),
                        "size": file.size,
                    }
                    for file in some
                ]
            }
            for item in self.client.post(path, value, f"a push to {self.name}").object()["files"]:
                # Storages accept no empty objects.
                is_large = item["uploadMode"] == "lfs" and sizes[item["path"]] > 0
                modes[item["path"]] = "lfs" if is_large else "regular"
                if item.get("shouldIgnore"):
                    ignored.append(item["path"])
        return modes, ignored

    def upload_actions(self, sizes: Mapping[str, int]) -> dict[str, UploadAction | None]:
        """Return for each SHA-256 how its bytes are sent; None where the hub has them already."""
        what = f"an upload to {self.name}"
        value = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": [{"oid": oid, "size": size} for oid, size in sizes.items()],
            "hash_algo": "sha256",
        }
        path = f"/{self.name}.git/info/lfs/objects/batch"
        found: dict[str, UploadAction | None] = {}
        for item in self.client.post(path, value, what, LFS_HEADERS).object()["objects"]:
            if "error" in item:
                error = item["error"]
                raise HubError(
                    f"{what}: the hub refuses an object of {item.get('size', 0):,} bytes: "
                    f"{error.get('message')} ({error.get('code')})."
                )
            found[item["oid"]] = _action(item.get("actions") or {})
        if missing := sizes.keys() - found.keys():
            raise HubError(f"{what}: the hub says nothing of {len(missing)} objects; run it again.")
        return found

    def commit(self, commit: Commit, revision: str, *, creates_pr: bool) -> Committed:
        """Make a commit; LostAnswerError or Refused (5xx) where it may have been made nevertheless."""
        path = (
            f"{self._api}/commit/{quote(revision, safe='')}{'?create_pr=1' if creates_pr else ''}"
        )
        request = Request(
            method="POST",
            url=self.client.url(path),
            what=f"a commit to {self.name}",
            body=commit.lines(),
            headers={"Content-Type": "application/x-ndjson"},
            may_repeat=False,
            timeout_s=self.client.patience.commit_timeout_s,
        )
        found = self.client.call(request).object()
        return Committed(
            commit=found["commitOid"],
            url=found.get("commitUrl", ""),
            pull_request=found.get("pullRequestUrl") if creates_pr else None,
        )

    def pull_requests(self) -> dict[str, str]:
        """Return the newest commit of each pull request, by its ref ("refs/pr/1")."""
        path = f"{self._api}/refs?include_prs=1"
        found = self.client.get(path, f"the pull requests of {self.name}").object()
        return {item["ref"]: item["targetCommit"] for item in found.get("pullRequests") or []}


def _action(actions: Mapping[str, Any]) -> UploadAction | None:
    if "upload" not in actions:
        return None
    upload = actions["upload"]
    header = upload.get("header") or {}
    urls = {int(key): url for key, url in header.items() if key.isdigit()}
    return UploadAction(
        url=upload["href"],
        part_bytes=int(header["chunk_size"]) if "chunk_size" in header else None,
        part_urls=tuple(urls[number] for number in sorted(urls)),
        verify_url=(actions.get("verify") or {}).get("href"),
    )
