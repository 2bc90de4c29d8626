"""`hanok merge`: an adapter into the weights of its base."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hanok.cli.progress import bytes_bar
from hanok.package import BUNDLED

if TYPE_CHECKING:
    from hanok.engine.agreement import Agreement

REPORT = "merge.json"
NONE = "none"


@click.command("merge", short_help="Merge an adapter into the weights of its base.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--base-quant",
    metavar="METHOD[:OPTION=VALUE,…]",
    help="Merge into what BASE computes with when it is quantized in this way, dequantized; `none`: "
    "into its own weights.  [default: as the adapter was trained by hanok, else none]",
)
@click.option(
    "--quant",
    metavar="METHOD[:OPTION=VALUE,…]",
    help="Compare the merged model quantized in this way as well.",
)
@click.pass_context
def command(
    context: click.Context,
    /,
    base: Path,
    adapter: Path,
    output: Path,
    base_quant: str | None,
    quant: str | None,
) -> None:
    """Write to OUTPUT the checkpoint BASE with the LoRA ADAPTER in its weights.

    Each weight is computed in float32 and rounded once. An adapter that was trained over quantized
    weights is merged into these, dequantized. Then base with adapter, and what was written, are compared
    on a text; the figures are printed and written to merge.json.
    """
    from hanok.checkpoint.adapter_files import open_adapter
    from hanok.checkpoint.writer import write_json
    from hanok.cli.steps import step_of
    from hanok.memory.merge import merge_files

    step = step_of(context, f"merges the adapter {adapter.resolve().name}", ("quant",))
    over = base_quant or open_adapter(adapter).base_quant
    over = None if over == NONE else over
    with bytes_bar(f"Merging {adapter.name}") as bar:
        report = merge_files(
            base, adapter, output, base_quant=over, progress=bar.advance, step=step
        )
    click.echo(f"Wrote {output}: {report.num_changed} weights changed.")
    if over is not None:
        click.echo(
            f"{report.num_dequantized} weights are those of {over}, dequantized, which the adapter was "
            "trained over; --base-quant none merges into the base's own."
        )
    if report.is_untied:
        click.echo("Embedding and head, one weight in the base, are two now.")
    found = _compared(base, adapter, output, over, quant)
    for name, item in found.items():
        click.echo(
            f"{name:<20} KL {item.kl_mean:.2e}, same top token {item.same_top:.1%}, "
            f"{item.greedy_tokens} of {item.num_greedy} greedy tokens the same"
        )
    write_json(output / REPORT, {name: asdict(item) for name, item in found.items()})


def _compared(
    base: Path, adapter: Path, output: Path, base_quant: str | None, quant: str | None
) -> "dict[str, Agreement]":
    """Return how far base, merged, and merged and quantized agree with base and adapter."""
    from hanok.engine.agreement import agreement
    from hanok.engine.model import load

    text = (BUNDLED / "quality.txt").read_text(encoding="utf-8")
    reference = load(base, quant=base_quant)
    reference.adapters.load("adapter", adapter)
    reference.use_adapter("adapter")
    found = {
        "merged": agreement(reference, load(output), text),
        "without the adapter": agreement(reference, load(base, quant=base_quant), text),
    }
    if quant is not None:
        found[f"merged, {quant}"] = agreement(reference, load(output, quant=quant), text)
    return found


COMMAND = command
