"""`hanok bench`: every choice measured side by side, and commands for what else can be measured."""

from pathlib import Path
from typing import Any

import click

from hanok.cli.bench_options import grid_options, measured, written
from hanok.cli.options import some_load_options
from hanok.registry import discover

GRID = "grid"


class Measurements(click.Group):
    """The commands that the files of `cli/bench` define as `COMMAND`; without one, the grid."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands but the grid, which needs no name."""
        return sorted(discover("hanok.cli.bench", "COMMAND"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        if cmd_name == GRID:
            return grid
        found: dict[str, click.Command] = discover("hanok.cli.bench", "COMMAND")
        return found.get(cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Measure the grid unless a command is named; a folder of that name is ./NAME."""
        is_named = bool(args) and args[0] in (*self.list_commands(ctx), *ctx.help_option_names)
        return super().parse_args(ctx, args if is_named else [GRID, *args])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return how it is called."""
        return ["[PATH] [OPTIONS]", "or COMMAND …"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the options of the grid, then the commands."""
        grid.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.command(GRID)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--reference",
    metavar="AXIS=VALUE,…",
    help="What the others are compared with, for example attention=sdpa,cache=true.  [default: the "
    "first row of equal prompt and batch]",
)
@some_load_options("max_memory")
@grid_options
def grid(path: Path | None, reference: str | None, max_memory: str | None, **options: Any) -> None:
    """Measure the grid and print it."""
    from hanok.bench.settings import core_axes, default_axes, read_setting
    from hanok.cli.bench_table import print_report

    chosen = read_setting(reference) if reference is not None else None
    report = measured(
        path, options, default_axes(), core=core_axes(), reference=chosen, max_memory=max_memory
    )
    written(report, options)
    print_report(report, is_verbose=options["verbose"])


@click.command(
    "bench",
    cls=Measurements,
    short_help="Measure every choice: speed, memory, and whether the text is the same.",
)
def command() -> None:
    """Measure how PATH runs under each choice: attention, cache, dtype, quantization, speculation.

    Rows take turns in rounds, each in a process of its own load. A row is called faster or slower only
    where the interval of its ratio says so. Without PATH the model that ships with hanok is measured.
    """


COMMAND = command
