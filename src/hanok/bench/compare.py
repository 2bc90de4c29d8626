"""Two reports of one grid: what changed between them, and what is noise. Pure.

A change must be larger than four things: what the rounds of both runs allow to be said (an interval, as
sure as a whole table asks for); `MIN_EFFECT`, by which one program differs from start to start; what the
machine changed by, as its probes say, which run no code of ours; and what all rows changed by together.
Probes do not see all that a machine does: once everything was 1.25 times as fast in the second of two
runs, and the probes 0.8 to 1.08 times. A change common to all rows is reported once, not per row.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hanok.bench.intervals import Interval, Verdict, level_of_each, unpaired_ratio
from hanok.bench.report import Report, Row

MIN_EFFECT = 1.05
MIN_ROWS = 5  # of which the median is what they share, and not one of them
MIN_PEAK_BYTES = 8 * 2**20  # by which peaks of the same program differ
SAME_QUALITY = 1e-6  # of a perplexity, for it is computed alike each time


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One row, in both reports."""

    before: Row
    after: Row
    ratio: Interval
    """How many times as fast it became."""
    verdict: Verdict
    differences: tuple[str, ...]
    """Changes besides its speed, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All rows that both reports have, and those that only one has."""

    changes: tuple[Change, ...]
    only_before: tuple[Row, ...]
    only_after: tuple[Row, ...]
    level: float
    machine: tuple[float, float]
    """How many times as fast the machine's probes became, the least and the most, 1 among them."""
    shared: float | None
    """How many times as fast the rows became together; None: too few to say."""
    notes: tuple[str, ...]


def compare(before: Report, after: Report) -> Comparison:
    """Compare two reports, row by row; rows are the same whose settings and workloads are."""
    ours = {(row.setting, row.workload): row for row in before.rows}
    theirs = {(row.setting, row.workload): row for row in after.rows}
    shared = [key for key in ours if key in theirs]
    level, machine = level_of_each(len(shared)), machine_change(before, after)
    together = shared_change([(ours[key], theirs[key]) for key in shared])
    noise = (min(machine[0], together or 1.0), max(machine[1], together or 1.0))
    return Comparison(
        changes=tuple(_change(ours[key], theirs[key], level, noise) for key in shared),
        only_before=tuple(row for key, row in ours.items() if key not in theirs),
        only_after=tuple(row for key, row in theirs.items() if key not in ours),
        level=level,
        machine=machine,
        shared=together,
        notes=tuple(_notes(before, after)),
    )


def machine_change(before: Report, after: Report) -> tuple[float, float]:
    """Return the least and the most by which the probes became faster; what did not change is 1."""
    ratios = [1.0]
    for name in ("gb_per_s", "gflop_per_s"):
        rates = [[getattr(probe, name) for probe in report.probes] for report in (before, after)]
        ratios.append(statistics.median(rates[1]) / statistics.median(rates[0]))
    return min(ratios), max(ratios)


def shared_change(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """Return how many times as fast the middle one of some rows became; None where they are few."""
    if len(pairs) < MIN_ROWS:
        return None
    return statistics.median(before.seconds / after.seconds for before, after in pairs)


def verdict_of(ratio: Interval, noise: tuple[float, float]) -> Verdict:
    """Return what a change of speed is called, where ratios within `noise` say nothing."""
    if ratio.low > MIN_EFFECT * noise[1]:
        return "faster"
    if ratio.high is not None and ratio.high < noise[0] / MIN_EFFECT:
        return "slower"
    return "same"


def _change(before: Row, after: Row, level: float, noise: tuple[float, float]) -> Change:
    ratio = unpaired_ratio(_seconds(before), _seconds(after), level)
    return Change(
        before=before,
        after=after,
        ratio=ratio,
        verdict=verdict_of(ratio, noise),
        differences=tuple(_differences(before, after)),
    )


def _seconds(row: Row) -> Sequence[float]:
    return [sample.seconds for sample in row.samples]


def _differences(before: Row, after: Row) -> list[str]:
    found = []
    peaks = [row.peak_bytes for row in (before, after) if row.peak_bytes is not None]
    if len(peaks) == 2:
        low, high = sorted(peaks)
        if high - low > MIN_PEAK_BYTES and high > MIN_EFFECT * low:
            found.append(f"peak {peaks[0] / 2**20:,.0f} to {peaks[1] / 2**20:,.0f} MiB")
    if before.is_same_text != after.is_same_text:
        was, became = (
            "the reference's" if row.is_same_text else "another" for row in (before, after)
        )
        found.append(f"text was {was}, is {became}")
    if before.quality is not None and after.quality is not None:
        one, other = before.quality.perplexity, after.quality.perplexity
        is_same = one == other or (
            one is not None and other is not None and abs(one - other) <= SAME_QUALITY * one
        )
        if not is_same:
            found.append(f"perplexity {_number(one)} to {_number(other)}")
    return found


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


def _notes(before: Report, after: Report) -> list[str]:
    found = []
    if before.checkpoint.fingerprint != after.checkpoint.fingerprint:
        found.append(
            f"these are different checkpoints, {before.checkpoint.name} and {after.checkpoint.name}"
        )
    if before.quality_tokens != after.quality_tokens:
        found.append(
            f"quality is over {before.quality_tokens:,} tokens in one and {after.quality_tokens:,} in "
            "the other"
        )
    for mine, theirs in ((before.machine, after.machine), (before.versions, after.versions)):
        for name in mine:
            if mine[name] != theirs.get(name):
                found.append(f"{name}: {mine[name]} in one, {theirs.get(name)} in the other")
    return found
