"""`hanok train`: training, and what comes before it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.checkpoint.lora_config import LoraConfig
from hanok.cli.fields import add_options, field_options, field_values
from hanok.cli.options import cache_folder_option, some_load_options
from hanok.errors import OptionError
from hanok.memory.options import LoadOptions
from hanok.registry import nearest_first
from hanok.training.data.options import DataOptions
from hanok.training.options import TrainOptions

if TYPE_CHECKING:
    from hanok.checkpoint.tokenizer import Tokenizer

DATA_OPTIONS: dict[str, dict[str, Any]] = {
    "chat_template": {"metavar": "NAME|FILE|TEXT"},
    "allow": {"metavar": "NAME,…", "multiple": False, "default": "", "type": str},
}


RUN = "run"
LOAD = ("dtype", "quant", "device_map", "max_memory", "attn_implementation", "threads")


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
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", nargs=-1, required=True, metavar="DATA…")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where checkpoints, log.jsonl and the adapter are written; a training there is gone on with.",
)
@click.option(
    "--lora",
    metavar="NAME=VALUE,…",
    default="",
    help="The adapter, in PEFT's names: r=16,lora_alpha=32,target_modules=q_proj+v_proj.  "
    "[default: r=16,lora_alpha=32,target_modules=all-linear]",
)
@click.option(
    "--full", is_flag=True, help="Let all weights learn, in place of an adapter over them."
)
@lambda run: add_options(run, field_options(TrainOptions, {}, without=["lora"]))
@lambda run: add_options(run, field_options(DataOptions, DATA_OPTIONS))
@some_load_options(*LOAD)
@cache_folder_option("tokenized documents are")
@click.pass_context
def run(
    context: click.Context,
    /,
    model: Path,
    data: tuple[str, ...],
    output: Path,
    lora: str,
    full: bool,
    cache_folder: Path,
    **options: Any,
) -> None:
    """Train an adapter, or all weights."""
    from hanok.cli.steps import step_of
    from hanok.cli.training import Asked, train

    if full and lora:
        raise OptionError(
            "--full and --lora are both given: all weights learn, or an adapter does."
        )
    allow = tuple(name.strip() for name in options.pop("allow").split(",") if name.strip())
    asked = Asked(
        model=model,
        data=data,
        output=output,
        load=LoadOptions(**field_values(LoadOptions, options), weights="copied"),
        options=TrainOptions(
            **field_values(TrainOptions, options), lora=None if full else read_lora(lora)
        ),
        data_options=DataOptions(**field_values(DataOptions, options), allow=allow),
        cache_folder=cache_folder,
        step=step_of(
            context,
            "trains all weights" if full else "trains this adapter",
            ("output", "cache_folder", "threads"),
        ),
    )
    context.exit(train(asked))


def read_lora(text: str) -> LoraConfig:
    """Return the adapter that NAME=VALUE,… says; several names are joined by +.

    Raises OptionError for an unknown name, with the nearest, and for values of another kind.
    """
    found: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    kinds: dict[str, Callable[[str], Any]] = {
        "r": int,
        "lora_alpha": float,
        "lora_dropout": float,
        "target_modules": lambda value: value if value == "all-linear" else tuple(value.split("+")),
        "exclude_modules": lambda value: tuple(value.split("+")),
        "layers_to_transform": lambda value: tuple(map(int, value.split("+"))),
        "use_rslora": _flag,
        "use_dora": _flag,
        "init_lora_weights": lambda value: True if value.lower() == "true" else value,
        "modules_to_save": lambda value: tuple(value.split("+")),
        "trainable_token_indices": lambda value: tuple(map(int, value.split("+"))),
        "ensure_weight_tying": _flag,
        "rank_pattern": lambda value: _pattern(value, int),
        "alpha_pattern": lambda value: _pattern(value, float),
    }
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, value = item.partition("=")
        if name not in kinds:
            known = ", ".join(nearest_first(name, list(kinds)))
            raise OptionError(f"--lora: {name!r} is unknown. Known: {known}.")
        try:
            found[name] = kinds[name](value)
        except (ValueError, KeyError):
            raise OptionError(f"--lora: {name} is {value!r}, which it cannot be.") from None
    return LoraConfig(**found)


def _flag(value: str) -> bool:
    return {"true": True, "false": False}[value.lower()]


def _pattern(value: str, kind: Callable[[str], Any]) -> dict[str, Any]:
    """Read NAME:NUMBER+NAME:NUMBER."""
    pairs = (item.rpartition(":") for item in value.split("+"))
    return {name: kind(number) for name, _, number in pairs}


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
    from hanok.cli.progress import bytes_bar
    from hanok.cli.train_preview import print_preview
    from hanok.training.data.dataset import Dataset
    from hanok.training.data.options import read_source
    from hanok.training.data.read import size_of

    allow = tuple(name.strip() for name in options.pop("allow").split(",") if name.strip())
    asked = DataOptions(**field_values(DataOptions, options), allow=allow)
    tokenizer = open_tokenizer(folder)
    sources = [read_source(item) for item in data]
    with bytes_bar("Tokenizing") as bar:
        bar.start(sum(size_of(source.path) for source in sources))
        dataset = Dataset.open(
            sources,
            tokenizer,
            asked,
            pack_tokens=pack_tokens,
            seed=seed,
            end_ids=_end_ids(folder, tokenizer),
            cache_folder=cache_folder / "train",
            progress=bar.advance,
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
