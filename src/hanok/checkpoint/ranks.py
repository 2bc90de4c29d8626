"""Vocabularies of ranks (tiktoken's files and Mistral's tekken.json) as byte-level BPE with their ids.

In both, a token's rank says when it is merged, whichever two parts it is merged from: of all adjacent
parts whose bytes together are a token, the pair with the lowest rank is merged next. The tokenizers
library needs explicit pairs instead. All ways to cut a token into two tokens, in the order of the ranks,
give the same result: before a token can be merged, everything inside it was merged as if it were alone,
so only one of its pairs ever occurs.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import tokenizers
from tokenizers.models import BPE

from hanok.checkpoint.byte_level import (
    GLM4,
    LLAMA3,
    LLAMA3_BOS,
    QWEN2,
    Cuts,
    byte_alphabet,
    find_cuts,
)
from hanok.checkpoint.tokenizer_config import TokenizerConfig
from hanok.errors import CheckpointError

LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL = {
    LLAMA3_BOS: 128_000,
    "<|end_of_text|>": 128_001,
    "<|finetune_right_pad_id|>": 128_004,
    "<|start_header_id|>": 128_006,
    "<|end_header_id|>": 128_007,
    "<|eom_id|>": 128_008,
    "<|eot_id|>": 128_009,
    "<|python_tag|>": 128_010,
}
"""As in Meta's files; the ids between them are reserved."""

QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
)
"""After the ranks, in this order."""

TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
"""For files that do not list theirs; the ones after these are called <SPECIAL_N>."""


def read_tiktoken(path: Path, settings: TokenizerConfig) -> tuple[tokenizers.Tokenizer, Cuts]:
    """Read a file of lines, each a token in base64 and its rank; and the row it is read with."""
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise CheckpointError(
                    f"{path}: line {number} is {line[:60]!r}, not a token in base64 and its rank; fetch "
                    "the file again"
                ) from error
    cuts, special = _of_tiktoken(path, len(ranks), settings)
    return _library(path, cuts, ranks, special, settings)


def _of_tiktoken(
    path: Path, num_ranks: int, settings: TokenizerConfig
) -> tuple[Cuts, Mapping[str, int]]:
    """How such a file's text is split, and its special tokens: the file contains neither."""
    if settings.tokenizer_class is None and num_ranks == LLAMA3_RANKS:
        return replace(LLAMA3, names={"bos_token": LLAMA3_BOS, "eos_token": "<|end_of_text|>"}), (
            LLAMA3_SPECIAL
        )
    cuts = QWEN2 if path.name == "qwen.tiktoken" else find_cuts(path, settings)
    if cuts is QWEN2:
        return cuts, {text: num_ranks + place for place, text in enumerate(QWEN_SPECIAL)}
    if cuts is LLAMA3:
        return cuts, LLAMA3_SPECIAL
    if cuts is GLM4:
        return cuts, {}
    raise CheckpointError(
        f"{path} is a tiktoken file, and of {cuts.title} none is known. Put the model's tokenizer.json "
        "into the folder"
    )


def read_tekken(path: Path, settings: TokenizerConfig) -> tuple[tokenizers.Tokenizer, Cuts]:
    """Read a tekken.json: its pattern, its ranks after its special tokens; and how it splits."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content["config"]
        num_special = int(config["default_num_special_tokens"])
        num_ranks = int(config["default_vocab_size"]) - num_special
        # The file has more ranks than the model has embedding rows.
        ranks = {
            base64.b64decode(entry["token_bytes"]): int(entry["rank"]) + num_special
            for entry in content["vocab"]
            if entry["rank"] < num_ranks
        }
        listed = content.get("special_tokens")
        special = {f"<SPECIAL_{rank}>": rank for rank in range(num_special)}
        names = (
            dict(enumerate(TEKKEN_SPECIAL))
            if listed is None
            else {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
        )
        special = {names.get(rank, text): rank for text, rank in special.items()}
        cuts = Cuts(
            title="Tekken",
            pattern=_checked_pattern(config["pattern"]),
            takes_whole=True,
            names={
                name: text
                for name, text in (
                    ("bos_token", "<s>"),
                    ("eos_token", "</s>"),
                    ("unk_token", "<unk>"),
                    ("pad_token", "<pad>"),
                )
                if text in special
            },
            begins_with=("<s>",),
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not as Mistral writes this file: {error!r}; fetch the file again"
        ) from error
    if len(ranks) != num_ranks:
        raise CheckpointError(
            f"{path} has {len(ranks):,} different tokens of the {num_ranks:,} that its config says; "
            "fetch the file again"
        )
    return _library(path, cuts, ranks, special, settings)


def _checked_pattern(pattern: str) -> str:
    try:
        tokenizers.Regex(pattern)
    except Exception as error:
        # The library raises the bare Exception.
        raise ValueError(f"pattern {pattern!r}: {error}") from error
    return pattern


def _library(
    path: Path,
    cuts: Cuts,
    ranks: Mapping[bytes, int],
    special: Mapping[str, int],
    settings: TokenizerConfig,
) -> tuple[tokenizers.Tokenizer, Cuts]:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path} has no token for the byte {missing[0]}, so not every text can be written with it; "
            "fetch the file again"
        )
    # If a special token and a token of bytes have the same text, the text is the special token.
    hidden = {ranks[text.encode()]: text.encode() for text in special if text.encode() in ranks}
    seen = {token: token_id for token, token_id in ranks.items() if token_id not in hidden}
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in seen}
    vocabulary = {spelled[token]: token_id for token, token_id in seen.items()}
    owners = {token_id: text for text, token_id in vocabulary.items()}
    owners |= {token_id: repr(token) for token_id, token in hidden.items()}
    added = [(token.text, token.token_id) for token in settings.added if token.token_id is not None]
    for text, token_id in (*special.items(), *added):
        owner, other_id = owners.setdefault(token_id, text), vocabulary.setdefault(text, token_id)
        if owner != text or other_id != token_id:
            raise CheckpointError(
                f"{path}: token {token_id} is {owner!r}, and {text!r} is token {other_id}, where "
                f"another file says that {text!r} is {token_id}: files of different models; fetch "
                "the tokenizer files again"
            )
    model = BPE(vocabulary, list(_pairs(seen, spelled)), ignore_merges=True)
    library = cuts.library(model, adds_prefix_space=False)
    library.add_special_tokens(
        [tokenizers.AddedToken(text, normalized=False, special=True) for text in special]
    )
    return library, replace(cuts, hidden=hidden)


def _pairs(ranks: Mapping[bytes, int], spelled: Mapping[bytes, str]) -> Iterator[tuple[str, str]]:
    for token in sorted(ranks, key=ranks.__getitem__):
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in ranks and right in ranks:
                yield spelled[left], spelled[right]
