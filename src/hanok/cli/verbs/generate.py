"""`hanok generate`: continue one text."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hanok.cli.opening import open_model, speculation_line
from hanok.cli.options import (
    adapter_option,
    given,
    model_options,
    sampling_options,
    speculation_options,
)
from hanok.errors import OptionError
from hanok.text_files import STANDARD_INPUT, read_text


@click.command("generate", short_help="Continue a text.")
@click.argument("path_or_prompt", required=False)
@click.argument("prompt", required=False)
@click.option(
    "--file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    help="Read the prompt from this file, in UTF-8; - is standard input.",
)
@click.option("--echo", is_flag=True, help="Print the prompt before its continuation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--no-cache", is_flag=True, help="Compute everything again for each token (slow).")
@speculation_options
@sampling_options
@adapter_option
@model_options()
def command(
    path_or_prompt: str | None,
    prompt: str | None,
    file: Path | None,
    echo: bool,
    as_json: bool,
    no_cache: bool,
    **options: Any,
) -> None:
    """Continue a text and print it as it comes: hanok generate [PATH] [PROMPT].

    PATH is a folder in the Hugging Face layout or a weights file in one; without it the small model
    that ships with hanok is used. The prompt may also come from --file or standard input. Speed goes
    to standard error at the end.
    """
    path, prompt = _split(path_or_prompt, prompt, file is not None)
    if file is not None:
        prompt = read_text(file)
    elif prompt is None:
        if sys.stdin.isatty():
            raise OptionError(
                'there is no prompt. Give one (hanok generate "Once upon a time"), name a file with '
                "--file, or pipe a text in."
            )
        prompt = read_text(STANDARD_INPUT)
    model, speculation = open_model(path, options)
    if echo and not as_json:
        click.echo(prompt, nl=False)
    started, first, events = time.perf_counter(), 0.0, []
    stream = model.stream(prompt, use_cache=not no_cache, speculation=speculation, **given(options))
    for event in stream:
        first = first or time.perf_counter() - started
        events.append(event)
        if not as_json:
            click.echo(event.text, nl=False)
            sys.stdout.flush()
    seconds = time.perf_counter() - started
    tokens_per_s = (len(events) - 1) / (seconds - first) if len(events) > 1 else 0.0
    if as_json:
        click.echo(
            json.dumps(
                {
                    "text": "".join(event.text for event in events),
                    "token_ids": [event.token_id for event in events],
                    "logprobs": [event.logprob for event in events],
                    "top_logprobs": [event.top_logprobs for event in events],
                    "finish_reason": events[-1].finish_reason,
                    "num_prompt_tokens": len(model.encode(prompt)),
                    "first_token_s": first,
                    "tokens_per_s": tokens_per_s,
                    "speculation": asdict(stream.speculation) if speculation else None,
                },
                ensure_ascii=False,
            )
        )
    else:
        click.echo()
    click.echo(
        f"{len(events)} tokens, ended by {events[-1].finish_reason}; first after {first:.3f} s, "
        f"then {tokens_per_s:.1f} tokens/s" + speculation_line(stream, speculation),
        err=True,
    )


def _split(first: str | None, second: str | None, has_file: bool) -> tuple[Path | None, str | None]:
    """Tell PATH from PROMPT: one argument alone is a path if it exists, else a prompt."""
    if first is None:
        return None, None
    if second is not None:
        return Path(first), second
    if has_file or Path(first).exists():
        return Path(first), None
    looks_like_path = "/" in first and not any(letter.isspace() for letter in first)
    if looks_like_path:
        raise OptionError(f"{first}: no such file or folder. Check the path.")
    return None, first


COMMAND = command
