"""`hanok card`: writes what is known about a model into its README.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hanok.checkpoint.card_options import CardOptions
from hanok.cli.fields import Command, add_options, field_options, field_values
from hanok.errors import OptionError

FLAGS: Mapping[str, Mapping[str, Any]] = {
    "base_model": {"metavar": "ORG/NAME"},
    "license": {"metavar": "NAME"},
    "dataset": {"metavar": "NAME"},
    "language": {"metavar": "CODE"},
    "base_folder": {"type": click.Path(path_type=Path)},
}


def _fields(command: Command) -> Command:
    return add_options(command, field_options(CardOptions, FLAGS))


@click.command("card", short_help="Write a model's card, README.md.")
@click.argument("path", type=click.Path(path_type=Path))
@_fields
@click.option("--dry-run", is_flag=True, help="Show the difference and write nothing.")
def command(path: Path, *, dry_run: bool, **options: Any) -> None:
    """Write the card of the model in PATH: README.md, with what is known about it.

    An existing card keeps its text. Front matter that it lacks is added; what hanok knows (steps,
    reports, how to run the model) is a section between two comments, which is replaced at each call.
    Fields are only written where an option, a file or the base model's card shows them. What the hub
    would refuse, or a reader would miss, is listed; a licence other than the base model's is named, not
    changed.
    """
    from hanok.checkpoint.card import CARD, diff, problems, read_card, write_card, written_at
    from hanok.checkpoint.card_content import base_cards, card_content

    if not path.is_dir():
        raise OptionError(f"{path} is not a folder. Give the folder of a model.")
    chosen = CardOptions(**field_values(CardOptions, options))
    bases, missing = base_cards(chosen, path)
    content = card_content(path, chosen, bases, is_generator=_is_generator(path))
    old = read_card(path)
    new = written_at(path, old, content)
    changes = diff(old, new)
    if changes:
        click.echo(changes)
    if dry_run:
        click.echo(f"Nothing written (--dry-run): {path / CARD}", err=True)
    elif changes:
        write_card(path, content)
        click.echo(f"Wrote {path / CARD}", err=True)
    else:
        click.echo(f"{path / CARD} says all of this already.", err=True)
    for name in missing:
        click.echo(
            f"note: the card of {name} is not on this disk, so its licence was not compared; give its "
            "folder with --base-folder",
            err=True,
        )
    for problem in problems(new, bases=bases):
        click.echo(f"problem: {problem}", err=True)


def _is_generator(path: Path) -> bool:
    """Return whether `hanok generate` opens the folder, by its headers."""
    from hanok.checkpoint.files import open_checkpoint
    from hanok.errors import HanokError
    from hanok.memory.account import understand

    try:
        return understand(open_checkpoint(path)).config.has_head
    except HanokError:
        return False


COMMAND = command
