"""Pulls one commit of a repository, checked by hashes, into the cache that transformers shares."""

import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hanok.checkpoint.writer import write_json
from hanok.errors import HubError, OptionError
from hanok.hub.cache import Cache, check_names, place
from hanok.hub.client import Client, Log, Patience, Progress, connect
from hanok.hub.local import RECORD, check_patterns, matches
from hanok.hub.options import PullOptions
from hanok.hub.receive import Receiver
from hanok.hub.repository import RemoteFile, Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What a pull did."""

    repo: str
    revision: str
    commit: str
    """What the revision was; give it as the revision to get the same again."""
    folder: Path
    """The destination, or the snapshot in the cache."""
    files: tuple[str, ...]
    num_bytes: int
    received_bytes: int
    """By this call; the others were in the cache."""
    seconds: float


def pull(
    repo: str,
    destination: str | Path | None = None,
    options: PullOptions = PullOptions(),  # noqa: B008 (immutable)
    *,
    token: str | None = None,
    patience: Patience = Patience(),  # noqa: B008 (immutable)
    log: Log = lambda text: None,
    on_start: Callable[[int], None] = lambda total: None,
    progress: Progress = lambda count: None,
) -> PullReport:
    """Pull a repository, "owner/name", and return where it is.

    Files go into the cache that transformers uses; with a `destination` also into that folder, with a
    note of the commit (.hanok-pull.json). A pull that ended early is run again and continues. A file
    gets its name once all of it is there and its hash is right. `log`, `on_start` and `progress` are
    those of `push`. Raises HubError where the hub refuses, cannot be reached or sends something else,
    OptionError for a pattern that matches nothing.
    """
    with connect(options.endpoint, token, patience=patience, log=log) as client:
        return _pull(client, repo, destination, options, on_start, progress)


def _pull(
    client: Client,
    repo: str,
    destination: str | Path | None,
    options: PullOptions,
    on_start: Callable[[int], None],
    progress: Progress,
) -> PullReport:
    start = time.monotonic()
    repository = Repository(client, repo)
    commit = repository.head(options.revision).commit
    client.log(f"{repo} at {options.revision} is the commit {commit}")
    files = _wanted(repository.files(commit), repo, options)
    check_names(files)
    cache = Cache(options.cache_folder or _default_folder(), repo)
    contents = {file.etag: file for file in files.values()}
    num_bytes = sum(file.size for file in contents.values())
    _check_space(cache, contents.values())
    on_start(num_bytes)
    receiver = Receiver(
        repository=repository,
        cache=cache,
        commit=commit,
        verify=options.verify,
        progress=progress,
    )
    with ThreadPoolExecutor(options.connections) as pool:
        futures = [pool.submit(receiver.receive, file) for file in contents.values()]
        try:
            received = sum(future.result() for future in futures)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    folder = cache.publish(commit, options.revision, files)
    if destination is not None:
        folder = Path(destination)
        for name, file in files.items():
            is_link = file.sha256 is not None and not options.copy
            place(cache.blob(file.etag), folder / name, is_link=is_link)
        record = {"endpoint": client.endpoint, "repo": repo, "revision": options.revision}
        hashes = {name: file.etag for name, file in sorted(files.items())}
        write_json(folder / RECORD, {**record, "commit": commit, "files": hashes})
    return PullReport(
        repo=repo,
        revision=options.revision,
        commit=commit,
        folder=folder,
        files=tuple(sorted(files)),
        num_bytes=num_bytes,
        received_bytes=received,
        seconds=time.monotonic() - start,
    )


def _wanted(
    remote: dict[str, RemoteFile], repo: str, options: PullOptions
) -> dict[str, RemoteFile]:
    check_patterns(options.include, remote, "--include", repo)
    found = {
        name: file
        for name, file in remote.items()
        if matches(name, options.include, options.exclude)
    }
    if not found:
        raise OptionError(f"{repo}: no file is left to pull. Check --include and --exclude.")
    return found


def _check_space(cache: Cache, files: Iterable[RemoteFile]) -> None:
    missing = sum(file.size for file in files if not cache.blob(file.etag).exists())
    cache.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.folder).free
    if missing > free:
        raise HubError(
            f"{missing:,} bytes are to be received, and {cache.folder} has {free:,} free. Make room, or "
            "give another cache (--cache-folder)."
        )


def _default_folder() -> Path:
    # Imported here: it brings an HTTP client.
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
