"""A profile: options that `hanok tune` found for one checkpoint on one machine, with their evidence."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hanok.bench.fingerprint import fingerprint
from hanok.bench.report import FileKind, Report, Row, Subject, read_file
from hanok.bench.tune import Bounds, Choice, options_of
from hanok.checkpoint.files import Checkpoint
from hanok.checkpoint.writer import write_json
from hanok.errors import OptionError

FORMAT = 1
MACHINE_FACTS = ("cpu", "gpus", "hanok's kernels")  # that decide what is fastest


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """A setting that was not taken."""

    label: str
    speed: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Options, and why these."""

    profile: Literal[1] = 1
    options: dict[str, str]
    """Of `hanok generate`, `chat` and `serve`, by name."""
    checkpoint: Subject
    machine: dict[str, str]
    versions: dict[str, str]
    made: str
    command: str
    bounds: Bounds
    rounds: int
    quality_tokens: int
    rows: tuple[Row, ...]
    """What was measured of the setting."""
    excluded: tuple[Excluded, ...]


def profile_of(report: Report, choice: Choice, bounds: Bounds, draft: Path | None) -> Profile:
    """Return the profile of what was chosen."""
    chosen = choice.chosen
    options = options_of(chosen.setting)
    if chosen.setting.speculation == "draft" and draft is not None:
        options["draft"] = str(draft.resolve())
    return Profile(
        options=options,
        checkpoint=report.checkpoint,
        machine=report.machine,
        versions=report.versions,
        made=report.started,
        command=report.command,
        bounds=bounds,
        rounds=report.rounds,
        quality_tokens=report.quality_tokens,
        rows=chosen.rows,
        excluded=tuple(
            Excluded(label=item.label, speed=item.speed, reason=item.excluded or "slower")
            for item in choice.candidates
            if item is not chosen
        ),
    )


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, all of it or nothing."""
    write_json(path, asdict(profile))


def read_profile(path: Path) -> Profile:
    """Read a profile; OptionError for any other file."""
    kind = FileKind(key="profile", number=FORMAT, what="a profile", writer="`hanok tune`")
    return read_file(Profile, path, kind)


def check_checkpoint(profile: Profile, checkpoint: Checkpoint) -> None:
    """Raise OptionError where a profile was made for another checkpoint than this one."""
    if fingerprint(checkpoint) != profile.checkpoint.fingerprint:
        raise OptionError(
            f"the profile was made for another checkpoint ({profile.checkpoint.name}) than "
            f"{checkpoint.folder}: what is fast and near enough there says nothing here. Run "
            "`hanok tune` on this one."
        )


def machine_differences(profile: Profile, machine: dict[str, str]) -> list[str]:
    """Return a note for each fact in which this machine is not the one that the profile was made on."""
    return [
        f"the profile was made on another machine: {name} was {profile.machine.get(name)!r}, is "
        f"{machine[name]!r}"
        for name in MACHINE_FACTS
        if machine[name] != profile.machine.get(name)
    ]
