"""`hanok tokens`: add tokens to a checkpoint's folder, and see which it has."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.cli.fields import Command, add_options, field_options, field_values
from hanok.cli.units import size
from hanok.memory.token_options import TokenOptions

if TYPE_CHECKING:
    from hanok.memory.tokens import TokensPlan, TokensReport

OPTIONS: dict[str, dict[str, Any]] = {
    "init": {"metavar": "mean|pieces|like=TOKEN|TEXT"},
    "eos": {"metavar": "TOKEN"},
    "pad": {"metavar": "TOKEN"},
}
WITHOUT = ("output", "dry_run", "verify_logits")  # they say nothing of the result


def writing_options(command: Command) -> Command:
    """Add the options of everything that changes a folder."""
    options = [
        click.option(
            "--output",
            type=click.Path(path_type=Path),
            help="Write a new folder, with hard links to what stays the same, and leave PATH as it is.",
        ),
        click.option(
            "--dry-run", is_flag=True, help="Print what would change, and change nothing."
        ),
        click.option(
            "--verify-logits",
            is_flag=True,
            help="Load the folder before and after, and compare the logits of all old tokens.",
        ),
    ]
    return add_options(command, options)


@click.group("tokens", short_help="Add tokens to a checkpoint; list and remove added ones.")
def command() -> None:
    """Add tokens to the folder of a checkpoint, without loading the model.

    Tokenizer files, configs and the two matrices change together, in one step or not at all.
    """


@command.command("add", short_help="Add tokens, and rows for them where there are none.")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("tokens", nargs=-1, required=True)
@lambda added: add_options(added, field_options(TokenOptions, OPTIONS))
@writing_options
def add(path: Path, tokens: tuple[str, ...], **options: Any) -> None:
    """Add TOKENS to the checkpoint in PATH.

    Ids follow the largest one. Rows that no token has are used first; no matrix becomes smaller.
    """
    from hanok.memory.tokens import plan_tokens

    asked = TokenOptions(**field_values(TokenOptions, options))
    _finish(plan_tokens(path, tokens, asked), options)


@command.command("resize", short_help="Give the matrices more rows.")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("num_rows", metavar="[ROWS]", required=False, type=click.IntRange(min=1))
@lambda added: add_options(added, field_options(TokenOptions, {}, only=["pad_to_multiple_of"]))
@writing_options
def resize(
    path: Path, num_rows: int | None, pad_to_multiple_of: int | None, **options: Any
) -> None:
    """Give embedding and head of the checkpoint in PATH at least ROWS rows."""
    from hanok.memory.tokens import plan_resize

    _finish(plan_resize(path, num_rows, pad_to_multiple_of), options)


@command.command("remove", short_help="Remove the last added tokens.")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("tokens", nargs=-1, required=True)
@writing_options
def remove(path: Path, tokens: tuple[str, ...], **options: Any) -> None:
    """Remove TOKENS, the last added ones of the checkpoint in PATH. Their rows stay."""
    from hanok.memory.tokens import plan_removal

    _finish(plan_removal(path, tokens), options)


@command.command("list", short_help="List the added tokens of a checkpoint.")
@click.argument("path", type=click.Path(path_type=Path))
def show(path: Path) -> None:
    """List the added tokens of the checkpoint in PATH, by their ids."""
    from hanok.memory.tokens import list_tokens

    num_rows, found = list_tokens(path)
    width = max([len(repr(item.token.text)) for item in found], default=0)
    for item in found:
        token = item.token
        flags = {
            "special": token.is_special,
            "single word": token.is_single_word,
            "lstrip": token.strips_left,
            "rstrip": token.strips_right,
            "normalized": token.is_normalized,
            "NO ROW": not item.has_row,
        }
        said = ", ".join([*item.roles, *(name for name, is_so in flags.items() if is_so)])
        click.echo(f"{token.token_id:>7}  {token.text!r:<{width}}  {said}".rstrip())
    click.echo(f"{len(found)} added tokens; {num_rows:,} rows.")


@command.command(
    "check", short_help="Check a checkpoint's tokens, their rows and what ends an answer."
)
@click.argument("path", type=click.Path(path_type=Path))
@click.pass_context
def check(context: click.Context, path: Path) -> None:
    """Check the tokens of the checkpoint in PATH; `hanok check` looks at everything else as well.

    The exit status is 1 where something is wrong.
    """
    from hanok.check.tokens import read_tokens
    from hanok.memory.token_checks import check_added
    from hanok.memory.tokens import list_tokens

    num_rows, _ = list_tokens(path)
    tokens, findings, _ = read_tokens(path, num_rows)
    invariants = [] if tokens.tokenizer is None else check_added(tokens.tokenizer)
    for item in invariants:
        click.echo(f"{'yes' if item.holds else 'NO':>3}  {item.name}: {item.detail}")
    for finding in findings:
        click.echo(f"{finding.level}: {finding.where}: {finding.what}; {finding.advice}.")
    is_broken = any(finding.level == "error" for finding in findings)
    if is_broken or not all(item.holds for item in invariants):
        context.exit(1)
    click.echo(f"Sound: {num_rows:,} rows.")


def _finish(plan: "TokensPlan", options: dict[str, Any]) -> None:
    from hanok.memory.tokens import apply, diff

    _print_plan(plan)
    if plan.is_nothing:
        click.echo("Nothing to do: the folder is so already.")
        return
    if options["dry_run"]:
        for line in diff(plan):
            click.echo(line)
        return
    # Imported here: it reads cards, which `--help` does not.
    from hanok.cli.steps import step_of

    verify = _logits_verifier(plan) if options["verify_logits"] else None
    step = step_of(click.get_current_context(), _what(plan), WITHOUT)
    _print_report(apply(plan, options["output"], verify=verify, step=step))


def _what(plan: "TokensPlan") -> str:
    parts = []
    for verb, texts in (("adds", [*plan.new, *plan.known]), ("removes", plan.removed)):
        if texts:
            parts.append(f"{verb} {len(texts)} token{'s' * (len(texts) != 1)}")
    if plan.rows_after != plan.rows_before:
        parts.append(
            f"gives the vocabulary {plan.rows_after:,} rows (before: {plan.rows_before:,})"
        )
    return ", ".join(parts) or "gives tokens other roles"


def _print_plan(plan: "TokensPlan") -> None:
    for text, token_id in plan.new.items():
        where = "a spare row" if token_id < plan.rows_before else "a new row"
        click.echo(f"{text!r} is {token_id}, with {where}")
    for text, token_id in plan.known.items():
        click.echo(
            f"{text!r} is in the vocabulary already, as {token_id}; from now on a text that has it "
            "has this token, by these rules"
        )
    for text in plan.same:
        click.echo(f"{text!r} is added already, and stays as it is")
    for text in plan.removed:
        click.echo(f"{text!r} is removed; its row stays")
    rows = f"{plan.rows_before:,} before, {plan.rows_after:,} after"
    click.echo(f"Rows: {rows}, {plan.num_spare:,} of them spare.")
    for example in plan.examples:
        click.echo(f"{example.text!r}")
        click.echo(f"  before: {' '.join(map(repr, example.before))}")
        click.echo(f"  after:  {' '.join(map(repr, example.after))}")
    for note in plan.notes:
        click.echo(f"Note: {note}.")


def _print_report(report: "TokensReport") -> None:
    for item in report.invariants:
        click.echo(f"{'yes' if item.holds else 'NO':>3}  {item.name}: {item.detail}")
    files = ", ".join(report.rewritten) or "no weights"
    click.echo(f"Wrote {size(report.bytes_written)} ({files}) to {report.folder}.")
    if report.copied:
        click.echo(f"Copied, since hard links are not possible there: {', '.join(report.copied)}.")


def _logits_verifier(plan: "TokensPlan") -> Callable[[Path], None]:
    # Imported here: it brings torch.
    from hanok.engine.equal import compare_logits

    return lambda folder: compare_logits(plan.folder, folder, plan.rows_before)


COMMAND = command
