"""`hanok bench`: measurements; each is one file of `cli/bench`."""

import click

from hanok.registry import discover


class Benches(click.Group):
    """The commands that the files of `cli/bench` define as `COMMAND`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all measurements."""
        return sorted(discover("hanok.cli.bench", "COMMAND"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a measurement's command, None for an unknown one."""
        found: dict[str, click.Command] = discover("hanok.cli.bench", "COMMAND")
        return found.get(cmd_name)


@click.command(cls=Benches, name="bench", short_help="Measure this machine.")
def command() -> None:
    """Measure attention on this machine, or a server."""


COMMAND = command
