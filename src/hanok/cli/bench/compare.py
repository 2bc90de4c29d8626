"""`hanok bench compare`: what changed between two reports, and what is noise."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hanok.cli.bench_table import print_table, ratio, seconds

if TYPE_CHECKING:
    from hanok.bench.compare import Change, Comparison

HEADER = ("", "prompt + new", "before, s", "after, s", "times as fast", "", "besides speed")


@click.command("compare", short_help="Say what changed between two reports, and what is noise.")
@click.argument("before", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("after", type=click.Path(path_type=Path, dir_okay=False))
def command(before: Path, after: Path) -> None:
    """Compare two files that `hanok bench --json` wrote, row by row.

    A row changed where the interval of its ratio, at the certainty that all rows together ask for, lies
    beyond 5 %, beyond what the machine's own probes changed by, and beyond what all rows changed by
    together. All else is noise.
    """
    from hanok.bench.compare import compare
    from hanok.bench.report import read_report

    print_comparison(compare(read_report(before), read_report(after)))


def print_comparison(found: "Comparison") -> None:
    """Print what changed, row by row, and what both reports do not share."""
    groups: dict[object, list[tuple[str, ...]]] = {}
    for change in found.changes:
        groups.setdefault(change.before.workload, []).append(_cells(change))
    changed = [item for item in found.changes if item.verdict != "same" or item.differences]
    print_table(
        HEADER,
        groups.values(),
        f"{len(changed)} of {len(found.changes)} rows changed; {found.level:.2%} intervals",
    )
    click.echo()
    least, most = found.machine
    click.echo(f"The machine's probes ran {least:.3g} to {most:.3g} times as fast after as before.")
    if found.shared is not None:
        click.echo(
            f"All rows together became {found.shared:.3g} times as fast. Whether that is the machine or "
            "what they share cannot be separated here, so no row is called changed by it."
        )
    for title, rows in (("before", found.only_before), ("after", found.only_after)):
        for row in rows:
            click.echo(f"Only {title}: {row.label} at {row.workload.label}.")
    for note in found.notes:
        click.echo(f"Note: {note}.")


def _cells(change: "Change") -> tuple[str, ...]:
    return (
        change.before.label,
        change.before.workload.label.removesuffix(" tokens"),
        seconds(change.before.seconds),
        seconds(change.after.seconds),
        ratio(change.ratio) if change.verdict != "same" else f"{change.ratio.value:.3g}",
        change.verdict if change.verdict != "same" else "",
        "; ".join(change.differences),
    )


COMMAND = command
