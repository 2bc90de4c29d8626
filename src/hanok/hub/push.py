"""Pushes a folder to a model's repository: checked first, uploaded resumably, visible in one commit.

Nothing of a push can be seen before its commit; a push that ended early is run again, and continues.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from hanok.errors import HubError, OptionError
from hanok.hub.client import Log, Patience, Progress, connect
from hanok.hub.commit import is_in, make_commit
from hanok.hub.follow import Watch
from hanok.hub.journal import Journal
from hanok.hub.local import Listing, LocalFile, list_folder, local_file
from hanok.hub.options import STATE_FOLDER, PushOptions
from hanok.hub.preflight import (
    MAIN,
    Preflight,
    deletions_of,
    look_at_target,
    make_preflight,
)
from hanok.hub.repository import Addition, Commit, Repository, account_of
from hanok.hub.screening import problems_of
from hanok.hub.upload import Uploader
from hanok.package import __version__

LOOK_S = 1.0
MEASURED_BYTES = 10**7
"""The rate of a smaller push says little about the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What a push did."""

    repo: str
    revision: str
    commit: str | None
    """The commit that holds the files; None for a dry run of a repository that does not exist."""
    parent: str | None
    """The commit that was compared with."""
    url: str
    """The page of the commit, or of the repository."""
    pull_request: str | None
    """Its page."""
    is_new_commit: bool
    """False where the repository held all of it already, and for a dry run."""
    changed: tuple[str, ...]
    """The files that the commit added or replaced."""
    deleted: tuple[str, ...]
    num_files: int
    num_bytes: int
    """Of all files."""
    sent_bytes: int
    """Of large files, uploaded by this call; the hub had the others, or an earlier call sent them."""
    seconds: float
    preflight: Preflight | None
    """None for a push by `Push` alone."""


class Push:
    """A push in steps: files are uploaded as they are added, and become visible with `finish`.

    For programs that write a model shard by shard; `push` is one call for a folder.

    >>> with Push("org/name") as push:  # doctest: +SKIP
    ...     push.add(Path("out/model-00001-of-00002.safetensors"))
    ...     report = push.finish()
    """

    def __init__(
        self,
        repo: str,
        options: PushOptions = PushOptions(),  # noqa: B008 (immutable)
        *,
        token: str | None = None,
        state_folder: Path | None = None,
        patience: Patience = Patience(),  # noqa: B008 (immutable)
        log: Log = lambda text: None,
        progress: Progress = lambda count: None,
    ) -> None:
        """Ask the hub who this is and what the repository holds; changes nothing there.

        `token`: huggingface_hub's by default (HF_TOKEN, or a login). `state_folder` is where what
        continues a killed push is noted, ~/.cache/hanok/hub by default. `log` gets what is worth a line,
        `progress` bytes as they are sent or found on the hub. Raises HubError where the repository
        cannot be written to, or the hub not be reached.
        """
        self._start = time.monotonic()
        self._options = options
        self._log = log
        self.client = connect(options.endpoint, token, patience=patience, log=log)
        """What speaks to the hub."""
        try:
            self._look(repo)
        except BaseException:
            self.client.close()
            raise
        self._journal = Journal((state_folder or STATE_FOLDER).expanduser())
        self._journal.prune()
        self._uploader = Uploader(
            self._repository,
            self._journal,
            connections=options.connections,
            log=log,
            progress=progress,
        )
        self._files: dict[str, LocalFile] = {}
        self._large: dict[str, str] = {}
        self._is_ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.close()

    def _look(self, repo: str) -> None:
        account = account_of(self.client)
        name = repo if "/" in repo else f"{account.name}/{repo}"
        self._repository = Repository(self.client, name)
        self._target = look_at_target(self._repository, self._options, account)

    def preflight(self, listing: Listing) -> Preflight:
        """Return what a push of these files would do; it changes nothing."""
        return make_preflight(self._repository, self._options, self._target, listing, self._journal)

    def add(self, path: Path, name: str | None = None) -> None:
        """Upload a complete file, to be called `name` in the repository (default: the file's own name).

        A large file may be renamed or removed afterwards; a small one is read again by `finish`.
        Raises HubError where it must not be published (see `PushOptions`), CheckpointError where it
        changes meanwhile.
        """
        self.add_files([local_file(path, name or path.name)], are_checked=False)

    def add_files(self, files: Sequence[LocalFile], *, are_checked: bool) -> None:
        """Upload complete files. `are_checked`: a `preflight` had no problem with them."""
        if not are_checked:
            self._check(files)
        self._make_ready()
        options, target = self._options, self._target
        revision = options.revision if target.has_revision else MAIN
        modes, ignored = self._repository.modes(files, revision, creates_pr=options.create_pr)
        if ignored:
            self._log(f"left out because of .gitignore: {', '.join(sorted(ignored))}")
        files = [file for file in files if file.name not in ignored]
        large = [file for file in files if modes.get(file.name) == "lfs"]
        for file in files:
            self._files[file.name] = file
            self._large.pop(file.name, None)
        for uploaded in self._uploader.upload(large, self._is_known):
            self._large[uploaded.file.name] = uploaded.sha256

    def finish(self, preflight: Preflight | None = None) -> PushReport:
        """Make the commit, if it changes anything, and return what was done.

        Raises HubError where another commit came first, or the hub refuses this one; then nothing of it
        is visible.
        """
        self._make_ready()
        options, target, repository = self._options, self._target, self._repository
        additions = [self._addition(file) for file in self._files.values()]
        changed = [item for item in additions if not is_in(item, target.remote)]
        deletions = deletions_of(options, target, self._files)
        commit, url, pull_request = target.parent, repository.url, None
        if target.exists and not target.has_revision and target.parent is not None:
            repository.create_branch(options.revision, target.parent)
        if changed or deletions:
            made = make_commit(
                repository,
                Commit(
                    message=options.message or f"Push {len(changed)} files",
                    description=f"hanok {__version__}",
                    parent=target.parent,
                    additions=changed,
                    deletions=deletions,
                ),
                options.revision,
                creates_pr=options.create_pr,
            )
            commit, url, pull_request = made.commit, made.url, made.pull_request
        seconds = time.monotonic() - self._start
        sent = self._uploader.sent_bytes
        if sent >= MEASURED_BYTES:
            self._journal.note_rate(self.client.endpoint, sent / seconds)
        return PushReport(
            repo=repository.name,
            revision=options.revision,
            commit=commit,
            parent=target.parent,
            url=url,
            pull_request=pull_request,
            is_new_commit=bool(changed or deletions),
            changed=tuple(item.name for item in changed),
            deleted=deletions,
            num_files=len(self._files),
            num_bytes=sum(file.size for file in self._files.values()),
            sent_bytes=sent,
            seconds=seconds,
            preflight=preflight,
        )

    def dry_report(self, preflight: Preflight) -> PushReport:
        """Return the report of a push that did nothing."""
        return PushReport(
            repo=self._repository.name,
            revision=self._options.revision,
            commit=self._target.parent,
            parent=self._target.parent,
            url=self._repository.url,
            pull_request=None,
            is_new_commit=False,
            changed=(),
            deleted=(),
            num_files=len(preflight.listing.files),
            num_bytes=preflight.num_bytes,
            sent_bytes=0,
            seconds=time.monotonic() - self._start,
            preflight=preflight,
        )

    def _check(self, files: Sequence[LocalFile]) -> None:
        options = self._options
        problems = list(
            problems_of(
                files, allow_pickles=options.allow_pickles, allow_secrets=options.allow_secrets
            )
        )
        if problems:
            raise HubError(f"nothing of {self._repository.name} was changed. {' '.join(problems)}")

    def _make_ready(self) -> None:
        """Create the repository if it has to be; its first commit is the parent of ours."""
        if self._is_ready:
            return
        if not self._target.exists:
            self._repository.create(is_private=self._options.private)
            self._target = look_at_target(self._repository, self._options, self._target.account)
        self._is_ready = True

    def _is_known(self, file: LocalFile, oid: str) -> bool:
        remote = self._target.remote.get(file.name)
        return remote is not None and remote.sha256 == oid

    def _addition(self, file: LocalFile) -> Addition:
        oid = self._large.get(file.name)
        # What was uploaded is named by its hash, and may be renamed or removed since.
        if not file.is_unchanged() and (oid is None or file.path.exists()):
            raise HubError(
                f"{file.path}: changed after it was uploaded, and nothing was committed. Push again "
                "once it is written, or with --follow."
            )
        content = file.path.read_bytes() if oid is None else None
        return Addition(name=file.name, size=file.size, content=content, sha256=oid)


def push(
    folder: str | Path,
    repo: str,
    options: PushOptions = PushOptions(),  # noqa: B008 (immutable)
    *,
    token: str | None = None,
    state_folder: Path | None = None,
    patience: Patience = Patience(),  # noqa: B008 (immutable)
    log: Log = lambda text: None,
    on_start: Callable[[int], None] = lambda total: None,
    progress: Progress = lambda count: None,
) -> PushReport:
    """Push a folder (or one file) to a repository, "owner/name" or "name" of your own.

    What would be done is found out first and given to `log`; large files are then uploaded, those that
    the hub has left out, and one commit makes all of it visible. After a push that ended early, another
    one continues where it was. The other arguments are those of `Push`; `on_start` gets the bytes of all
    files. Raises HubError where the hub refuses or something must not be published, CheckpointError
    where a file cannot be read or changes, OptionError for a pattern that matches nothing.
    """
    folder = Path(folder)
    if options.follow and folder.is_file():
        raise OptionError(f"{folder}: is a file; follow needs the folder that is being written.")
    if not options.follow:
        listing = list_folder(folder, options.include, options.exclude)
    if options.message is None:
        options = replace(options, message=f"Push {folder.resolve().name}")
    with Push(
        repo,
        options,
        token=token,
        state_folder=state_folder,
        patience=patience,
        log=log,
        progress=progress,
    ) as running:
        if options.follow:
            return _follow(running, folder, options, log)
        preflight = running.preflight(listing)
        for line in preflight.lines():
            log(line)
        preflight.check()
        if options.dry_run:
            return running.dry_report(preflight)
        on_start(preflight.num_bytes)
        running.add_files(listing.files, are_checked=True)
        return running.finish(preflight)


def _follow(running: Push, folder: Path, options: PushOptions, log: Log) -> PushReport:
    """Upload each file once it is complete, and commit when all are there."""
    watch = Watch(folder, options.include, options.exclude, options.until)
    waited_s = 0.0
    while True:
        new = watch.look()
        if new:
            waited_s = 0.0
            log(f"complete: {', '.join(file.name for file in new)}")
            if not options.dry_run:
                running.add_files(new, are_checked=False)
        elif watch.is_over():
            break
        if waited_s >= options.patience_s:
            raise HubError(
                f"{folder}: no further file was completed within {waited_s:.0f} s; missing: "
                f"{watch.missing() or 'the end of a file that is being written'}. Nothing was "
                "committed; run it again to continue."
            )
        running.client.patience.sleep(LOOK_S)
        waited_s += LOOK_S
    preflight = running.preflight(list_folder(folder, options.include, options.exclude))
    for line in preflight.lines():
        log(line)
    preflight.check()
    return running.dry_report(preflight) if options.dry_run else running.finish(preflight)
