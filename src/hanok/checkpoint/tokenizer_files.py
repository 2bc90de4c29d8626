"""Which files of a folder are its tokenizer. Imports no library: a folder without one needs none.

The first form found is used, in this order: `tokenizer.json`; `tokenizer.model`; `vocab.json`
with `merges.txt`; `tekken.json`; a tiktoken file.
"""

import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from hanok.checkpoint.safetensors import LFS_MARK
from hanok.errors import CheckpointError

SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""A tokenizer's files besides its vocabulary and additional_chat_templates/*.jinja."""

TEMPLATES_FOLDER = "additional_chat_templates"
LOOKED_FOR = (
    "tokenizer.json, tokenizer.model, vocab.json with merges.txt, tekken.json, or a .tiktoken file"
)

_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


class Form(Enum):
    """The forms in which vocabularies are published."""

    LIBRARY = "tokenizer.json"
    SENTENCEPIECE = "tokenizer.model"
    VOCAB_AND_MERGES = "vocab.json"
    TEKKEN = "tekken.json"
    TIKTOKEN = "*.tiktoken"


def has_tokenizer(folder: Path) -> bool:
    """Whether a file of the folder is a vocabulary or a part of one, readable or not."""
    names = ("merges.txt", *(form.value for form in Form), "tiktoken.model")
    return any(file.is_file() for name in names for file in folder.glob(name))


def find_vocabulary(folder: Path) -> tuple[Form, tuple[Path, ...]] | None:
    """The form of a folder's vocabulary and the files it is made of, or None without one."""
    library, model = folder / "tokenizer.json", folder / "tokenizer.model"
    byte_level = (folder / "vocab.json", folder / "merges.txt")
    ranks = sorted((*folder.glob("*.tiktoken"), *folder.glob("tiktoken.model")))
    if library.is_file():
        return Form.LIBRARY, (library,)
    if model.is_file():
        # Two formats have this name. One is lines of base64 and a number, the other protobuf.
        return Form.TIKTOKEN if _has_ranks(model) else Form.SENTENCEPIECE, (model,)
    if all(file.is_file() for file in byte_level):
        return Form.VOCAB_AND_MERGES, byte_level
    if (folder / "tekken.json").is_file():
        return Form.TEKKEN, (folder / "tekken.json",)
    return (Form.TIKTOKEN, (ranks[0],)) if ranks else None


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The existing files that a copy of the folder's tokenizer needs."""
    names = [form.value for form in Form]
    names[3:3] = ["merges.txt"]
    names += ["tiktoken.model", *SETTINGS_FILES]
    found = [file for name in names for file in sorted(folder.glob(name)) if file.is_file()]
    return (*found, *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja")))


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raise CheckpointError if one of these files is a Git LFS pointer."""
    for path in files:
        with path.open("rb") as file:
            if file.read(len(LFS_MARK)) == LFS_MARK:
                raise CheckpointError(
                    f"{path} is a Git LFS pointer and not the file itself; fetch it with "
                    "`git lfs pull`"
                )


def _has_ranks(path: Path) -> bool:
    with path.open("rb") as file:
        return _RANK_LINE.fullmatch(file.readline(4096)) is not None
