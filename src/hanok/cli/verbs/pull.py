"""`hanok pull`: a repository of the hub, into the cache or a folder."""

from pathlib import Path
from typing import Any

import click

from hanok.cli.fields import Command, add_options, field_options
from hanok.cli.progress import bytes_bar
from hanok.cli.units import size
from hanok.hub.options import PullOptions

OWN = {name: {"metavar": "PATTERN"} for name in ("include", "exclude")}


def pull_options(command: Command) -> Command:
    """Add the options of a pull."""
    return add_options(command, field_options(PullOptions, OWN))


@click.command("pull", short_help="Get a repository of a hub, checked by its hashes.")
@click.argument("repo")
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@pull_options
def command(repo: str, destination: Path | None, **options: Any) -> None:
    """Pull REPO ("owner/name") into the cache that transformers uses, and to DESTINATION if given.

    An interrupted pull is run again and continues; every file is checked by its hash. Tokens are
    huggingface_hub's: HF_TOKEN, or `hf auth login`.
    """
    from hanok.hub.pull import pull

    with bytes_bar(f"Pulling {repo}") as bar:
        report = pull(
            repo,
            destination,
            PullOptions(**options),
            log=click.echo,
            on_start=bar.start,
            progress=bar.advance,
        )
    click.echo(
        f"{len(report.files)} files, {size(report.num_bytes)}, of which {size(report.received_bytes)} "
        f"were received in {report.seconds:.1f} s; hashes are right."
    )
    click.echo(str(report.folder))


COMMAND = command
