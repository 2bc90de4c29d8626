"""`hanok tune`: the fastest setting that keeps bounds of quality and memory, as a profile."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.cli.bench_options import check_folder, grid_options, measured, written

if TYPE_CHECKING:
    from hanok.bench.report import Report
    from hanok.bench.tune import Candidate, Choice

HEADER = ("", "times as fast", "tokens/s", "peak", "KL", "same top", "")


@click.command("tune", short_help="Find the fastest setting that keeps quality, and write it down.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--max-kl",
    type=click.FloatRange(0),
    default=0.01,
    show_default=True,
    help="Mean KL divergence from the unmodified checkpoint, in nats per token.",
)
@click.option(
    "--min-same-top1",
    type=click.FloatRange(0, 1),
    default=0.98,
    show_default=True,
    help="Share of tokens whose likeliest continuation stays.",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Peak of memory, of the process or of a GPU, for example 4GiB.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the profile to this file, for --profile of generate, chat and serve.",
)
@grid_options
def command(
    path: Path | None,
    max_kl: float,
    min_same_top1: float,
    max_memory: str | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Measure settings of PATH, and take the fastest whose quality and memory keep the bounds.

    Everything is compared with the unmodified checkpoint. The profile contains its evidence: machine,
    versions, the checkpoint's fingerprint, what was measured and what was left out.
    """
    from hanok.bench.profile import profile_of, write_profile
    from hanok.bench.tune import Bounds, choose, reference_setting, tune_axes
    from hanok.memory.budget import parse_bytes

    check_folder(output)
    bounds = Bounds(
        max_kl=max_kl,
        min_same_top1=min_same_top1,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
    )
    report = measured(path, options, tune_axes(), reference=reference_setting())
    written(report, options)
    choice = choose(report, bounds)
    _print(report, choice, options["verbose"])
    if output is not None:
        write_profile(profile_of(report, choice, bounds, options["draft"]), output)
        click.echo(f"Written to {output}: hanok generate --profile {output}")


def _print(report: "Report", choice: "Choice", is_verbose: bool) -> None:
    from hanok.cli.bench_table import notes, print_table, title

    print_table(HEADER, [[_cells(item, choice) for item in choice.candidates]], title(report))
    click.echo()
    for note in notes(report, is_verbose=is_verbose):
        click.echo(note)
    click.echo(f"Chosen: {choice.chosen.label}, {choice.chosen.speed:.3g} times as fast.")
    if choice.not_told_apart:
        click.echo(f"Not shown to be slower: {'; '.join(choice.not_told_apart)}.")


def _cells(item: "Candidate", choice: "Choice") -> tuple[str, ...]:
    from hanok.cli.bench_table import memory

    row, quality = item.rows[0], item.rows[0].quality
    why = "chosen" if item is choice.chosen else item.excluded or "slower"
    return (
        item.label,
        f"{item.speed:.3g}",
        "–" if row.tokens_per_s is None else f"{row.tokens_per_s:,.4g}",
        memory(row),
        "–" if quality is None or quality.kl_mean is None else f"{quality.kl_mean:.1e}",
        "–" if quality is None else f"{quality.same_top1:.1%}",
        why,
    )


COMMAND = command
