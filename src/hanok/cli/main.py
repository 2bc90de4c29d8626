"""The `hanok` command: one verb, one file of `cli/verbs`, one call into the package.

Verbs import torch and rich when they run, not when they are listed, so `hanok --help` is immediate.
"""

import sys
from importlib import import_module
from typing import Any

import click

from hanok.errors import HanokError
from hanok.package import __version__
from hanok.registry import names_in, nearest_first

VERBS = "hanok.cli.verbs"
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Verbs(click.Group):
    """The verbs that the files of `cli/verbs` define as `COMMAND`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all verbs."""
        return names_in(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb's command, None for an unknown one."""
        # Its file alone is imported: those of all verbs would take longer than a short text.
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = import_module(f"{VERBS}.{cmd_name}").COMMAND
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest verbs for an unknown one."""
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            ctx.fail(
                f"there is no verb {args[0]!r}. Verbs: {', '.join(nearest_first(args[0], known))}"
            )
        return super().resolve_command(ctx, args)


@click.command(cls=Verbs, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="hanok")
def cli() -> None:
    """Take an open-weight language model from a Hugging Face checkpoint on disk to production."""


def main(args: list[str] | None = None) -> Any:
    """Run the command line; hanok's own errors, and files that fail, become one message and a status."""
    try:
        return cli.main(args=args, prog_name="hanok")
    except HanokError as error:
        click.echo(f"hanok: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        # What the system refuses: a full disk, a file that may not be read.
        click.echo(f"hanok: {error.filename}: {error.strerror}.", err=True)
        sys.exit(HanokError.exit_code)
