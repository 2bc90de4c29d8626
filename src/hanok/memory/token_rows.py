"""Which tensors of a checkpoint have a row for each token, and what new rows begin as. Imports no torch.

A mean over a whole matrix is the one thing that torch computes here, and it is imported for that alone.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hanok.checkpoint.files import Checkpoint
from hanok.checkpoint.rows import FLOATS, RowEdit, read_row, row_bytes, to_bytes
from hanok.checkpoint.safetensors import TensorRef
from hanok.checkpoint.tokenizer import Tokenizer
from hanok.errors import CheckpointError, OptionError, UnsupportedError
from hanok.memory.token_options import LIKE, MEAN, PIECES
from hanok.models.family import family_of, unwrapped

NOISE = 0.02
"""By how much rows that begin as the mean differ, in standard deviations of the matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """The tensors of a checkpoint that have a row, or a number, for each token."""

    embedding: TensorRef
    others: tuple[TensorRef, ...]
    """The head and its bias, where the files have them: a tied one may be there as a copy."""
    notes: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """How many tokens there are rows for."""
        return self.embedding.shape[0]

    @property
    def all(self) -> tuple[TensorRef, ...]:
        """The embedding first."""
        return (self.embedding, *self.others)


def find_matrices(checkpoint: Checkpoint) -> Matrices:
    """Return the tensors with a row for each token.

    Raises UnsupportedError where one is quantized or no float, CheckpointError where there is none.
    """
    family = family_of(checkpoint.config, str(checkpoint.folder / "config.json"))
    in_files = unwrapped(checkpoint.tensors)
    names = family.names_in(in_files)
    embedding, head = str(names["embed_tokens"]), str(names["lm_head"])
    found = []
    for path in (embedding, head):
        leaves = {
            name.removeprefix(f"{path}."): checkpoint.tensors[stored]
            for name, stored in in_files.items()
            if name.startswith(f"{path}.")
        }
        unknown = sorted(leaves.keys() - {"weight", "bias"})
        wrong = [
            f"{path}.{leaf} is {ref.dtype}"
            for leaf, ref in leaves.items()
            if ref.dtype not in FLOATS
        ]
        if unknown or wrong:
            what = ", ".join([*(f"{path}.{leaf}" for leaf in unknown), *wrong])
            raise UnsupportedError(
                f"{checkpoint.folder}: {what}. Rows can be added to {', '.join(FLOATS)} only, so a "
                "quantized embedding or head gets none: add the tokens to the model before it is "
                "quantized."
            )
        if path == embedding and "weight" not in leaves:
            raise CheckpointError(
                f"{checkpoint.folder} has no {path}.weight, so there are no rows to add to."
            )
        found += [leaves[leaf] for leaf in ("weight", "bias") if leaf in leaves]
    rows = found[0].shape[0]
    known = {ref.name for ref in found}
    others = [
        ref.name
        for ref in checkpoint.tensors.values()
        if ref.name not in known
        and ref.shape[:1] == (rows,)
        and ref.size_bytes >= row_bytes(found[0]) * rows
    ]
    notes = [f"{name} has {rows:,} rows as well, and stays as it is" for name in others]
    return Matrices(embedding=found[0], others=tuple(found[1:]), notes=tuple(notes))


def num_rows_for(present: int, needed: int, asked: int | None, multiple: int | None) -> int:
    """Return how many rows there will be: never fewer than there are."""
    if asked is not None and asked < present:
        raise OptionError(
            f"{asked:,} rows are fewer than the {present:,} that are there. Rows are never removed: "
            f"{needed:,} of them belong to tokens, and others may have been trained."
        )
    rows = max(present, needed, asked or 0)
    return rows if multiple is None else -(-rows // multiple) * multiple


def pieces_of(text: str, init: str, tokenizer: Tokenizer, num_rows: int) -> tuple[int, ...] | None:
    """Return the tokens whose rows a new row begins as the mean of; None for all of them.

    `init` is that of `TokenOptions`; OptionError where it names no token that has one of the `num_rows`
    rows, or no piece is known.
    """
    if init == MEAN:
        return None
    if init.startswith(LIKE):
        like = init.removeprefix(LIKE)
        token_id = tokenizer.token_to_id(like)
        if token_id is None:
            spelled = map(tokenizer.spelling, tokenizer.encode(like, add_special_tokens=False))
            raise OptionError(
                f"init {init!r}: {like!r} is no token of this vocabulary, which spells it "
                f"{' '.join(map(repr, spelled)) or 'with none'}."
            )
        if token_id >= num_rows:
            raise OptionError(f"init {init!r}: {like!r} is {token_id}, and has no row yet.")
        return (token_id,)
    described = text if init == PIECES else init
    pieces = tokenizer.encode(described, add_special_tokens=False)
    known = tuple(piece for piece in pieces if piece != tokenizer.unk_token_id and piece < num_rows)
    if not known:
        raise OptionError(
            f"init {init!r}: the vocabulary knows no piece of {described!r}. Choose mean, like=TOKEN or "
            "a description in words it knows."
        )
    return known


def row_edit(
    ref: TensorRef,
    num_rows: int,
    starts: Mapping[int, tuple[int, ...] | None],
    names: Mapping[int, str],
    num_used: int,
) -> RowEdit:
    """Return the rows of one tensor; `num_used` of its old ones belong to tokens."""
    mean: list[float] = []
    spread = 0.0
    if num_rows > max([ref.shape[0], *(i + 1 for i in starts)]) or None in starts.values():
        mean, spread = _mean_row(ref, min(num_used, ref.shape[0]))
    rows = {}
    for token_id, pieces in starts.items():
        parts = [read_row(ref, piece) for piece in pieces or ()]
        values = [sum(column) / len(parts) for column in zip(*parts, strict=True)]
        if pieces is None:
            values = apart(mean, spread, names[token_id])
        rows[token_id] = to_bytes(values, ref.dtype)
    return RowEdit(
        tensor=ref,
        num_rows=num_rows,
        rows=rows,
        filler=to_bytes(mean, ref.dtype) if mean else b"",
    )


def with_vocab_size(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """Return a copy of a config.json, that of the text part included, with another number of rows."""
    owners = [dict(config)]
    if isinstance(config.get("text_config"), dict):
        owners.append(dict(config["text_config"]))
        owners[0]["text_config"] = owners[1]
    if before != after:
        said = [owner for owner in owners if owner.get("vocab_size") == before]
        for owner in said or owners[-1:]:
            owner["vocab_size"] = after
    return owners[0]


def apart(mean: Sequence[float], spread: float, text: str) -> list[float]:
    """Return a row near the mean that is not that of another token, drawn from the token's text.

    `spread` is the standard deviation of the matrix's numbers.
    """
    draws = random.Random(text)
    return [value + draws.gauss(0.0, NOISE * spread) for value in mean]


def _mean_row(ref: TensorRef, num_rows: int) -> tuple[list[float], float]:
    """Return the mean of the first rows, and the standard deviation of their numbers."""
    # Imported here: nothing else needs torch.
    from hanok.memory.tensors import MappedFiles, mean_row

    mean, spread = mean_row(MappedFiles().view(ref)[:num_rows])
    return mean.reshape(-1).tolist(), spread
