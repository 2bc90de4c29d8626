"""What an edit of a tokenizer must not break, looked at in the files that it wrote. Imports no torch."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from hanok.checkpoint.files import Checkpoint, open_checkpoint
from hanok.checkpoint.rows import RowEdit, first_difference
from hanok.checkpoint.safetensors import read_header
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.checkpoint.tokenizer_edit import LIBRARY
from hanok.memory.token_rows import find_matrices
from hanok.package import BUNDLED

SAMPLE_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Edited:
    """An edit, as far as what it must not break is concerned."""

    folder: Path
    """Of the old files."""
    tokenizer: Tokenizer
    """As it was."""
    rows: Sequence[RowEdit]
    num_rows: int
    """That there should be."""
    found: Mapping[str, int]
    """Tokens that a text is now searched for, with their ids."""
    removed: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariant:
    """What an edit must not break, as it was found in the new files."""

    name: str
    holds: bool
    detail: str
    is_needed: bool = True
    """Whether an edit without it is undone; otherwise it is only said."""


def check_edit(edit: Edited, folder: Path) -> list[Invariant]:
    """Return what an edit must not break, as it is in the new files of `folder`."""
    before, after = edit.tokenizer, open_tokenizer(folder)
    found = [*_check_vocabulary(edit, before, after), *_check_found(edit.found, after)]
    checkpoint = open_checkpoint(folder)
    matrices = find_matrices(checkpoint)
    rows = matrices.num_rows
    found.append(
        Invariant(
            name="a row for each token",
            holds=rows >= after.vocab_size and rows == edit.num_rows,
            detail=f"{rows:,} rows for {after.vocab_size:,} ids",
        )
    )
    if edit.rows:
        found.append(_check_bytes(edit, folder, checkpoint))
    if foreign := {text: i for text, i in edit.found.items() if not text.isascii()}:
        found.append(_check_library(foreign, folder))
    eos = after.eos_token_id
    ends = _end_ids(checkpoint.generation_config) or _end_ids(checkpoint.config)
    if eos is not None:
        found.append(
            Invariant(
                name="the end token ends generation",
                holds=eos in ends,
                detail=f"{after.spelling(eos)!r} is {eos}, generation ends at {sorted(ends)}",
                is_needed=False,
            )
        )
    return found


def vocabulary_hash(tokenizer: Tokenizer, num_ids: int) -> str:
    """Return a hash of the spellings of the ids below `num_ids`."""
    digest = hashlib.sha256()
    for text, token_id in sorted(tokenizer.ids.items(), key=lambda item: item[1]):
        if token_id < num_ids:
            digest.update(f"{token_id}\0{text}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _check_vocabulary(edit: Edited, before: Tokenizer, after: Tokenizer) -> list[Invariant]:
    old = {i: t for t, i in before.ids.items() if t not in edit.removed}
    new = {i: t for t, i in after.ids.items()}
    moved = [text for token_id, text in old.items() if new.get(token_id) != text]
    kept = before.vocab_size - len(edit.removed)
    hashes = vocabulary_hash(before, kept), vocabulary_hash(after, kept)
    sample = (BUNDLED / "quality.txt").read_text(encoding="utf-8")[:SAMPLE_CHARACTERS]
    marked = (*edit.found, *edit.removed)
    while any(text in sample for text in marked):  # one may appear where another was
        for text in marked:
            sample = sample.replace(text, " ")
    encoded = [item.encode(sample) for item in (before, after)]
    return [
        Invariant(
            name="old tokens have their ids",
            holds=not moved and hashes[0] == hashes[1],
            detail=f"{kept:,} ids, hash {hashes[1]}"
            if not moved
            else f"{moved[0]!r} has another id, or none",
        ),
        Invariant(
            name="old text has its tokens",
            holds=encoded[0] == encoded[1],
            detail=f"{len(sample):,} characters, {len(encoded[0]):,} tokens",
        ),
    ]


def check_added(tokenizer: Tokenizer) -> list[Invariant]:
    """Return whether each added token of a tokenizer is found in a text and decodes to itself."""
    added = tokenizer.edited_files().added
    return _check_found({token.text: token.token_id or 0 for token in added}, tokenizer)


def _check_found(expected: Mapping[str, int], after: Tokenizer) -> list[Invariant]:
    broken = []
    for text, token_id in expected.items():
        # Alone: in another text it may be a part of a longer token.
        ids = after.encode(text, add_special_tokens=False)
        kept = "" if token_id in after.special_token_ids else text
        spelled = after.decode([token_id], skip_special_tokens=False)
        # A space at the front is left out where a text begins.
        if (
            token_id not in ids
            or after.decode([token_id]).strip() != kept.strip()
            or spelled.strip() != text.strip()
        ):
            broken.append(f"{text!r} is encoded to {ids}, and {token_id} decoded to {spelled!r}")
    if not expected:
        return []
    return [
        Invariant(
            name="added tokens are found and spelled",
            holds=not broken,
            detail=broken[0] if broken else f"{len(expected)} of them",
        )
    ]


def _check_library(expected: Mapping[str, int], folder: Path) -> Invariant:
    """Return whether the tokenizers library, by which other programs decode, spells tokens right."""
    library = tokenizers.Tokenizer.from_file(str(folder / LIBRARY))
    found = {
        text: library.decode([token_id], skip_special_tokens=False)
        for text, token_id in expected.items()
    }
    wrong = [text for text, spelled in found.items() if spelled.strip() != text.strip()]
    return Invariant(
        name="other programs decode the new tokens",
        holds=not wrong,
        detail=f"{wrong[0]!r} becomes {found[wrong[0]]!r}, since its letters stand for bytes as well"
        if wrong
        else f"{len(expected)} that are not ASCII",
        is_needed=False,
    )


def _check_bytes(edit: Edited, folder: Path, checkpoint: Checkpoint) -> Invariant:
    """Compare the changed tensors' old rows, and that the files have the same other tensors."""
    name = "old tokens have their logits"
    for item in edit.rows:
        row = first_difference(item.tensor, checkpoint.tensors[item.tensor.name], item.rows)
        if row is not None:
            return Invariant(
                name=name, holds=False, detail=f"row {row} of {item.tensor.name} differs"
            )
    changed = {item.tensor.name for item in edit.rows}
    for path in {item.tensor.path for item in edit.rows}:
        new_path = folder / path.relative_to(edit.folder)
        old, new = read_header(path)[0], read_header(new_path)[0]
        facts = [
            {ref.name: (ref.dtype, ref.shape) for ref in refs.values() if ref.name not in changed}
            for refs in (old, new)
        ]
        if facts[0] != facts[1]:
            return Invariant(name=name, holds=False, detail=f"{path.name} lost or gained tensors")
    return Invariant(
        name=name,
        holds=True,
        detail="every old row of "
        f"{' and '.join(item.tensor.name for item in edit.rows)} is the same bytes, and so is the rest",
    )


def _end_ids(config: Mapping[str, Any]) -> set[int]:
    found = config.get("eos_token_id")
    return {
        item for item in (found if isinstance(found, list) else [found]) if isinstance(item, int)
    }
