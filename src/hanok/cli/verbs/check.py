"""`hanok check`: whether a folder is sound, for people and for CI."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.check.options import CheckOptions
from hanok.cli.fields import Command, add_options, field_options, field_values
from hanok.cli.progress import bytes_bar

if TYPE_CHECKING:
    from hanok.check.finding import CheckReport

COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def _fields(command: Command) -> Command:
    return add_options(command, field_options(CheckOptions, {}))


@click.command("check", short_help="Say whether a model's folder is sound.")
@click.argument("path", type=click.Path(path_type=Path))
@_fields
@click.option("--fix", is_flag=True, help="Mend what has one answer, and show the differences.")
@click.option("--strict", is_flag=True, help="Exit with status 1 for warnings too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(
    context: click.Context, /, path: Path, *, fix: bool, strict: bool, as_json: bool, **options: Any
) -> None:
    """Say whether the model in PATH is sound: files, tensors, values, tokens, chat template, configs.

    An error means that the model is not loaded, or computes something else; a warning, that it works for
    some readers or not as meant; a note is worth knowing. The exit status is 1 for errors and 0
    otherwise. --fix rebuilds indexes, fills in keys that have one answer and removes leftovers; it never
    touches weights.
    """
    chosen = CheckOptions(**field_values(CheckOptions, options))
    report = _checked(path, chosen)
    if fix:
        report = _fixed(path, report, chosen, is_shown=not as_json)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2, ensure_ascii=False))
    else:
        _print(report)
    if report.count("error") or (strict and report.count("warning")):
        context.exit(1)


def _checked(path: Path, options: CheckOptions) -> "CheckReport":
    from hanok.check.folder import check_folder

    with bytes_bar(f"Checking {path.name}") as bar:
        return check_folder(path, options, progress=bar.advance, on_start=bar.start)


def _fixed(
    path: Path, report: "CheckReport", options: CheckOptions, *, is_shown: bool
) -> "CheckReport":
    """Mend what can be mended, and return the report of what is left."""
    from hanok.check.mend import apply_mends, plan_mends, shown_change

    changes = plan_mends(path, report)
    if not changes:
        click.echo("Nothing to mend.", err=True)
        return report
    apply_mends(path, changes)
    if is_shown:
        for change in changes:
            click.echo(shown_change(change, path))
        click.echo()
    return _checked(path, options)


def _print(report: "CheckReport") -> None:
    from hanok.check.finding import LEVELS, plural

    click.echo(report.folder)
    width = max(map(len, report.facts), default=0)
    for name, value in report.facts.items():
        click.echo(f"  {name:{width}}  {value}")
    click.echo()
    for finding in report.findings:
        level = click.style(f"{finding.level:7}", fg=COLOURS[finding.level], bold=True)
        mend = "  [--fix]" if finding.is_mendable else ""
        click.echo(f"{level}  {finding.where}: {finding.what}.")
        click.echo(f"         {finding.kind}: {finding.advice}.{mend}")
    for item in report.skipped:
        click.echo(f"skipped  {item.check}: {item.reason}.")
    counts = ", ".join(plural(report.count(level), level) for level in LEVELS)
    verdict = "Not sound" if report.count("error") else "Sound"
    click.echo(f"\n{verdict}: {counts}.")


COMMAND = command
