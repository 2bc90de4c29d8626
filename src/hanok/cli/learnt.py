"""What learns, on the command line: an adapter in PEFT's names, or all weights. Imports no torch."""

from typing import Any, get_type_hints

import click

from hanok.checkpoint.lora_config import ALL_LINEAR, LoraConfig
from hanok.cli.fields import Command
from hanok.errors import OptionError
from hanok.training.config import LORA, from_text, unknown


def learnt_options(command: Command) -> Command:
    """Add --lora and --full."""
    for option in (
        click.option(
            "--full", is_flag=True, help="Let all weights learn, in place of an adapter over them."
        ),
        click.option(
            "--lora",
            metavar="NAME=VALUE,…",
            default="",
            help="The adapter, in PEFT's names: r=16,lora_alpha=32,target_modules=q_proj+v_proj.  "
            "[default: r=16,lora_alpha=32,target_modules=all-linear]",
        ),
    ):
        command = option(command)
    return command


def read_learnt(lora: str | None, *, full: bool) -> dict[str, Any]:
    """Return what both say of `TrainOptions.lora`; nothing where neither was given."""
    if full and lora:
        raise OptionError(
            "--full and --lora are both given: all weights learn, or an adapter does."
        )
    if full:
        return {LORA: None}
    return {LORA: read_lora(lora)} if lora else {}


def read_lora(text: str) -> dict[str, Any]:
    """Return the options of an adapter that NAME=VALUE,… says; several values are joined by +.

    Raises OptionError for an unknown name, with the nearest, and for values of another kind.
    """
    hints = get_type_hints(LoraConfig)
    found: dict[str, Any] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, value = item.partition("=")
        if name not in hints:
            raise OptionError(unknown("--lora", name, list(hints)))
        is_word = value == ALL_LINEAR
        found[name] = value if is_word else from_text(value, hints[name], f"--lora: {name}")
    return found
