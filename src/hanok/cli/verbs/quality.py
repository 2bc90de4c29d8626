"""`hanok quality`: what fewer bits cost in quality, and what they gain in speed."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hanok.cli.options import some_load_options
from hanok.cli.units import finite
from hanok.errors import OptionError
from hanok.memory.options import DeviceMap
from hanok.package import BUNDLED
from hanok.text_files import read_text

if TYPE_CHECKING:
    from hanok.bench.quality import QualityReport

BUNDLED_TEXT = BUNDLED / "quality.txt"
PIPED_WIDTH = 160
HEADER = (
    "",
    "weights, MB",
    "bits",
    "perplexity",
    "KL mean",
    "KL p99",
    "same top",
    "layer error",
    "tokens/s",
    "bandwidth",
)


@click.command("quality", short_help="Compare quantizations: bytes, quality, speed.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--quant",
    "variants",
    multiple=True,
    default=("int8,int4,nf4",),
    show_default=True,
    metavar="METHOD[:OPTION=VALUE,…],…",
    help="What to compare with the unmodified checkpoint: quantizations or dtypes. Repeatable.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Text to score, UTF-8.  [default: one that ships with hanok]",
)
@click.option("--window", default=512, show_default=True, help="Tokens scored in one context.")
@click.option("--max-tokens", default=2048, show_default=True, help="Tokens scored in all.")
@some_load_options("dtype", "device_map", "threads")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the table to this file.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the table into this file (.png, .svg).",
)
def command(  # noqa: PLR0913 (click passes each option as an argument)
    path: Path | None,
    variants: tuple[str, ...],
    text: Path | None,
    window: int,
    max_tokens: int,
    dtype: str,
    device_map: DeviceMap,
    threads: int | None,
    as_json: bool,
    markdown: Path | None,
    plot: Path | None,
) -> None:
    """Compare quantizations of PATH with PATH itself, or of the model that ships with hanok.

    Every row scores the same tokens. KL is the divergence from the reference in nats for each token,
    its mean and what 99 of 100 tokens stay below; same top is how often the likeliest token is the
    reference's; layer error is the largest relative error of what a layer adds. Speed is that of one
    user, and its share of what reading the weights allows.
    """
    from hanok.bench.quality import measure_quality

    # Measuring takes minutes; what could not be written is said before it.
    for file in filter(None, (markdown, plot)):
        _check_folder(file)
    if plot is not None:
        _check_plot(plot)
    report = measure_quality(
        path or BUNDLED,
        split_variants(variants),
        read_text(text or BUNDLED_TEXT),
        dtype=dtype,
        device_map=device_map,
        window=window,
        max_tokens=max_tokens,
        threads=threads,
        progress=lambda name: click.echo(f"measuring {name}", err=True),
    )
    if markdown is not None:
        markdown.write_text(markdown_of(report), encoding="utf-8")
    if plot is not None:
        _draw(report, plot)
    if as_json:
        click.echo(json.dumps(finite(asdict(report)), indent=2, allow_nan=False))
    else:
        _print(report)


def split_variants(given: Sequence[str]) -> list[str]:
    """Return the variants: a comma begins the next one unless an OPTION=VALUE follows it."""
    return [
        item.strip() for text in given for item in re.split(r",(?![^,:]*=)", text) if item.strip()
    ]


def cells(report: "QualityReport") -> list[tuple[str, ...]]:
    """Return the table's rows as text, in the order of HEADER."""
    return [
        (
            row.name,
            f"{row.weight_bytes / 1e6:,.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity:.4f}",
            *(
                ("–", "–", "–", "–")
                if index == 0
                else (
                    f"{row.kl_mean:.2e}",
                    f"{row.kl_p99:.2e}",
                    f"{row.same_top:.2%}",
                    f"{row.layer_error:.4f} (layer {row.worst_layer})",
                )
            ),
            f"{row.tokens_per_s:.1f}",
            f"{row.bandwidth_share:.0%}",
        )
        for index, row in enumerate(report.rows)
    ]


def title(report: "QualityReport") -> str:
    """Say what the table is about."""
    return (
        f"{report.checkpoint}: {report.num_tokens:,} tokens in windows of {report.window}; "
        f"this machine reads memory at {report.gb_per_s:.1f} GB/s"
    )


def markdown_of(report: "QualityReport") -> str:
    """Return the report as a Markdown table under a sentence."""
    rows = [HEADER, ("---",) + ("---:",) * (len(HEADER) - 1), *cells(report)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{title(report)}\n\n{lines}\n"


def _print(report: "QualityReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(report), title_justify="left", box=None, padding=(0, 1))
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
    for row in cells(report):
        table.add_row(*row)
    console = Console()
    # A file or a pipe has no width to fit into.
    (console if console.is_terminal else Console(width=PIPED_WIDTH)).print(table)


def _check_folder(file: Path) -> None:
    if not file.parent.is_dir():
        raise OptionError(f"{file} cannot be written: there is no folder {file.parent}.")


def _check_plot(file: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise OptionError("--plot draws with matplotlib: pip install 'hanok[plot]'.")
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in known:
        raise OptionError(f"--plot {file}: the file name must end in one of {', '.join(known)}.")


def _draw(report: "QualityReport", file: Path) -> None:
    """Quality against bytes on the left, speed on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in report.rows[1:]:
        left.scatter(row.bits_per_weight, max(row.kl_mean, 1e-9))
        left.annotate(
            row.name,
            (row.bits_per_weight, max(row.kl_mean, 1e-9)),
            xytext=(4, 4),
            textcoords="offset points",
        )
    left.set(yscale="log", xlabel="bits per weight", ylabel="mean KL divergence, nats per token")
    right.barh([row.name for row in report.rows], [row.tokens_per_s for row in report.rows])
    right.invert_yaxis()
    right.set(xlabel="tokens per second, one user")
    figure.suptitle(title(report), fontsize="small")
    figure.savefig(file)


COMMAND = command
