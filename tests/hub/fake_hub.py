"""A hub on this machine: huggingface.co's wire protocol, failures on demand, and a count of every byte.

Large files go to a storage of another origin, as with the real hub. Commits are atomic; each names only
blobs that are there. As a program it serves one until it is killed and prints where:

    python tests/hub/fake_hub.py [--discard | --folder FOLDER] [--part-bytes N]

Such a program is for measurements: it compares sizes instead of hashes, which would take its time.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "secretsecretsecretsecretsecretse"
BLOCK_BYTES = 2**18
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
REGULAR_BYTES = 10**6


@dataclass
class Stored:
    """A file of a commit."""

    size: int
    blob: str
    content: bytes | None = None
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


@dataclass
class Commit:
    sha: str
    parent: str | None
    message: str
    files: dict[str, Stored]


@dataclass
class Repo:
    private: bool
    refs: dict[str, str]
    commits: dict[str, Commit]

    def commit_of(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Upload:
    oid: str
    size: int
    part_bytes: int
    parts: dict[int, bytes] = field(default_factory=dict)
    etags: dict[int, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What happens to the next requests of a kind instead of, or besides, their answers."""

    method: str
    path: str
    """A regular expression that is searched."""
    kind: Literal["status", "reset", "lost", "hold", "stall", "cut"]
    status: int = 0
    """For "status"."""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = '{"error": "injected"}'
    times: int = 1
    skip: int = 0
    """Requests of this kind that pass first."""
    after_bytes: int = 0
    """For "stall" (of a body that is received) and "cut" (of one that is sent)."""
    reads_body: bool = True
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True
    hub: "FakeHub"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def serve(self) -> None:
        self.drained = False
        path = self.path
        self.hub.note(self)
        self.fault = self.hub.take_fault(self.command, path)
        fault = self.fault
        with suppress(BrokenPipeError, ConnectionResetError):
            if fault is not None and fault.kind == "status":
                if fault.reads_body:
                    self.body()
                else:
                    self.close_connection = True
                self.answer(fault.status, fault.body.encode(), fault.headers)
                return
            if fault is not None and fault.kind == "reset":
                self.reset()
                return
            self.hub.route(self)
        if not self.drained and int(self.headers.get("Content-Length", 0)):
            self.close_connection = True

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def blocks(self) -> Iterator[memoryview]:
        """Yield the body as it comes; a client that is killed ends it early."""
        self.drained = True
        left = int(self.headers.get("Content-Length", 0))
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(left, 1))))
        stall, got = self.fault if self.fault and self.fault.kind == "stall" else None, 0
        while left:
            most = min(left, len(buffer))
            if stall is not None and not stall.release.is_set():
                most = min(most, max(1, stall.after_bytes - got))
            count = self.rfile.readinto(buffer[:most])  # type: ignore[attr-defined]
            if not count:
                raise ConnectionResetError
            left -= count
            got += count
            yield buffer[:count]
            if stall is not None and got >= stall.after_bytes and not stall.release.is_set():
                stall.reached.set()
                stall.release.wait(60)

    def body(self) -> bytes:
        return b"".join(bytes(block) for block in self.blocks())

    def object(self) -> Any:
        return json.loads(self.body())

    def answer(
        self, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        fault = self.fault
        if fault is not None and fault.kind == "hold":
            fault.reached.set()
            fault.release.wait(60)
        if fault is not None and fault.kind == "lost":
            self.reset()
            return
        self.hub.answers.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.kind == "cut":
            self.wfile.write(content[: fault.after_bytes])
            self.reset()
            return
        self.wfile.write(content)

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.answer(status, json.dumps(value).encode(), headers)

    def error(self, status: int, text: str, code: str = "") -> None:
        headers = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {})}
        self.json({"error": text}, status, headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients are killed in the middle of a request


class FakeHub:
    """Repositories, blobs and accounts, with a server for the hub and one for its storage."""

    def __init__(
        self,
        *,
        part_bytes: int = 1000,
        page_files: int = 50,
        blob_folder: Path | None = None,
        discards: bool = False,
    ) -> None:
        self.part_bytes = part_bytes
        """Larger files are uploaded in parts."""
        self.page_files = page_files
        self.blob_folder = blob_folder
        self.discards = discards
        """Keep no bytes, only count them."""
        self.accounts: dict[str, dict[str, Any]] = {TOKEN: account()}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, Upload] = {}
        self.received: Counter[str] = Counter()
        """Bytes that came for each blob, those of interrupted requests included."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.answers: list[tuple[str, str, int]] = []
        self.faults: list[Fault] = []
        self.verified: list[str] = []
        self.ignored: set[str] = set()
        self.keys = count()
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.servers = [Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (
            f"http://127.0.0.1:{server.server_port}" for server in self.servers
        )
        self.threads = [
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            for server in self.servers
        ]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        for fault in self.faults:
            fault.release.set()
        for server, thread in zip(self.servers, self.threads, strict=True):
            if thread.is_alive():
                server.shutdown()
                thread.join()
                server.server_close()

    # What tests prepare and look at

    def make(
        self, name: str, files: Mapping[str, bytes] | None = None, *, private: bool = False
    ) -> Repo:
        """Create a repository with a first commit, and one more of these files."""
        repo = Repo(private=private, refs={}, commits={})
        self.repos[name] = repo
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        first = self.commit_files(name, {".gitattributes": attributes}, "initial commit")
        assert first.parent is None
        if files is not None:
            self.commit_files(name, files, "files")
        return repo

    def commit_files(
        self, name: str, files: Mapping[str, bytes], message: str, ref: str = "main"
    ) -> Commit:
        """Commit as somebody else would."""
        repo = self.repos[name]
        parent = repo.refs.get(ref)
        found = dict(repo.commits[parent].files) if parent else {}
        for path, content in files.items():
            found[path] = self._stored(path, content)
        return self._add_commit(repo, ref, parent, message, found)

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        """Return a file as a reader of the repository gets it."""
        commit = self.repos[name].commit_of(revision)
        assert commit is not None
        file = commit.files[path]
        return self._bytes_of(file)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return all files but what a hub makes itself."""
        commit = self.repos[name].commit_of(revision)
        assert commit is not None
        return {
            path: self._bytes_of(file)
            for path, file in commit.files.items()
            if path != ".gitattributes"
        }

    def num_commits(self, name: str) -> int:
        return len(self.repos[name].commits)

    def add_fault(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def paths(self, method: str, pattern: str) -> list[str]:
        return [path for m, path, _ in self.requests if m == method and re.search(pattern, path)]

    # Requests

    def note(self, request: Handler) -> None:
        self.requests.append((request.command, request.path, dict(request.headers.items())))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def route(self, request: Handler) -> None:
        path = unquote(urlsplit(request.path).path)
        for method, pattern, action in ROUTES:
            if request.command in method.split("|") and (found := re.fullmatch(pattern, path)):
                if path.startswith("/storage/"):
                    assert "Authorization" not in request.headers
                action(self, request, *found.groups())
                return
        request.body()
        request.error(404, f"no such page: {path}")

    def account(self, request: Handler) -> dict[str, Any] | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        found = self.accounts.get(token)
        if found is None:
            request.body()
            request.error(401, "Invalid credentials in Authorization header")
        return found

    def found(self, request: Handler, name: str, revision: str | None) -> Commit | None:
        repo = self.repos.get(name)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.private and token not in self.accounts):
            status = 404 if token in self.accounts else 401
            request.error(status, "Repository not found", "RepoNotFound")
            return None
        commit = repo.commit_of(revision or "main")
        if commit is None:
            request.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self, request: Handler) -> None:
        if (found := self.account(request)) is not None:
            request.json(found)

    def create(self, request: Handler) -> None:
        if self.account(request) is None:
            return
        asked = request.object()
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.repos:
            request.error(409, "You already created this model repo")
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.make(name, private=private)
        request.json({"url": f"{self.url}/{name}", "name": name, "id": name})

    def branch(self, request: Handler, name: str, branch: str) -> None:
        if self.account(request) is None:
            return
        asked = request.object() or {}
        repo = self.repos[name]
        if branch in repo.refs:
            request.error(409, "Reference already exists")
            return
        start = repo.commit_of(asked.get("startingPoint") or "main")
        assert start is not None
        repo.refs[branch] = start.sha
        request.json({})

    def info(self, request: Handler, name: str, revision: str | None = None) -> None:
        if (commit := self.found(request, name, revision)) is None:
            return
        siblings = [
            {"rfilename": path, "size": file.size} for path, file in sorted(commit.files.items())
        ]
        private = self.repos[name].private
        value = {"id": name, "modelId": name, "sha": commit.sha, "private": private}
        request.json({**value, "siblings": siblings})

    def refs(self, request: Handler, name: str) -> None:
        if self.found(request, name, None) is None:
            return
        refs = self.repos[name].refs
        pulls = {ref: at for ref, at in refs.items() if ref.startswith("refs/pr/")}
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": at}
            for ref, at in refs.items()
            if ref not in pulls
        ]
        value: dict[str, Any] = {"branches": branches, "converts": [], "tags": []}
        value["pullRequests"] = [
            {"name": ref, "ref": ref, "targetCommit": at} for ref, at in pulls.items()
        ]
        request.json(value)

    def tree(self, request: Handler, name: str, revision: str) -> None:
        if (commit := self.found(request, name, revision)) is None:
            return
        start = int(parse_qs(urlsplit(request.path).query).get("cursor", ["0"])[0])
        folders = {
            str(parent)
            for path in commit.files
            for parent in Path(path).parents
            if str(parent) != "."
        }
        entries: list[dict[str, Any]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            for path in sorted(folders)
        ]
        for path, file in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.blob}
            entry["size"] = file.size
            if file.sha256 is not None:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        end = start + self.page_files
        headers = {}
        if end < len(entries):
            base = request.path.partition("?")[0]
            headers["Link"] = f'<{self.url}{base}?recursive=true&cursor={end}>; rel="next"'
        request.json(entries[start:end], headers=headers)

    def preupload(self, request: Handler, name: str, revision: str) -> None:
        if self.account(request) is None:
            return
        asked = request.object()["files"]
        if self.found(request, name, revision) is None:
            return
        assert len(asked) <= 256
        request.json(
            {
                "files": [
                    {
                        "path": item["path"],
                        "uploadMode": _mode(item["path"], item["size"]),
                        "shouldIgnore": item["path"] in self.ignored,
                        "oid": None,
                    }
                    for item in asked
                ]
            }
        )

    def batch(self, request: Handler, name: str) -> None:
        if self.account(request) is None:
            return
        asked = request.object()
        if self.found(request, name, None) is None:
            return
        objects: list[dict[str, Any]] = []
        for item in asked["objects"]:
            found = {"oid": item["oid"], "size": item["size"]}
            if not self._has(item["oid"]):
                found["actions"] = self._actions(name, item["oid"], item["size"])
            objects.append(found)
        transfer = "multipart" if any("chunk_size" in str(item) for item in objects) else "basic"
        request.json({"transfer": transfer, "objects": objects})

    def _actions(self, name: str, oid: str, size: int) -> dict[str, Any]:
        verify = {"href": f"{self.url}/{name}.git/info/lfs/verify"}
        with self.lock:
            key = f"u{next(self.keys)}"
            self.uploads[key] = Upload(oid=oid, size=size, part_bytes=self.part_bytes)
        if size <= self.part_bytes:
            return {"upload": {"href": f"{self.storage_url}/storage/{key}/whole"}, "verify": verify}
        most = -(-size // self.part_bytes)
        header = {
            f"{number:05}": f"{self.storage_url}/storage/{key}/part/{number}?signature=x"
            for number in range(1, most + 1)
        }
        header["chunk_size"] = str(self.part_bytes)
        href = f"{self.url}/api/complete_multipart?uploadId={key}"
        return {"upload": {"href": href, "header": header}, "verify": verify}

    def whole(self, request: Handler, key: str) -> None:
        upload = self.uploads.get(key)
        content = self._receive(request, upload, key, 1)
        if upload is None:
            request.error(403, "Request has expired")
        elif self._is_right(upload, [content]):
            self._finish(key, upload, [content])
            request.answer(200, headers={"ETag": f'"{upload.oid[:32]}"'})
        else:
            request.error(400, "the content does not match its hash")

    def part(self, request: Handler, key: str, number: str) -> None:
        upload = self.uploads.get(key)
        content = self._receive(request, upload, key, int(number))
        if upload is None:
            request.error(403, "Request has expired")
            return
        etag = f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}-{number}"'
        upload.parts[int(number)] = content
        upload.etags[int(number)] = etag
        request.answer(200, headers={"ETag": etag})

    def _receive(self, request: Handler, upload: Upload | None, key: str, number: int) -> bytes:
        """Take a body in; return it if it is kept in memory."""
        blocks = []
        start = 0 if upload is None else (number - 1) * upload.part_bytes
        with self._opened(key) as file:
            for block in request.blocks():
                self.received["no upload" if upload is None else upload.oid] += len(block)
                if file is not None:
                    start += os.pwrite(file, block, start)
                elif not self.discards:
                    blocks.append(bytes(block))
        return b"".join(blocks)

    @contextmanager
    def _opened(self, key: str) -> Iterator[int | None]:
        if self.blob_folder is None:
            yield None
            return
        file = os.open(self.blob_folder / key, os.O_WRONLY | os.O_CREAT)
        try:
            yield file
        finally:
            os.close(file)

    def _is_right(self, upload: Upload, parts: list[bytes]) -> bool:
        if self.discards or self.blob_folder is not None:
            return True
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return digest.hexdigest() == upload.oid

    def _finish(self, key: str, upload: Upload, parts: list[bytes]) -> None:
        if self.blob_folder is not None:
            (self.blob_folder / key).rename(self.blob_folder / upload.oid)
        self.blobs[upload.oid] = b"".join(parts)
        with self.lock:
            self.uploads.pop(key, None)

    def complete(self, request: Handler) -> None:
        asked = request.object()
        key = parse_qs(urlsplit(request.path).query)["uploadId"][0]
        upload = self.uploads.get(key)
        if upload is None or upload.oid != asked["oid"]:
            request.error(404, "no such upload")
            return
        most = -(-upload.size // upload.part_bytes)
        listed = {item["partNumber"]: item["etag"] for item in asked["parts"]}
        if listed != upload.etags or sorted(listed) != list(range(1, most + 1)):
            request.error(400, "the parts are not those that came")
            return
        parts = [upload.parts[number] for number in range(1, most + 1)]
        if not self._is_right(upload, parts):
            request.error(400, "the content does not match its hash")
            return
        self._finish(key, upload, parts)
        request.json({})

    def stats(self, request: Handler) -> None:
        request.json({"received": self.received.total(), "blobs": len(self.blobs)})

    def verify(self, request: Handler, name: str) -> None:
        if self.account(request) is None:
            return
        asked = request.object()
        self.verified.append(asked["oid"])
        request.json({}, 200 if self._has(asked["oid"]) else 404)

    def commit(self, request: Handler, name: str, revision: str) -> None:
        if self.account(request) is None:
            return
        lines = [json.loads(line) for line in request.body().splitlines()]
        head = lines[0]["value"]
        base = self.found(request, name, revision)
        if base is None:
            return
        with self.lock:
            repo = self.repos[name]
            if (parent := head.get("parentCommit")) and parent != repo.refs.get(revision):
                request.error(412, "The parent commit is not the head of this branch")
                return
            files = dict(base.files)
            for line in lines[1:]:
                if text := self._apply(files, line["key"], line["value"]):
                    request.error(400, text)
                    return
            creates = parse_qs(urlsplit(request.path).query).get("create_pr") == ["1"]
            number = sum(ref.startswith("refs/pr/") for ref in repo.refs)
            ref = f"refs/pr/{number + 1}" if creates else revision
            made = self._add_commit(repo, ref, base.sha, head["summary"], files)
        value: dict[str, Any] = {"success": True, "commitOid": made.sha}
        value["commitUrl"] = f"{self.url}/{name}/commit/{made.sha}"
        if creates:
            value["pullRequestUrl"] = f"{self.url}/{name}/discussions/{number + 1}"
        request.json(value)

    def _apply(self, files: dict[str, Stored], key: str, value: Mapping[str, Any]) -> str:
        """Apply one line of a commit; return what is wrong with it."""
        path = value["path"]
        if key == "file":
            files[path] = self._stored(path, base64.b64decode(value["content"]), is_large=False)
        elif key == "lfsFile":
            if not self._has(value["oid"]):
                return f"the blob of {path} was not uploaded"
            blob = hashlib.sha1(value["oid"].encode(), usedforsecurity=False).hexdigest()
            files[path] = Stored(size=value["size"], blob=blob, sha256=value["oid"])
        elif path not in files:
            return f"no such file: {path}"
        else:
            del files[path]
        return ""

    def resolve(self, request: Handler, name: str, revision: str, path: str) -> None:
        if (commit := self.found(request, name, revision)) is None:
            return
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            request.error(404, "Entry not found", "EntryNotFound")
        elif file.sha256 is not None:
            headers |= {
                "X-Linked-ETag": f'"{file.sha256}"',
                "X-Linked-Size": str(file.size),
                "Location": f"{self.storage_url}/storage/blob/{file.sha256}",
            }
            request.answer(302, headers=headers)
        else:
            assert file.content is not None
            self._send(request, file.content, {**headers, "ETag": f'"{file.blob}"'})

    def blob(self, request: Handler, oid: str) -> None:
        self._send(request, self._blob(oid), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _send(self, request: Handler, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            request.answer(200, content, {"Content-Length": str(len(content)), **headers})
            return
        start = int(asked[1])
        end = min(int(asked[2] or len(content) - 1), len(content) - 1)
        if start > end:
            request.answer(416, headers={"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        request.answer(206, content[start : end + 1], headers)

    def validate_yaml(self, request: Handler) -> None:
        request.body()
        request.json({"errors": [], "warnings": []})

    # Storage

    def _stored(self, path: str, content: bytes, *, is_large: bool | None = None) -> Stored:
        start = f"blob {len(content)}\0".encode()
        blob = hashlib.sha1(start + content, usedforsecurity=False).hexdigest()
        if is_large is None:
            is_large = _mode(path, len(content)) == "lfs"
        if not is_large:
            return Stored(size=len(content), blob=blob, content=content)
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return Stored(size=len(content), blob=blob, sha256=digest)

    def _add_commit(
        self, repo: Repo, ref: str, parent: str | None, message: str, files: dict[str, Stored]
    ) -> Commit:
        listed = sorted((path, file.etag) for path, file in files.items())
        text = json.dumps([parent, message, len(repo.commits), listed])
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        made = Commit(sha=sha, parent=parent, message=message, files=files)
        repo.commits[sha] = made
        repo.refs[ref] = sha  # only now can anybody see it
        return made

    def _has(self, oid: str) -> bool:
        return oid in self.blobs

    def _blob(self, oid: str) -> bytes:
        if self.blob_folder is not None:
            return (self.blob_folder / oid).read_bytes()
        return self.blobs[oid]

    def _bytes_of(self, file: Stored) -> bytes:
        return file.content if file.content is not None else self._blob(file.sha256 or "")


def account(
    name: str = "me", role: str = "write", orgs: tuple[str, ...] = ("team",), **fine: Any
) -> dict[str, Any]:
    """Return what whoami answers."""
    token: dict[str, Any] = {"displayName": "test", "role": role}
    if role == "fineGrained":
        token["fineGrained"] = fine
    listed = [{"name": org, "type": "org"} for org in orgs]
    return {"type": "user", "name": name, "orgs": listed, "auth": {"accessToken": token}}


def _mode(path: str, size: int) -> str:
    return "lfs" if path.endswith(LARGE_SUFFIXES) or size > REGULAR_BYTES else "regular"


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/stats", FakeHub.stats),
    ("GET", r"/api/whoami-v2", FakeHub.whoami),
    ("POST", r"/api/repos/create", FakeHub.create),
    ("POST", r"/api/validate-yaml", FakeHub.validate_yaml),
    ("POST", r"/api/complete_multipart", FakeHub.complete),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", FakeHub.branch),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", FakeHub.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", FakeHub.commit),
    ("GET", rf"/api/models/{NAME}/refs", FakeHub.refs),
    ("GET", rf"/api/models/{NAME}/tree/(.+)", FakeHub.tree),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", FakeHub.info),
    ("GET", rf"/api/models/{NAME}", FakeHub.info),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", FakeHub.batch),
    ("POST", rf"/{NAME}\.git/info/lfs/verify", FakeHub.verify),
    ("PUT", r"/storage/(\w+)/whole", FakeHub.whole),
    ("PUT", r"/storage/(\w+)/part/(\d+)", FakeHub.part),
    ("GET|HEAD", r"/storage/blob/(\w+)", FakeHub.blob),
    ("GET|HEAD", rf"/{NAME}/resolve/((?:refs/pr/\d+)|[^/]+)/(.+)", FakeHub.resolve),
]


@contextmanager
def running(**options: Any) -> Iterator[FakeHub]:
    """Run a hub for a block."""
    hub = FakeHub(**options)
    try:
        yield hub
    finally:
        hub.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a hub until it is killed.")
    parser.add_argument("--discard", action="store_true", help="keep no bytes")
    parser.add_argument("--folder", type=Path, help="keep blobs here instead of in memory")
    parser.add_argument("--part-bytes", type=int, default=16 * 2**20)
    options = parser.parse_args()
    with running(
        part_bytes=options.part_bytes, blob_folder=options.folder, discards=options.discard
    ) as hub:
        print(json.dumps({"url": hub.url, "token": TOKEN, "pid": os.getpid()}), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
