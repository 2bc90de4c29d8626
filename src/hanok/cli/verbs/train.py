"""`hanok train`: training, and what comes before it."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hanok.cli.fields import add_options, field_options, field_values
from hanok.cli.learnt import learnt_options, read_learnt
from hanok.cli.options import cache_folder_option, some_load_options
from hanok.errors import OptionError
from hanok.training.config import (
    FILE,
    FLAG,
    LOAD,
    LORA,
    read_config,
    resolve,
)
from hanok.training.data.options import DataOptions
from hanok.training.options import TrainOptions
from hanok.training.report_options import TARGETS, ReportOptions

if TYPE_CHECKING:
    from hanok.checkpoint.tokenizer import Tokenizer


def _read_names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


DATA_OPTIONS: dict[str, dict[str, Any]] = {
    "chat_template": {"metavar": "NAME|FILE|TEXT"},
    "allow": {
        "metavar": "NAME,…",
        "multiple": False,
        "default": "",
        "type": str,
        "callback": _read_names,
    },
}
REPORT_OPTIONS: dict[str, dict[str, Any]] = {
    "samples": {"flag": "--sample", "metavar": "PROMPT"},
    "report_to": {"type": click.Choice(TARGETS)},
}
RUN = "run"
CACHE = "train"
"""The folder of tokenized documents in hanok's cache folder."""


class Training(click.Group):
    """What belongs to training; without a command's name, training itself."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Train unless a command is named; a folder of that name is ./NAME."""
        is_named = bool(args) and args[0] in (*self.commands, *ctx.help_option_names)
        return super().parse_args(ctx, args if is_named else [RUN, *args])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return how it is called."""
        return ["MODEL DATA… [OPTIONS]", "or COMMAND …"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the options of training, then the commands."""
        run.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(
    "train",
    cls=Training,
    short_help="Fine-tune a model: an adapter over its weights, or all of them.",
)
def command() -> None:
    """Train a LoRA adapter over MODEL, which stays as it is, on DATA; with --full, all weights.

    DATA are files and folders of conversations, instructions, prompts with completions, or texts;
    `hanok train preview` shows what would be learnt. The adapter is written below --output in PEFT's
    format, a model as a whole checkpoint. Interrupted, or told to stop by a signal, the same command
    goes on where it was.
    """


@command.command(RUN, hidden=True)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.argument("data", nargs=-1, metavar="DATA…")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where checkpoints, log.jsonl and the result are written; a training there is gone on with.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML with model, data, output and options by their names; options given as flags count more.",
)
@click.option(
    "--from",
    "foreign",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML of axolotl or LLaMA-Factory, in place of --config: what becomes of each key is listed.",
)
@click.option(
    "--ignore",
    metavar="KEY,…",
    default="",
    callback=_read_names,
    help="Keys of --from that cannot be translated, and are to be left out.",
)
@learnt_options
@lambda run: add_options(run, field_options(TrainOptions, {}, without=["lora"]))
@lambda run: add_options(run, field_options(ReportOptions, REPORT_OPTIONS))
@lambda run: add_options(run, field_options(DataOptions, DATA_OPTIONS))
@some_load_options(*LOAD)
@cache_folder_option("tokenized documents are")
@click.pass_context
def run(
    context: click.Context,
    /,
    full: bool,
    config: Path | None,
    foreign: Path | None,
    ignore: tuple[str, ...],
    cache_folder: Path,
    **options: Any,
) -> None:
    """Train an adapter, or all weights."""
    from hanok.cli.steps import step_of
    from hanok.cli.training import train

    flags = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    flags |= read_learnt(flags.pop(LORA, None), full=full)
    layers = _files(config, foreign, ignore)
    asked = resolve([*layers, (FLAG, flags)], cache_folder / CACHE)
    text = "trains all weights" if asked.options.lora is None else "trains this adapter"
    step = step_of(context, text, ("output", "cache_folder", "threads"))
    context.exit(train(asked, step))


def _files(
    config: Path | None, foreign: Path | None, ignored: Sequence[str]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what a file says, hanok's or another trainer's."""
    if config is not None and foreign is not None:
        raise OptionError("--config and --from are both given; give one of them.")
    if config is not None:
        return [(FILE, read_config(config))]
    if foreign is None:
        return []
    # Imported here: few trainings have such a file.
    from hanok.training.foreign import translate

    found = translate(foreign, ignored)
    click.echo(f"{foreign} is a file of {found.trainer}:", err=True)
    for note in found.notes:
        click.echo(f"  {note}", err=True)
    return [(FILE, found.values)]


@command.command("preview", short_help="Show what would be learnt, token by token.")
@click.argument("data", nargs=-1, required=True, metavar="DATA…")
@click.option(
    "--model",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    help="The checkpoint whose tokenizer and chat template are used. No weights are read.",
)
@lambda preview: add_options(preview, field_options(DataOptions, DATA_OPTIONS))
@click.option(
    "--pack-tokens",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    help="Tokens of one pack.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of documents.")
@click.option(
    "--rows", type=click.IntRange(0), default=3, show_default=True, help="Documents that are shown."
)
@click.option(
    "--start",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="The first document that is shown.",
)
@cache_folder_option("tokenized documents are")
def preview(
    data: tuple[str, ...],
    folder: Path,
    pack_tokens: int,
    seed: int,
    rows: int,
    start: int,
    cache_folder: Path,
    **options: Any,
) -> None:
    """Show how DATA is read, rendered, masked and packed for the model in a folder.

    DATA are files and folders: JSONL, JSON, CSV, text, Parquet, Arrow. After a colon may follow what is
    read of one: chat.jsonl:times=0.5,cap=1000 or gsm8k.jsonl:instruction=question,output=answer.

    What is learnt is in colour, or between « and ». What looks wrong is refused with its row at the end.
    """
    # Imported here: tokenizers and rich are slow to import.
    from hanok.checkpoint.tokenizer import open_tokenizer
    from hanok.cli.progress import bytes_bars
    from hanok.cli.train_preview import print_preview
    from hanok.training.data.dataset import Dataset

    tokenizer = open_tokenizer(folder)
    with bytes_bars() as show:
        dataset = Dataset.open(
            data,
            tokenizer,
            DataOptions(**field_values(DataOptions, options)),
            pack_tokens=pack_tokens,
            seed=seed,
            end_ids=_end_ids(folder, tokenizer),
            cache_folder=cache_folder / CACHE,
            progress=partial(show, "Tokenizing"),
        )
    print_preview(dataset, range(start, start + rows))
    dataset.check()


def _end_ids(folder: Path, tokenizer: "Tokenizer") -> frozenset[int]:
    """Return the tokens at which the model in a folder stops when it serves."""
    from hanok.checkpoint.files import read_object
    from hanok.engine.params import end_ids_of

    names = ("generation_config.json", "config.json")
    files = {name: read_object(folder / name) for name in names if (folder / name).is_file()}
    return end_ids_of(files, tokenizer.eos_token_id, tokenizer.vocab_size)[0]


COMMAND = command
