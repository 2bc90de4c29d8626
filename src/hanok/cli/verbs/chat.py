"""`hanok chat`: a conversation in the terminal."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.cli.opening import open_model, speculation_line
from hanok.cli.options import (
    adapter_option,
    given,
    model_options,
    sampling_options,
    speculation_options,
)
from hanok.errors import RequestError
from hanok.text_files import decode

if TYPE_CHECKING:
    from hanok.engine.generate import PrefixCache
    from hanok.engine.model import Model
    from hanok.engine.params import SamplingOptions
    from hanok.engine.speculate import Speculation

HELP = "/reset starts over, /undo takes the last turn back, /exit or Ctrl-D ends."


@click.command("chat", short_help="Talk with a model, turn by turn.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--system", help="A system message to begin with.")
@speculation_options
@sampling_options
@adapter_option
@model_options()
def command(path: Path | None, system: str | None, **options: Any) -> None:
    """Talk with a model: each line is a turn, the whole conversation is the prompt.

    Ctrl-C stops the answer, not the program; the part that came stays in the conversation. /reset
    starts over, /undo takes the last turn back, /exit or Ctrl-D ends.
    """
    from hanok.engine.generate import PrefixCache

    model, speculation = open_model(path, options)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # Gives `input` a history and line editing.
        import readline  # noqa: F401 (gives `input` a history)

        click.echo(HELP, err=True)
    opening = [{"role": "system", "content": system}] if system else []
    messages, cache = list(opening), PrefixCache()
    while True:
        try:
            line = _read_line(is_terminal)
        except RequestError as error:
            click.echo(f"hanok: {error}", err=True)
            continue
        if line is None:
            return
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            messages = list(opening)
        elif text == "/undo":
            messages = messages[:-2] if len(messages) > len(opening) else messages
        elif text == "/help":
            click.echo(HELP, err=True)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                answer = _answer(model, messages, cache, speculation, given(options))
            except RequestError as error:
                # The turn cannot be served (too long, refused by the template); the chat continues.
                click.echo(f"hanok: {error}", err=True)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def _read_line(is_terminal: bool) -> str | None:
    """Return the next turn; None at the end of the input."""
    if not is_terminal:
        data = sys.stdin.buffer.readline()
        return decode(data, "the turn") if data else None
    while True:
        try:
            return input("> ")
        except UnicodeDecodeError as error:
            decode(error.object, "the turn")
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo("\n" + HELP, err=True)


def _answer(
    model: "Model",
    messages: list[dict[str, str]],
    cache: "PrefixCache",
    speculation: "Speculation | None",
    options: "SamplingOptions",
) -> str:
    """Print an answer as it comes and return it; Ctrl-C ends it early."""
    pieces: list[str] = []
    started, first = time.perf_counter(), 0.0
    stream = model.stream(messages, cache=cache, speculation=speculation, **options)
    try:
        for event in stream:
            first = first or time.perf_counter() - started
            pieces.append(event.text)
            click.echo(event.text, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        click.echo(" (stopped)", err=True, nl=False)
    click.echo()
    seconds = time.perf_counter() - started
    speed = (len(pieces) - 1) / (seconds - first) if len(pieces) > 1 else 0.0
    click.echo(
        f"{len(pieces)} tokens; first after {first:.3f} s, then {speed:.1f} tokens/s"
        + speculation_line(stream, speculation),
        err=True,
    )
    return "".join(pieces).strip()


COMMAND = command
