"""More rows for the embedding and the head of a loaded model.

A checkpoint on disk gets tokens without being loaded: `memory/tokens.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hanok.errors import OptionError, UnsupportedError
from hanok.memory.tensors import mean_row
from hanok.memory.token_options import PIECES, TokenOptions
from hanok.memory.token_rows import apart, num_rows_for, pieces_of
from hanok.models.decoder import Decoder
from hanok.models.linear import Linear, Weighted

if TYPE_CHECKING:
    from hanok.checkpoint.tokenizer import Tokenizer

VOCABULARY_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")


def resize(
    decoder: Decoder,
    tokenizer: "Tokenizer | None",
    asked: int | None,
    multiple: int | None,
    init: str,
) -> None:
    """Give the matrices of a decoder more rows: see `Model.resize_token_embeddings`."""
    TokenOptions(init=init, pad_to_multiple_of=multiple)  # refuses what cannot be
    if asked is not None and (type(asked) is not int or asked < 0):
        raise OptionError(f"new_num_tokens is {asked!r}; it must be a number of rows.")
    config = decoder.config
    owners: list[tuple[str, Weighted]] = [("embed_tokens", decoder.embed_tokens)]
    if config.has_head:
        owners.append(("lm_head", decoder.lm_head))
    for name, owner in owners:
        if why := _why_not(owner, decoder):
            raise UnsupportedError(f"{name} gets no rows: {why}")
    needed = tokenizer.vocab_size if tokenizer is not None else 0
    # Fewer than there are is what callers of other libraries ask for who only count tokens.
    rows = num_rows_for(config.vocab_size, needed, max(asked or 0, config.vocab_size), multiple)
    starts = _starts(tokenizer, init, config.vocab_size)
    is_tied = config.has_head and decoder.lm_head.weight is decoder.embed_tokens.weight
    with torch.no_grad():
        for _, owner in owners[:1] if is_tied else owners:
            old = owner.weight
            assert isinstance(old, Tensor)
            owner.set_weight(
                nn.Parameter(_grown(old, rows, starts, needed), requires_grad=old.requires_grad)
            )
    decoder.config = replace(config, vocab_size=rows)
    decoder.tie()
    if tokenizer is not None:
        tokenizer.rows_added()


def _why_not(owner: Weighted, decoder: Decoder) -> str | None:
    if owner.stored is not None:
        return "it is quantized. Load the model without quant, or with embed=none and head=none."
    if isinstance(owner, Linear) and owner.lora is not None:
        return "an adapter is attached to it. Merge or detach it first."
    if decoder.execution.is_streamed:
        return "the model is read from disk in every pass. Load it without max_memory."
    if hasattr(owner.weight, "full_tensor"):
        return "each process has only a part of it. Resize before the model is sharded."
    return None


def _starts(
    tokenizer: "Tokenizer | None", init: str, num_rows: int
) -> dict[str, tuple[int, tuple[int, ...] | None]]:
    """Return the id of each added token, and the tokens that its row begins as the mean of."""
    if tokenizer is None:
        return {}
    found: dict[str, tuple[int, tuple[int, ...] | None]] = {}
    for token_id, pieces in tokenizer.added_pieces.items():
        text = tokenizer.spelling(token_id) or str(token_id)
        known = tuple(piece for piece in pieces if piece != tokenizer.unk_token_id)
        start = known if init == PIECES else pieces_of(text, init, tokenizer, num_rows)
        if start is not None and not start:
            raise OptionError(
                f"init {init!r}: the vocabulary knew no piece of {text!r}. Choose mean, like=TOKEN or a "
                "description in words it knows."
            )
        found[text] = (token_id, start)
    return found


def _grown(
    old: Tensor,
    num_rows: int,
    starts: Mapping[str, tuple[int, tuple[int, ...] | None]],
    num_used: int,
) -> Tensor:
    """Return a matrix with more rows, (rows, hidden)."""
    new = {token_id for token_id, _ in starts.values()}
    used = [index for index in range(min(num_used, len(old))) if index not in new]
    grown = old.new_empty(num_rows, old.shape[1])
    grown[: len(old)] = old
    mean, spread = mean_row(old[: len(used)] if used == list(range(len(used))) else old[used])
    grown[len(old) :] = mean.to(grown)
    for text, (token_id, pieces) in starts.items():
        if pieces is None:
            values = torch.tensor(apart(mean.tolist(), spread, text), dtype=torch.float64)
        else:
            # A piece may be a token that was added before this one.
            values = grown[list(pieces)].double().mean(0)
        grown[token_id] = values.to(grown)
    return grown
