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


@click.command("merge", short_help="Merge an adapter into the weights of its base.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--quant",
    metavar="METHOD[:OPTION=VALUE,…]",
    help="Compare the merged model quantized in this way as well.",
)
@click.pass_context
def command(
    context: click.Context, /, base: Path, adapter: Path, output: Path, quant: str | None
) -> None:
    """Write to OUTPUT the checkpoint BASE with the LoRA ADAPTER in its weights.

    Each weight is computed in float32 and rounded once. Then base with adapter, and what was written,
    are compared on a text; the figures are printed and written to merge.json.
    """
    from hanok.checkpoint.writer import write_json
    from hanok.cli.steps import step_of
    from hanok.memory.merge import merge_files

    step = step_of(context, f"merges the adapter {adapter.resolve().name}", ("quant",))
    with bytes_bar(f"Merging {adapter.name}") as bar:
        count = merge_files(base, adapter, output, progress=bar.advance, step=step)
    click.echo(f"Wrote {output}: {count} weights changed.")
    found = _compared(base, adapter, output, quant)
    for name, item in found.items():
        click.echo(
            f"{name:<20} KL {item.kl_mean:.2e}, same top token {item.same_top:.1%}, "
            f"{item.greedy_tokens} of {item.num_greedy} greedy tokens the same"
        )
    write_json(output / REPORT, {name: asdict(item) for name, item in found.items()})


def _compared(base: Path, adapter: Path, output: Path, quant: str | None) -> "dict[str, Agreement]":
    """Return how far base, merged, and merged and quantized agree with base and adapter."""
    from hanok.engine.agreement import agreement
    from hanok.engine.model import load

    text = (BUNDLED / "quality.txt").read_text(encoding="utf-8")
    reference = load(base)
    reference.adapters.load("adapter", adapter)
    reference.use_adapter("adapter")
    found = {
        "merged": agreement(reference, load(output), text),
        "without the adapter": agreement(reference, load(base), text),
    }
    if quant is not None:
        found[f"merged, {quant}"] = agreement(reference, load(output, quant=quant), text)
    return found


COMMAND = command
