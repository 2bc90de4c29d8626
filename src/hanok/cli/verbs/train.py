"""`hanok train`: training, and what comes before it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.cli.fields import add_options, field_options, field_values
from hanok.cli.options import cache_folder_option
from hanok.train.data.options import DataOptions

if TYPE_CHECKING:
    from hanok.checkpoint.tokenizer import Tokenizer

DATA_OPTIONS: dict[str, dict[str, Any]] = {
    "chat_template": {"metavar": "NAME|FILE|TEXT"},
    "allow": {"metavar": "NAME,…", "multiple": False, "default": "", "type": str},
}


@click.group("train", short_help="Look at training data as it will be learnt.")
def command() -> None:
    """Fine-tune a model, and see beforehand what it will learn."""


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
    from hanok.train.data.dataset import Dataset
    from hanok.train.data.options import read_source
    from hanok.train.data.read import size_of

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
