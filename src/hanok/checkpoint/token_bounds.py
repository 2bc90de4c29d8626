"""A lower bound on the number of tokens of a text, from its length alone.

With it a server refuses a text that cannot fit without tokenizing it. The bound is the text's length
divided by the longest text that one token of the vocabulary can represent. It holds only if no step
of the tokenizer shortens a text by an unknown amount, so every step is examined: if one is not known to
keep its text, there is no bound.

Steps that shorten: an unknown character that is dropped or joined with its neighbours (excluded by
requiring all 256 bytes), Unicode normalization (by a known factor), added tokens that absorb adjacent
spaces (spaces are then not counted), pre-tokenizers that remove the separator (no bound).
"""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hanok.checkpoint.protobuf import fields
from hanok.checkpoint.tokenizer_config import AddedToken

COMPOSITION = 6
"""By how much Unicode normalization shortens a text at most, in bytes or in characters.

Each character of the text becomes one or more when decomposed, and takes at most 4 bytes in UTF-8;
at most 4 decomposed characters become one. Of such compositions those of 3 characters have 2 bytes
or more, those of 4 have 3: 3 * 4 / 2 is the most.
"""

_KEEPS_TEXT = frozenset(
    {"ByteLevel", "Digits", "Metaspace", "Punctuation", "UnicodeScripts", "Split"}
)
NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
_FORMS: tuple[NormalForm, ...] = ("NFC", "NFD", "NFKC", "NFKD")


@dataclass(frozen=True, slots=True)
class TokenBound:
    """A lower bound on the number of tokens of any text."""

    longest: float
    """Units of text that one token can represent at most."""

    counts_bytes: bool
    """The units are bytes of UTF-8; else they are characters."""

    counts_spaces: bool
    """False if an added token absorbs any number of adjacent spaces."""

    shrinks_by: float = 1
    """The factor by which normalization shortens a text at most."""

    forms: tuple[NormalForm, ...] = ()
    """The Unicode normal forms that are the whole normalization: a text in them stays unchanged."""

    def fewest(self, text: str) -> int:
        """Return a lower bound on the tokens of any encoding of `text`. Linear, at copying speed."""
        shrinks_by = 1 if self.forms and _stays(text, self.forms) else self.shrinks_by
        if not self.counts_spaces:
            text = "".join(text.split())
        units = len(text.encode(errors="replace")) if self.counts_bytes else len(text)
        return -int(-units // (self.longest * shrinks_by))


def library_bound(
    parts: Mapping[str, Any], vocabulary: Iterable[str], alphabet: Iterable[str]
) -> TokenBound | None:
    """The bound of a tokenizer.json, or None where it has none.

    `parts` is the JSON of a tokenizer (its model's vocabulary is not read), `vocabulary` the
    spellings of all its tokens, `alphabet` the characters that stand for bytes.
    """
    spellings = set(vocabulary)
    added = [entry["content"] for entry in parts["added_tokens"]]
    is_byte_level = "ByteLevel" in _types(parts["pre_tokenizer"], "pretokenizers")
    model = parts["model"]
    steps = _types(parts["normalizer"], "normalizers")
    shrinks = _shrinks_by(parts["normalizer"])
    if shrinks is None or model["type"] != "BPE" or not _cuts_only(parts["pre_tokenizer"]):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if is_byte_level:
        has_all = spellings.issuperset(alphabet)
    elif model.get("byte_fallback"):
        has_all = spellings.issuperset(f"<0x{byte:02X}>" for byte in range(256))
    else:
        has_all = model.get("unk_token") in spellings and not model.get("fuse_unk")
    # A special token that is matched in the normalized text has further spellings.
    is_respelled = shrinks > 1 and any(
        e["special"] and e["normalized"] for e in parts["added_tokens"]
    )
    if not has_all or is_respelled:
        return None
    lengths = map(len, spellings)
    # Added tokens are spelled as text; in a byte-level vocabulary the others have a character per byte.
    of_added = (len(text.encode()) if is_byte_level else len(text) for text in added)
    return TokenBound(
        longest=max((*lengths, *of_added), default=1),
        counts_bytes=is_byte_level,
        counts_spaces=not any(
            entry["lstrip"] or entry["rstrip"] for entry in parts["added_tokens"]
        ),
        shrinks_by=shrinks,
        forms=tuple(form for form in _FORMS if form in steps) if set(steps) <= set(_FORMS) else (),
    )


def sentencepiece_bound(
    proto: bytes, pieces: Iterable[str], added: Iterable[AddedToken], *, has_bytes: bool
) -> TokenBound | None:
    """The bound of a SentencePiece model (its file's bytes), or None where it has none."""
    # A ModelProto's field 3 is the NormalizerSpec: its field 2 is a table of replacements, field 4
    # whether extra spaces are removed, which is the default.
    table, removes_spaces = b"", 1
    for number, value in fields(proto):
        if number == 3 and isinstance(value, bytes):
            for inner, setting in fields(value):
                if inner == 2 and isinstance(setting, bytes):
                    table = setting
                elif inner == 4 and isinstance(setting, int):
                    removes_spaces = setting
    if table or removes_spaces or not has_bytes:
        return None
    tokens = tuple(added)
    return TokenBound(
        longest=max(map(len, (*pieces, *(token.text for token in tokens))), default=1),
        counts_bytes=False,
        counts_spaces=not any(token.strips_left or token.strips_right for token in tokens),
    )


def _stays(text: str, forms: tuple[NormalForm, ...]) -> bool:
    """Whether a text is in all the normal forms, in any version of Unicode.

    Forms of assigned characters never change; characters unassigned here may be composed elsewhere.
    """
    return all(unicodedata.is_normalized(form, text) for form in forms) and all(
        unicodedata.category(character) != "Cn" for character in set(text)
    )


def _types(part: Mapping[str, Any] | None, members: str) -> list[str]:
    """The types of a step of a tokenizer.json, those inside sequences included."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part["type"]]
    return [kind for inner in part[members] for kind in _types(inner, members)]


def _cuts_only(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether the splits keep all of the text."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_cuts_only, pre_tokenizer["pretokenizers"]))
    return pre_tokenizer["type"] in _KEEPS_TEXT and pre_tokenizer.get("behavior") != "Removed"


def _shrinks_by(normalizer: Mapping[str, Any] | None) -> float | None:
    """The factor by which a text may be shortened at most; None if it is unknown."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return 1
    if normalizer["type"] == "Sequence":
        product = 1.0
        for inner in normalizer["normalizers"]:
            factor = _shrinks_by(inner)
            if factor is None:
                return None
            product *= factor
        return product
    if normalizer["type"] in _FORMS:
        return COMPOSITION
    pattern = normalizer.get("pattern", {}).get("String")
    content = normalizer.get("content")
    if normalizer["type"] == "Replace" and pattern and content:
        return max(1, len(pattern.encode()) / len(content.encode()), len(pattern) / len(content))
    return None
