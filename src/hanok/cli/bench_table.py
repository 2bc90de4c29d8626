"""Prints a benchmark's report: one table, the conditions, and what was left out."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from hanok.bench.intervals import Interval
from hanok.bench.report import Report, Row
from hanok.cli.units import rate, size

if TYPE_CHECKING:
    from rich.table import Table

UNLIMITED = 10_000  # characters of a line
NUM_SPEED = 11  # columns of HEADER that say how fast; the others say how well
NOTHING = "–"
HEADER = (
    "",
    "prompt",
    "new",
    "seconds (least–most)",
    "s/token",
    "tokens/s",
    "times as fast",
    "first, s",
    "peak",
    "bandwidth",
    "FLOP",
    "same text?",
    "KL",
    "same top",
    "perplexity",
)


def cells(row: Row) -> tuple[str, ...]:
    """Return one row of the table as text, in the order of HEADER."""
    workload, quality = row.workload, row.quality
    batch = f"{workload.batch} × " if workload.batch > 1 else ""
    return (
        row.label,
        f"{batch}{workload.prompt_tokens:,}",
        f"{batch}{workload.new_tokens:,}",
        f"{seconds(row.seconds)} ({seconds(row.seconds_min)}–{seconds(row.seconds_max)})",
        seconds(row.s_per_token),
        NOTHING if row.tokens_per_s is None else rate(row.tokens_per_s),
        "1" if row.is_reference else ratio(row.ratio),
        seconds(row.first_token_s),
        memory(row),
        share(row.bandwidth_share),
        share(row.flop_share),
        same_text(row),
        NOTHING if quality is None or quality.kl_mean is None else f"{quality.kl_mean:.1e}",
        NOTHING if quality is None else f"{quality.same_top1:.1%}",
        NOTHING if quality is None or quality.perplexity is None else f"{quality.perplexity:.3f}",
    )


def seconds(value: float) -> str:
    """Return seconds with three digits."""
    return f"{value:.3g}" if value >= 0.01 else f"{value:.2g}"


def ratio(found: Interval) -> str:
    """Return a ratio with its interval; one that may be 1 is not called anything else."""
    if found.high is None:
        return "not known"
    inner = f"{found.low:.3g}–{found.high:.3g}"
    return f"same ({inner})" if found.verdict == "same" else f"{found.value:.3g} ({inner})"


def memory(row: Row) -> str:
    """Return the peak of what is scarce: a GPU's memory where there is one."""
    found = row.peak_bytes if row.peak_device_bytes is None else row.peak_device_bytes
    return NOTHING if found is None else size(found)


def share(value: float | None) -> str:
    """Return a share in percent."""
    return NOTHING if value is None else f"{value:.0%}"


def same_text(row: Row) -> str:
    """Say whether a row's text is the reference's, else where it leaves it and how near that was."""
    if row.is_reference:
        return NOTHING
    if row.difference is None:
        return "yes"
    where = f"prompt {row.difference.prompt + 1}, " if row.workload.batch > 1 else ""
    return f"{where}token {row.difference.token + 1}, by {row.difference.gap:.2g}"


def title(report: Report) -> str:
    """Say what was measured, where, and how often."""
    subject = report.checkpoint
    rounds = "one round" if report.rounds == 1 else f"medians of {report.rounds} rounds"
    return (
        f"{subject.name}: {subject.family}, {subject.num_parameters:,} parameters, {subject.dtype}; "
        f"{report.machine['cpu']}; memory {report.gb_per_s:.1f} GB/s, products "
        f"{report.gflop_per_s:,.0f} GFLOP/s; {rounds}"
    )


