"""A SentencePiece model as a tokenizer.json: the same pieces, ids and rules, for the tokenizers library.

In a SentencePiece BPE model the pair whose piece has the best score is merged first, the leftmost of
several; in a tokenizer.json the pair that is listed first. A piece may come of several pairs, and all
are listed. What the library cannot express is refused by name; `first_difference` compares the result.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from hanok.checkpoint.protobuf import fields
from hanok.checkpoint.tokenizer_config import AddedToken
from hanok.errors import UnsupportedError

SPACE_MARK = "\u2581"
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of a SentencePiece vocabulary; its place is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a SentencePiece file says."""

    pieces: tuple[Piece, ...]
    kind: str
    has_byte_fallback: bool
    adds_dummy_prefix: bool
    replacements: bytes
    """A compiled table of characters to replace; empty for none."""
    removes_extra_spaces: bool
    has_suffixes: bool
    """Whether the mark of a space ends a piece instead of beginning it."""


def read_model(proto: bytes) -> SentencePieceModel:
    """Read a serialized ModelProto (sentencepiece_model.proto)."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in fields(proto):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            inner = dict(fields(value))
            score = struct.unpack("<f", _bytes(inner.get(2), b"\0\0\0\0"))[0]
            kind = inner.get(3, 1)
            text = _bytes(inner.get(1), b"").decode()
            pieces.append(Piece(text, score, int(kind) if isinstance(kind, int) else 1))
        elif number == 2:
            trainer |= dict(fields(value))
        elif number == 3:
            normalizer |= dict(fields(value))
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=KINDS.get(_whole(trainer.get(3), 1), "unknown"),
        has_byte_fallback=bool(_whole(trainer.get(35), 0)),
        adds_dummy_prefix=bool(_whole(normalizer.get(3), 1)),
        replacements=_bytes(normalizer.get(2), b""),
        removes_extra_spaces=bool(_whole(normalizer.get(4), 1)),
        has_suffixes=bool(_whole(trainer.get(24), 0)),
    )


def to_library(
    model: SentencePieceModel,
    added: Iterable[AddedToken],
    *,
    is_legacy: bool,
    frame: tuple[tuple[str, int] | None, tuple[str, int] | None],
) -> tokenizers.Tokenizer:
    """Return the tokenizer of the library.

    `added` are all tokens found in a text before SentencePiece sees it, `frame` the tokens that are put
    before and after a text. `is_legacy`: the prefix comes before each stretch between those tokens, and
    not only before the first. Raises UnsupportedError for what the library does not have.
    """
    if model.kind not in ("unigram", "BPE") or model.has_suffixes:
        raise UnsupportedError(
            f"a SentencePiece model of kind {model.kind!r}"
            f"{', with spaces after words' if model.has_suffixes else ''} cannot be written as a "
            "tokenizer.json: the tokenizers library has none like it."
        )
    if model.removes_extra_spaces:
        raise UnsupportedError(
            "a SentencePiece model that removes repeated spaces (remove_extra_whitespaces) cannot be "
            "written as a tokenizer.json with the same ids for every text."
        )
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = next((p.text for p in model.pieces if p.kind == UNKNOWN), None)
    library = tokenizers.Tokenizer(
        _bpe(model, vocabulary, unknown)
        if model.kind == "BPE"
        else _unigram(model, vocabulary, unknown)
    )
    has_prefix = model.adds_dummy_prefix
    steps: list[normalizers.Normalizer] = []
    if model.replacements:
        steps.append(normalizers.Precompiled(model.replacements))
    if has_prefix and is_legacy:
        steps.append(normalizers.Prepend(SPACE_MARK))
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    library.normalizer = normalizers.Sequence(steps)
    if has_prefix and not is_legacy:
        # Metaspace adds its mark to a text only where none is there yet, and SentencePiece always: so
        # a space is added to a text that has none left, and becomes the mark in a second step.
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(
                    replacement=SPACE_MARK, prepend_scheme="never", split=False
                ),
            ]
        )
    back: list[decoders.Decoder] = [decoders.Replace(SPACE_MARK, " ")]
    if model.has_byte_fallback:
        back.append(decoders.ByteFallback())
    back.append(decoders.Fuse())
    if has_prefix:
        back.append(decoders.Strip(content=" ", left=1))
    library.decoder = decoders.Sequence(back)
    library.add_tokens([token.for_library() for token in added])
    before, after = frame
    if before or after:
        library.post_processor = processors.TemplateProcessing(
            single=[part[0] for part in (before, ("$A", 0), after) if part],
            special_tokens=[part for part in (before, after) if part],
        )
    return library


def first_difference(
    library: tokenizers.Tokenizer, encode: Mapping[str, Sequence[int]]
) -> str | None:
    """Return the first text that the library encodes to other ids than these; None if there is none."""
    texts = list(encode)
    found = library.encode_batch_fast(texts, add_special_tokens=False)
    return next(
        (
            text
            for text, encoding in zip(texts, found, strict=True)
            if encoding.ids != list(encode[text])
        ),
        None,
    )


def _bpe(
    model: SentencePieceModel, vocabulary: Mapping[str, int], unknown: str | None
) -> models.BPE:
    found: list[tuple[float, int, int, str, str]] = []
    for piece in model.pieces:
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED, UNUSED):
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-piece.score, -len(left), vocabulary[left], left, right))
    found.sort()
    return models.BPE(
        vocab=dict(vocabulary),
        merges=[(left, right) for _, _, _, left, right in found],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.has_byte_fallback,
    )


def _unigram(
    model: SentencePieceModel, vocabulary: Mapping[str, int], unknown: str | None
) -> models.Unigram:
    return models.Unigram(
        [(piece.text, piece.score) for piece in model.pieces],
        unk_id=None if unknown is None else vocabulary[unknown],
        byte_fallback=model.has_byte_fallback,
    )


def _bytes(value: int | bytes | None, default: bytes) -> bytes:
    return value if isinstance(value, bytes) else default


def _whole(value: int | bytes | None, default: int) -> int:
    return value if isinstance(value, int) else default
