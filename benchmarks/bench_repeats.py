"""How often `hanok bench compare` calls something changed where nothing did.

    python benchmarks/bench_repeats.py [--runs 11] [--budget 25] [--output FILE.md]

The same grid of the bundled model is measured again and again, each time by a new `hanok bench`, and
each run is compared with the one before it. Every verdict but "same" is a false change. Nothing waits
for a quiet machine and nothing is repeated: what else runs is what the verdicts have to stand.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import measure

from hanok.bench.compare import compare
from hanok.bench.report import Report, read_report

ASKED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two runs, one after the other."""

    rows: int
    false_changes: tuple[str, ...]
    machine: tuple[float, float]
    """How many times as fast the machine's own probes became, the least and the most."""
    largest: float
    """The largest change of a row's speed, either way, as a factor."""


def compared(before: Report, after: Report) -> Pair:
    """Return what a comparison said of two runs of the same."""
    found = compare(before, after)
    return Pair(
        rows=len(found.changes),
        false_changes=tuple(
            f"{item.before.label}, {item.before.workload.label}: "
            + ", ".join([*([item.verdict] if item.verdict != "same" else []), *item.differences])
            for item in found.changes
            if item.verdict != "same" or item.differences
        ),
        machine=found.machine,
        largest=max(max(item.ratio.value, 1 / item.ratio.value) for item in found.changes),
    )


def report(pairs: Sequence[Pair], threads: int) -> str:
    """Return the report."""
    quiet = sum(not pair.false_changes for pair in pairs)
    rows = [
        [
            number,
            pair.rows,
            f"{pair.machine[0]:.3f}–{pair.machine[1]:.3f}",
            f"{pair.largest:.3f}",
            "; ".join(pair.false_changes) or "none",
        ]
        for number, pair in enumerate(pairs, 1)
    ]
    header = ("pair", "rows", "machine's change", "largest change of a row", "called changed")
    asked = ("two runs of the same grid, no false change", f"≥ {ASKED:.0%} of pairs")
    is_met = "yes" if quiet >= ASKED * len(pairs) else "no"
    return "\n\n".join(
        [
            measure.heading("Two runs of the same", threads),
            measure.table(header, rows),
            measure.table(
                ("", "asked", "measured", "met"), [[*asked, f"{quiet} of {len(pairs)}", is_met]]
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Count false changes between equal runs.")
    parser.add_argument("--runs", type=int, default=11, help="one more than pairs")
    parser.add_argument("--budget", type=float, default=25.0, help="seconds of a run")
    parser.add_argument("--threads", type=int, default=measure.num_cores())
    parser.add_argument("--output", type=Path, help="Markdown file")
    options = parser.parse_args()
    if options.runs < 2:
        parser.error(f"--runs is {options.runs}; a pair needs 2")
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.runs):
            file = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", "hanok", "bench", "--budget", str(options.budget)]
            command += ["--threads", str(options.threads), "--json", str(file)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            reports.append(read_report(file))
    pairs = [compared(before, after) for before, after in pairwise(reports)]
    measure.publish(report(pairs, options.threads), options.output)


if __name__ == "__main__":
    main()
