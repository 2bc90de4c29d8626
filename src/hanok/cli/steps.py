"""What a verb did to a folder, as its card tells it."""

import shlex
from datetime import UTC, datetime
from pathlib import Path

import click
from click.core import ParameterSource

from hanok.checkpoint.card import Step
from hanok.package import __version__


def step_of(context: click.Context, text: str, without: tuple[str, ...] = ()) -> Step:
    """Return the step that this command line is, without the folders of paths and some options.

    `text` says what changed.
    """
    words = context.command_path.split()
    words[0] = "hanok"
    if context.command.hidden:  # what a verb does without a command's name
        words.pop()
    for item in context.command.params:
        name = item.name or ""
        if name in without or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        values = value if isinstance(value, tuple) else (value,)
        said = [_without_folders(part) for part in values]
        if isinstance(item, click.Argument):
            words += said
        elif isinstance(item, click.Option) and item.is_flag:
            words.append(item.opts[0] if value else item.secondary_opts[0])
        else:
            words += [word for part in said for word in (item.opts[0], part)]
    date = datetime.now(UTC).date().isoformat()
    return Step(command=shlex.join(words), version=__version__, date=date, text=text)


def _without_folders(value: object) -> str:
    """Return a value of the command line; of a path, with settings after a colon or not, its name."""
    text = str(value)
    is_path = isinstance(value, Path) or Path(text.partition(":")[0]).exists()
    return Path(text).resolve().name if is_path else text
