"""`hanok convert`: pickled weights become safetensors."""

from pathlib import Path

import click

from hanok.cli.progress import bytes_bar


@click.command("convert", short_help="Turn .bin and .pt weights into safetensors.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@click.option(
    "--max-shard-bytes",
    type=click.IntRange(min=1),
    default=5 * 10**9,
    show_default=True,
    help="Largest file, in bytes; one tensor may be larger.",
)
def command(source: Path, destination: Path | None, max_shard_bytes: int) -> None:
    """Turn the .bin or .pt weights of SOURCE into safetensors, in DESTINATION or next to them.

    No code of the files is run. Tensors that share memory are written once and ties are kept; what
    was written is read back and compared. A second run finds the work done.
    """
    from hanok.checkpoint.convert import convert

    with bytes_bar(f"Converting {source.name}") as bar:
        report = convert(
            source,
            destination,
            max_shard_bytes=max_shard_bytes,
            progress=bar.advance,
            on_start=bar.start,
        )
    names = ", ".join(str(file) for file in report.files)
    if report.already_done:
        click.echo(f"Nothing to do: {names} has these tensors.")
        return
    click.echo(
        f"Wrote {report.num_tensors} tensors, {report.num_bytes:,} bytes, to {names}; read back and "
        "equal."
    )
    for dropped, kept in report.shared.items():
        click.echo(f"  {dropped} shares its memory with {kept} and is written once.")


COMMAND = command
