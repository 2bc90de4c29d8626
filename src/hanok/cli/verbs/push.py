"""`hanok push`: a folder becomes a repository on the hub, in one commit."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.cli.fields import Command, add_options, field_options
from hanok.cli.options import cache_folder_option
from hanok.cli.progress import bytes_bar
from hanok.cli.units import size
from hanok.hub.options import PushOptions

if TYPE_CHECKING:
    from hanok.hub.push import PushReport

OWN = {name: {"metavar": "PATTERN"} for name in ("include", "exclude", "delete")}


def push_options(command: Command) -> Command:
    """Add the options of a push."""
    return add_options(command, field_options(PushOptions, OWN))


@click.command("push", short_help="Push a folder to a hub, in one commit.")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repo")
@push_options
@cache_folder_option("what continues an interrupted push is")
def command(path: Path, repo: str, cache_folder: Path, **options: Any) -> None:
    """Push PATH, a folder or a file, to REPO ("owner/name", or "name" of your own).

    Who you are, where it goes and what speaks against it is printed first. An interrupted push is run
    again and continues. Tokens are huggingface_hub's: HF_TOKEN, or `hf auth login`.
    """
    from hanok.hub.push import push

    with bytes_bar(f"Pushing {path.name}") as bar:
        report = push(
            path,
            repo,
            PushOptions(**options),
            state_folder=cache_folder / "hub",
            log=click.echo,
            on_start=bar.start,
            progress=bar.advance,
        )
    for line in report_lines(report, is_dry=options["dry_run"]):
        click.echo(line)


def report_lines(report: "PushReport", *, is_dry: bool) -> list[str]:
    """Return what a push did, as text."""
    where = f"{report.repo}, {report.revision}"
    if is_dry:
        return [
            f"Nothing was changed: a dry run. It would push {report.num_files} files to {where}."
        ]
    if not report.is_new_commit:
        return [
            f"Nothing to do: {where} has these {report.num_files} files (commit {report.commit})."
        ]
    parts = [f"Pushed {len(report.changed)} files"]
    if report.deleted:
        parts.append(f"deleted {len(report.deleted)}")
    lines = [
        f"{' and '.join(parts)} in one commit, {report.commit}, to {where}; sent "
        f"{size(report.sent_bytes)} of large files in {report.seconds:.1f} s.",
        report.url,
    ]
    return [*lines, f"pull request: {report.pull_request}"] if report.pull_request else lines


COMMAND = command
