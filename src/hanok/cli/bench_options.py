"""Options of the verbs that measure a grid, and what becomes of them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hanok.cli.options import some_load_options
from hanok.cli.progress import seconds_bar
from hanok.errors import OptionError
from hanok.package import BUNDLED
from hanok.text_files import STANDARD_INPUT, read_text

if TYPE_CHECKING:
    from hanok.bench.report import Report
    from hanok.bench.settings import Axes, Setting

Command = TypeVar("Command", bound=Callable[..., Any])
BUNDLED_TEXT = BUNDLED / "quality.txt"
BUDGET_S = 90.0


def grid_options(command: Command) -> Command:
    """Add the options of measuring a grid."""
    file = click.Path(path_type=Path, dir_okay=False)
    for option in (
        click.option(
            "-v", "--verbose", is_flag=True, help="List each row that is left out, and why."
        ),
        click.option("--html", type=file, help="Write a page with plots to this file."),
        click.option("--markdown", type=file, help="Write the table to this file."),
        click.option("--json", "json_file", type=file, help="Write the report to this file."),
        some_load_options("threads"),
        click.option(
            "--quality-tokens",
            type=click.IntRange(min=0),
            default=1024,
            show_default=True,
            help="Tokens to score at the most; 0: measure no quality.",
        ),
        click.option(
            "--text", type=file, help="Text to continue and to score.  [default: hanok's own]"
        ),
        click.option(
            "--draft", type=click.Path(path_type=Path), help="A draft model's checkpoint."
        ),
        click.option(
            "--rounds",
            type=click.IntRange(min=1),
            help="At the most; --budget may end them.  [default: what fits the time]",
        ),
        click.option(
            "--budget",
            type=click.FloatRange(0, min_open=True),
            help="Seconds that all of it may take, from the start on: the short grid has fewer tokens "
            f"where it is short, that of --grid fewer rows.  [default: {BUDGET_S:g}, none with --grid]",
        ),
        click.option(
            "--grid",
            type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
            help="A TOML table of axes (docs/bench.md); - is standard input.  [default: a short grid]",
        ),
    ):
        command = option(command)
    return command


def measured(
    path: Path | None,
    options: Mapping[str, Any],
    axes: "tuple[Axes, ...]",
    *,
    core: "tuple[Axes, ...]" = (),
    reference: "Setting | None" = None,
    max_memory: str | None = None,
) -> "Report":
    """Measure the grid that the options ask for, else `axes`, with a progress bar.

    `core`: which of `axes` are to be there however short the time is.
    """
    began = time.perf_counter()  # the budget counts what is imported now
    from hanok.bench.measure import BenchOptions, run_bench
    from hanok.bench.workers import Shared

    for name in ("json_file", "markdown", "html"):
        check_folder(options[name])
    if path is None:
        click.echo("No model given: using the small one that ships with hanok.", err=True)
        path = BUNDLED
    elif not path.exists():
        raise OptionError(f"{path}: no such file or folder. Check the path.")
    grid, budget_s = options["grid"], options["budget"]
    if grid is None and budget_s is None:
        budget_s = BUDGET_S
    wanted = BenchOptions(
        load=Shared(
            path=path,
            draft=options["draft"],
            threads=options["threads"],
            max_memory=max_memory,
        ),
        axes=axes if grid is None else (_axes(grid),),
        core=core if grid is None else (),
        text=_text(options["text"] or BUNDLED_TEXT),
        reference=reference,
        budget_s=budget_s,
        began=began,
        may_shrink=grid is None,
        rounds=options["rounds"],
        quality_tokens=options["quality_tokens"],
    )
    with seconds_bar(f"Measuring {path.name}") as bar:
        return run_bench(wanted, bar)


def written(report: "Report", options: Mapping[str, Any]) -> None:
    """Write the files that the options ask for."""
    from hanok.bench.page import page_of
    from hanok.bench.report import write_report
    from hanok.checkpoint.writer import write_bytes
    from hanok.cli.bench_table import markdown_of

    if options["json_file"] is not None:
        write_report(report, options["json_file"])
    if options["markdown"] is not None:
        write_bytes(options["markdown"], markdown_of(report).encode())
    if options["html"] is not None:
        write_bytes(options["html"], page_of(report).encode())


def check_folder(file: Path | None) -> None:
    """Refuse a file whose folder is not there: measuring takes minutes, so it is said before."""
    if file is not None and not file.parent.is_dir():
        raise OptionError(f"{file} cannot be written: there is no folder {file.parent}.")


def _axes(grid: Path) -> "Axes":
    from hanok.bench.settings import read_axes

    return read_axes(read_text(grid), "the grid" if grid == STANDARD_INPUT else str(grid))


def _text(file: Path) -> str:
    text = read_text(file)
    if not text.strip():
        raise OptionError(f"{file} has no text; give one to continue and to score.")
    return text
