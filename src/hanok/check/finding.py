"""What a check found, as data: how bad it is, where, what with its values, and what to do."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
SHOWN_NAMES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing about a folder that is wrong, doubtful or worth knowing."""

    level: Level
    """error: it is not loaded, or computes something else. warning: it works for some readers, or not as
    meant. note: sound, and worth knowing."""
    kind: str
    """A name for programs, such as total-size; docs/check.md lists them."""
    where: str
    """The file, tensor or key."""
    what: str
    """What was found, with its values."""
    advice: str
    """What to do."""
    is_mendable: bool = False
    """Whether `hanok check --fix` mends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A check that was not made."""

    check: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was found about a folder, the worst first."""

    folder: str
    facts: Mapping[str, str]
    """What the folder holds, for people."""
    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]

    def count(self, level: Level) -> int:
        """Return how many findings have a level."""
        return sum(finding.level == level for finding in self.findings)


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings without repetitions, errors first, otherwise in their order."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda finding: LEVELS.index(finding.level)))


def shown(names: Iterable[object]) -> str:
    """Return the first names, and how many more there are."""
    listed = list(map(str, names))
    more = f" and {len(listed) - SHOWN_NAMES:,} more" if len(listed) > SHOWN_NAMES else ""
    return ", ".join(listed[:SHOWN_NAMES]) + more


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: "1 tensor", "2,000 tensors"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
