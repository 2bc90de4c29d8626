"""What a push would do, before anything is changed: who, where, how much, and what forbids it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from hanok.checkpoint.card import CARD, problems
from hanok.checkpoint.front_matter import front_matter
from hanok.errors import CheckpointError, HubError
from hanok.hub.journal import Journal
from hanok.hub.local import Listing, check_patterns, matches
from hanok.hub.options import PushOptions
from hanok.hub.refusals import Refused
from hanok.hub.repository import Account, Head, RemoteFile, Repository
from hanok.hub.screening import problems_of

MAIN = "main"
CARD_FIELDS = ("license", "base_model", "base_model_relation", "library_name")
LARGE_BYTES = 20 * 10**9
"""Files beyond this fail often; shards of 5 GB are usual."""
MANY_FILES = 10_000
LISTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a push goes, as it was before the push."""

    account: Account
    exists: bool
    is_private: bool
    has_revision: bool
    parent: str | None
    """The commit that the new one is made on."""
    remote: Mapping[str, RemoteFile] = field(repr=False)
    """What that commit holds, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What a push would do, and what speaks against it."""

    repo: str
    endpoint: str
    options: PushOptions
    target: Target
    listing: Listing
    deletions: tuple[str, ...]
    card: Mapping[str, str]
    """What the front matter of README.md says of licence and base model."""
    problems: tuple[str, ...]
    """Why nothing is pushed; empty if all is well."""
    warnings: tuple[str, ...]
    bytes_per_s: float | None
    """Of the last push to this hub."""

    @property
    def num_bytes(self) -> int:
        """Of all files, those that the hub has already included."""
        return sum(file.size for file in self.listing.files)

    def lines(self) -> list[str]:
        """Return it as text, a line for each fact."""
        target, options = self.target, self.options
        account = target.account
        where = f"{self.repo}, {options.revision}, at {self.endpoint}"
        if not target.exists:
            where += f" (to be created, {'private' if options.private else 'public'})"
        elif not target.has_revision:
            where += " (the branch is to be created)"
        lines = [
            f"you      {account.name}, with a token of the role {account.role or 'unknown'}",
            f"to       {where}{', as a pull request' if options.create_pr else ''}",
        ]
        if self.listing.files:
            largest = max(self.listing.files, key=lambda file: file.size)
            lines += [
                f"files    {len(self.listing.files)}, {self.num_bytes:,} bytes; the largest is "
                f"{largest.name}, {largest.size:,} bytes",
                f"time     {self._time()}",
            ]
        if self.card:
            said = ", ".join(f"{key} {value}" for key, value in self.card.items())
            lines.append(f"card     {said}")
        if self.listing.left_out:
            lines.append(f"left out {_some(self.listing.left_out)}")
        if self.deletions:
            lines.append(f"deleted  {_some(self.deletions)}")
        return lines + [f"warning  {text}" for text in self.warnings]

    def check(self) -> None:
        """Raise HubError with all problems, if there are any."""
        if self.problems:
            listed = "".join(f"\n  - {text}" for text in self.problems)
            raise HubError(f"nothing was pushed to {self.repo}:{listed}")

    def _time(self) -> str:
        if self.bytes_per_s is None:
            return "unknown before the first push to this hub"
        seconds = self.num_bytes / self.bytes_per_s
        text = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        return (
            f"about {text}, at the {self.bytes_per_s / 1e6:.1f} MB/s of the last push to this hub"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """What is found in README.md."""

    fields: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def look_at_target(repository: Repository, options: PushOptions, account: Account) -> Target:
    """Ask the hub what the repository holds; HubError where it cannot be written to. Changes nothing."""
    reason = account.why_not(repository.name, creates_pr=options.create_pr)
    if reason is not None:
        raise HubError(f"{repository.name} cannot be written to: {reason}.")
    try:
        head = repository.head(options.revision)
    except Refused as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        if error.code == "RevisionNotFound":
            return _without_branch(repository, options, account)
        if options.create_pr:
            raise HubError(
                f"{repository.name} does not exist, so it can have no pull request. Leave --create-pr "
                "out to create it, or check the name."
            ) from error
        return Target(
            account=account,
            exists=False,
            is_private=options.private,
            has_revision=False,
            parent=None,
            remote={},
        )
    return _target_at(repository, head, account, has_revision=True)


def _without_branch(repository: Repository, options: PushOptions, account: Account) -> Target:
    """Return the target for a branch that is made of the newest commit of main."""
    if options.create_pr or options.revision.startswith("refs/"):
        raise HubError(
            f"{repository.name} has no {options.revision}. Give a branch that exists, or leave "
            "--create-pr out to create it."
        )
    return _target_at(repository, repository.head(MAIN), account, has_revision=False)


def _target_at(
    repository: Repository, head: Head, account: Account, *, has_revision: bool
) -> Target:
    return Target(
        account=account,
        exists=True,
        is_private=head.is_private,
        has_revision=has_revision,
        parent=head.commit,
        remote=repository.files(head.commit),
    )


def make_preflight(
    repository: Repository,
    options: PushOptions,
    target: Target,
    listing: Listing,
    journal: Journal,
) -> Preflight:
    """Return what a push of these files would do. Reads the small ones, changes nothing."""
    check_patterns(
        options.include, [file.name for file in listing.files], "--include", "the folder"
    )
    check_patterns(options.delete, target.remote, "--delete", repository.name)
    pushed = {file.name for file in listing.files}
    card = _read_card(listing)
    faults = problems_of(
        listing.files, allow_pickles=options.allow_pickles, allow_secrets=options.allow_secrets
    )
    endpoint = repository.client.endpoint
    return Preflight(
        repo=repository.name,
        endpoint=endpoint,
        options=options,
        target=target,
        listing=listing,
        deletions=deletions_of(options, target, pushed),
        card=card.fields,
        problems=(*faults, *card.problems),
        warnings=(*_warnings(options, target, listing), *card.warnings),
        bytes_per_s=journal.rate(endpoint),
    )


def _read_card(listing: Listing) -> _Card:
    """Read the card to be pushed; a hub refuses front matter that is no YAML."""
    path = next((file.path for file in listing.files if file.name == CARD), None)
    if path is None:
        return _Card()
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = front_matter(text)
    except CheckpointError as error:
        return _Card(problems=(f"{CARD}: {error}",))
    return _Card(
        fields={key: str(found[key]) for key in CARD_FIELDS if key in found},
        warnings=tuple(f"{CARD}: {text}" for text in problems(text)),
    )


def deletions_of(options: PushOptions, target: Target, pushed: Collection[str]) -> tuple[str, ...]:
    """Return the files of the repository that the push deletes."""
    if not options.delete:
        return ()
    unpushed = sorted(target.remote.keys() - set(pushed))
    return tuple(name for name in unpushed if matches(name, options.delete, ()))


def _warnings(options: PushOptions, target: Target, listing: Listing) -> list[str]:
    found = [
        f"{file.name} has {file.size:,} bytes; uploads of such files fail often. Shards of 5 GB are "
        "usual."
        for file in listing.files
        if file.size > LARGE_BYTES
    ]
    if len(listing.files) > MANY_FILES:
        found.append(f"{len(listing.files)} files in one commit take a hub minutes.")
    if options.private and target.exists and not target.is_private:
        found.append("the repository exists and is public; --private does not change that.")
    names = {file.name for file in listing.files}
    if names and not options.include and CARD not in names and CARD not in target.remote:
        found.append(f"there is no {CARD}: others see neither the licence nor the base model.")
    return found


def _some(names: Sequence[str]) -> str:
    text = ", ".join(names[:LISTED])
    return text if len(names) <= LISTED else f"{text} and {len(names) - LISTED} more"
