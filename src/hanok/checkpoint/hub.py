"""Looks at a checkpoint on the Hugging Face hub without downloading its weights.

Only the header of each weights file is requested (an HTTP range request), and written at the start of a
sparse file of the full size, which takes no space on disk. The result looks like the real folder to
everything that reads no weights: all checks of a checkpoint on disk apply to it too.
"""

import json
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from hanok.errors import CheckpointError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
JSON_SUFFIX = ".json"
WEIGHTS_SUFFIX = ".safetensors"
FIRST_BYTES = 100_000  # most headers are shorter, so one request is enough
MOST_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
MOST_JSON_BYTES = 50_000_000
TIMEOUT_S = 30


def is_repo_id(text: str) -> bool:
    """Return whether a text names a checkpoint on the hub ("org/name", "org/name@revision")."""
    return REPO_ID.fullmatch(text) is not None and not Path(text).exists()


@contextmanager
def without_weights(repo_id: str) -> Iterator[Path]:
    """Provide a folder with a hub checkpoint's JSON files, and its weights files as headers alone.

    `repo_id` may end in @ and a revision. The endpoint and the token are huggingface_hub's (HF_ENDPOINT,
    HF_TOKEN). Raises CheckpointError where the hub cannot be asked, or has no safetensors there.
    """
    # Imported here: it brings an HTTP client that nothing else needs.
    from huggingface_hub import constants, get_token

    name, _, revision = repo_id.partition("@")
    repository = _Repository(
        endpoint=constants.ENDPOINT, name=name, revision=revision or "main", token=get_token()
    )
    with tempfile.TemporaryDirectory(prefix="hanok-hub-") as folder:
        _write(repository, Path(folder))
        yield Path(folder)


def _write(repository: "_Repository", folder: Path) -> None:
    files = repository.sizes()
    weights = [file for file in files if file.endswith(WEIGHTS_SUFFIX)]
    if not weights:
        raise CheckpointError(
            f"{repository.name} has no {WEIGHTS_SUFFIX} files on {repository.endpoint}; only those can "
            "be planned without downloading. Download it (`hf download`) and plan the folder."
        )
    for file, size in files.items():
        if file.endswith(JSON_SUFFIX) and size <= MOST_JSON_BYTES:
            (folder / file).write_bytes(repository.read(file, 0, size))
    for file in weights:
        _write_header(repository, folder / file, files[file])


def _write_header(repository: "_Repository", target: Path, size_bytes: int) -> None:
    start = repository.read(target.name, 0, min(FIRST_BYTES, size_bytes))
    header_bytes = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if header_bytes > MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{repository.name}: {target.name} begins with a header of {header_bytes:,} bytes, which no "
            "safetensors file has."
        )
    missing = 8 + header_bytes - len(start)
    if missing > 0:
        start += repository.read(target.name, len(start), missing)
    with target.open("wb") as file:
        file.write(start)
        file.truncate(size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repository:
    """A model on a hub, and how it is asked for."""

    endpoint: str
    name: str
    revision: str
    token: str | None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each top-level file; deeper folders hold other forms of the model."""
        revision = quote(self.revision, safe="")
        url = f"{self.endpoint}/api/models/{self.name}/revision/{revision}?blobs=true"
        siblings = json.loads(self._answer(url, None)).get("siblings", [])
        found = {item["rfilename"]: item.get("size") or 0 for item in siblings}
        return {file: size for file, size in found.items() if Path(file).name == file}

    def read(self, file: str, first: int, count: int) -> bytes:
        """Return `count` bytes of a file from `first` on; a server that sends more is cut off."""
        if count == 0:
            return b""
        revision = quote(self.revision, safe="")
        url = f"{self.endpoint}/{self.name}/resolve/{revision}/{quote(file)}"
        found = self._answer(url, range(first, first + count))
        if len(found) < count:
            raise CheckpointError(f"{url} ended after {len(found)} of {count} bytes; try again.")
        return found

    def _answer(self, url: str, part: range | None) -> bytes:
        request = Request(url)
        if self.token:
            # Never forwarded to where the hub redirects.
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        if part is not None:
            request.add_header("Range", f"bytes={part.start}-{part.stop - 1}")
        try:
            with urlopen(request, timeout=TIMEOUT_S) as answer:
                if part and part.start and answer.status != HTTPStatus.PARTIAL_CONTENT:
                    raise CheckpointError(
                        f"{url} does not answer range requests; download the checkpoint."
                    )
                content: bytes = answer.read() if part is None else answer.read(len(part))
                return content
        except HTTPError as error:
            raise CheckpointError(self._refusal(error)) from error
        except (URLError, OSError) as error:
            raise CheckpointError(
                f"{self.name} is not a folder here, and {self.endpoint} cannot be reached: {error}. "
                "Check the path or the network."
            ) from error

    def _refusal(self, error: HTTPError) -> str:
        if error.headers.get("X-Error-Code") == "GatedRepo":
            return (
                f"{self.name} is gated: accept its terms on {self.endpoint}/{self.name}, and log in "
                "(`hf auth login`)."
            )
        if error.code in (HTTPStatus.NOT_FOUND, HTTPStatus.UNAUTHORIZED):
            return (
                f"{self.name} at {self.revision} is neither a folder here nor a model on "
                f"{self.endpoint} that you may see. Check the name; for a private one log in "
                "(`hf auth login`)."
            )
        return f"{error.url} answers {error.code} {error.reason}."