def notes(report: Report, *, is_verbose: bool) -> list[str]:
    """Return the lines under the table; `is_verbose`: with each row that was left out."""
    loads = "; ".join(
        f"{item.label}: {seconds(item.load_s)} s, {size(item.weight_bytes)}"
        for item in report.loads
    )
    warm_up = sum(row.warmup_s for row in report.rows)
    found = [
        f"Ratios against the first row of equal prompt and batch, {report.level:.2%} intervals; "
        "“same” where they do not exclude 1. Peaks: of a process that loads and answers once.",
        f"Loading, apart from the rows: {loads}. First answers, not counted: {seconds(warm_up)} s in "
        "all.",
    ]
    if report.quality_tokens:
        found.append(
            f"KL (nats a token), same top token and perplexity over {report.quality_tokens:,} tokens, "
            "against the first row."
        )
    for row in report.rows:
        if row.proposed is not None:
            found.append(
                f"{row.label} at {row.workload.label}: {row.accepted} of {row.proposed} guessed tokens "
                "were right."
            )
    found += [f"Note: {note}." for note in report.notes]
    return found + (left_out(report) if is_verbose else counted(report))


def counted(report: Report) -> list[str]:
    """Return one line that counts the rows that were left out by their reasons, none if none was."""
    count = len(report.skipped)
    if not count:
        return []
    reasons = Counter(short_reason(item.reason) for item in report.skipped).most_common()
    parts = [f"{reason} ({number})" for reason, number in reasons]
    rows = "1 row" if count == 1 else f"{count} rows"
    return [f"{rows} left out: {'; '.join(parts)}. -v lists them."]


def short_reason(reason: str) -> str:
    """Return a reason without the part that differs from row to row, in brackets or after a colon."""
    found = reason.splitlines()[0]
    for mark in (" (", ": "):
        found = found.partition(mark)[0]
    return found.rstrip(".")


def left_out(report: Report) -> list[str]:
    """Return a line for each reason, with the rows that are not measured for it."""
    reasons: dict[str, list[str]] = {}
    for item in report.skipped:
        workload = item.row.workload
        label = f"{item.row.setting.label(report.checkpoint.dtype)} at {workload.label}"
        reasons.setdefault(item.reason, []).append(label)
    return [f"Left out, {reason}: {'; '.join(rows)}." for reason, rows in reasons.items()]


def markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table, its first column to the left and the others to the right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_of(report: Report) -> str:
    """Return the report in Markdown."""
    table = markdown(HEADER, map(cells, report.rows))
    under = "\n".join(f"- {note}" for note in notes(report, is_verbose=True))
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return f"{title(report)}\n\n{table}\n\n{under}\n\n`{report.command}`, {report.started}, {versions}\n"


Line = tuple[str, ...]


def table_of(header: Line, groups: Iterable[Iterable[Line]], caption: str) -> "Table":
    """Return a table for the terminal, a space between groups of rows."""
    from rich.table import Table

    table = Table(title=caption, title_justify="left", box=None, padding=(0, 1))
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for index, group in enumerate(groups):
        if index:
            table.add_row()
        for row in group:
            table.add_row(*row)
    return table


def print_table(header: Line, groups: Iterable[Iterable[Line]], caption: str) -> None:
    """Print a table in the terminal, at full width if there is none."""
    from rich.console import Console

    console = Console()
    # A file or a pipe has no width to fit into.
    console = console if console.is_terminal else Console(width=UNLIMITED)
    console.print(table_of(header, groups, caption))


def print_report(report: Report, *, is_verbose: bool = False) -> None:
    """Print the table, in two parts on a narrow terminal, and the lines under it.

    `is_verbose`: each row that was left out too.
    """
    from rich.console import Console
    from rich.measure import Measurement

    groups: dict[object, list[Line]] = {}
    for row in report.rows:
        groups.setdefault(row.workload, []).append(cells(row))
    console, wide = Console(), Console(width=UNLIMITED)
    table = table_of(HEADER, groups.values(), title(report))
    width = Measurement.get(wide, wide.options, table).maximum
    if not console.is_terminal or console.width >= width:
        print_table(HEADER, groups.values(), title(report))
    else:
        speed = [[line[:NUM_SPEED] for line in group] for group in groups.values()]
        print_table(HEADER[:NUM_SPEED], speed, title(report))
        click.echo()
        quality = [[line[:3] + line[NUM_SPEED:] for line in group] for group in groups.values()]
        print_table(HEADER[:3] + HEADER[NUM_SPEED:], quality, "Text and quality")
    click.echo()
    for note in notes(report, is_verbose=is_verbose):
        click.echo(note)
