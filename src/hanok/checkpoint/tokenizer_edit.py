"""Adds tokens to a tokenizer and removes them, as changes of its files that are not written yet.

Every file that names tokens changes with the others: tokenizer.json, tokenizer_config.json with its
`added_tokens_decoder`, and of the older files special_tokens_map.json and added_tokens.json where they
are there. New ids follow the largest one. A SentencePiece model is never edited: the folder gets a
tokenizer.json with the same ids, or a refusal. Text around a changed value is kept as it is.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hanok.checkpoint.tokenizer_config import AddedToken
from hanok.checkpoint.writer import json_bytes
from hanok.errors import CheckpointError, OptionError

LIBRARY, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"
"""transformers' class for a tokenizer.json that holds every rule. By LlamaTokenizer's own rules texts
that begin with a space would get other ids than by the SentencePiece model."""
LISTS = ("additional_special_tokens", "extra_special_tokens")
_ADDED_KEY = re.compile(r'"added_tokens"\s*:\s*(?=\[)')


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a tokenizer's files say, as far as it concerns its tokens."""

    library: bytes
    """Its tokenizer.json, or one with the same ids."""
    replaces_sentencepiece: bool
    """Whether the tokenizer.json is made of a SentencePiece model, and is not there yet."""
    objects: Mapping[str, Mapping[str, Any]]
    """The JSON files beside it that are there, by name."""
    added: Sequence[AddedToken]
    """All tokens that are found in a text before the vocabulary's own."""
    named: Mapping[str, str]
    """eos_token and the like: name → text."""
    ids: Mapping[str, int]
    """Every token's spelling → id."""

    @cached_property
    def num_ids(self) -> int:
        """The largest id + 1."""
        return max(self.ids.values(), default=-1) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerEdit:
    """What changes of a tokenizer."""

    contents: Mapping[str, bytes]
    """The files that change, by their names: what they will be."""
    new: Mapping[str, int]
    """Tokens that get an id."""
    known: Mapping[str, int]
    """Tokens that the vocabulary has already, and that are now found in every text, by these rules."""
    same: tuple[str, ...] = ()
    """Tokens that are there already, and need no other rules."""


def with_tokens(
    files: TokenizerFiles,
    tokens: Sequence[AddedToken],
    *,
    roles: Mapping[str, str] | None = None,
    has_legacy_files: bool = False,
) -> TokenizerEdit:
    """Return the files of a tokenizer with more tokens; those that are there keep their rules.

    `roles` names tokens: "eos_token" and the like → text. With `has_legacy_files`,
    special_tokens_map.json and added_tokens.json are written even where they are not there. Raises
    OptionError for texts that can be no token, UnsupportedError where a SentencePiece model cannot be
    written as a tokenizer.json.
    """
    _check_texts(tokens)
    _check_roles(roles or {}, files, tokens)
    # Tokens that only tokenizer_config.json names have ids too.
    entries = {token.text: _entry(token) for token in files.added}
    entries |= {entry["content"]: entry for entry in _listed(files.library)}
    new: dict[str, int] = {}
    known: dict[str, int] = {}
    same: list[str] = []
    for token in tokens:
        token_id = files.ids.get(token.text, files.num_ids + len(new))
        old = entries.get(token.text)
        entry = _with_rules(_entry(replace(token, token_id=token_id)), old or {})
        if old == entry:
            same.append(token.text)
        else:
            (known if token.text in files.ids else new)[token.text] = token_id
            entries[token.text] = entry
    contents: dict[str, bytes] = {}
    if new or known:
        listed = sorted(entries.values(), key=lambda entry: int(entry["id"]))
        contents[LIBRARY] = _with_listed(files.library, listed)
        added = [entries[text] for text in (*new, *known)]
        contents |= _with_others(files, added, has_legacy_files=has_legacy_files)
    if roles:
        contents |= _with_roles(files, contents, roles)
    return TokenizerEdit(contents=contents, new=new, known=known, same=tuple(same))


def without_tokens(files: TokenizerFiles, texts: Sequence[str]) -> TokenizerEdit:
    """Return the files of a tokenizer without its last added tokens.

    Raises OptionError where they are not its last ones, are pieces of the vocabulary itself, or have a
    role such as that of the end token: ids before others cannot be given back.
    """
    library = files.library
    listed = _listed(library)
    entries = {entry["content"]: entry for entry in listed}
    ids = {}
    for text in texts:
        token_id = files.ids.get(text)
        if token_id is None:
            raise OptionError(f"{text!r} is no token of this vocabulary, so it cannot be removed.")
        ids[text] = token_id
    last = range(files.num_ids - len(ids), files.num_ids)
    if sorted(ids.values()) != list(last):
        after = [
            f"{text!r} ({token_id})"
            for text, token_id in sorted(files.ids.items(), key=lambda item: item[1])
            if token_id > min(ids.values()) and text not in ids
        ]
        raise OptionError(
            "only the last tokens can be removed, since ids stay: "
            f"{', '.join(after[:8])} would have to go as well."
        )
    in_model = [text for text in ids if text not in entries or _is_in_model(library, text)]
    if in_model:
        raise OptionError(
            f"{', '.join(map(repr, in_model))}: part of the vocabulary itself and not added to it, so "
            "it cannot be removed."
        )
    roles = {text: name for name, text in files.named.items()}
    if used := [f"{text!r} is the {roles[text]}" for text in ids if text in roles]:
        raise OptionError(f"{', '.join(used)}: give that role to another token first.")
    contents = {LIBRARY: _with_listed(library, [e for e in listed if e["content"] not in ids])}
    for name, value in files.objects.items():
        changed = _without(value, ids)
        if name == ADDED:
            changed = {key: item for key, item in value.items() if key not in ids}
        if changed != value:
            contents[name] = json_bytes(changed)
    return TokenizerEdit(contents=contents, new={}, known={})


def added_tokens_text(library: bytes) -> str:
    """Return a tokenizer.json's list of added tokens, a value on each line."""
    return json.dumps(_listed(library), indent=2, ensure_ascii=False)


def _check_texts(tokens: Sequence[AddedToken]) -> None:
    texts = [token.text for token in tokens]
    for text in texts:
        if not text or text.isspace():
            raise OptionError(f"{text!r} cannot be a token: it has to be more than spaces.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise OptionError(f"{text!r} cannot be a token: half a surrogate pair is not text.")
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise OptionError(f"{', '.join(map(repr, twice))} given more than once.")


def _check_roles(
    roles: Mapping[str, str], files: TokenizerFiles, tokens: Sequence[AddedToken]
) -> None:
    known = {*files.ids, *(token.text for token in tokens)}
    for role, text in roles.items():
        if text not in known:
            raise OptionError(f"{role} {text!r} is no token. Add it, or choose one that is there.")


def _entry(token: AddedToken) -> dict[str, Any]:
    """Return a token as tokenizer.json lists it."""
    return {
        "id": token.token_id,
        "content": token.text,
        "single_word": token.is_single_word,
        "lstrip": token.strips_left,
        "rstrip": token.strips_right,
        "normalized": token.is_normalized,
        "special": token.is_special,
    }


def _with_rules(entry: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with the rules of an older one as well: a special token stays special."""
    merged = {
        key: value or old.get(key, False) if isinstance(value, bool) else value
        for key, value in entry.items()
    }
    if merged["special"] and not old.get("special"):
        # The tokenizers library does not leave out normalized ones where it decodes.
        merged["normalized"] = False
    return merged


def _listed(library: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_span(library.decode())[1])
    return found


def _span(text: str) -> tuple[int, str]:
    """Return where the list of added tokens of a tokenizer.json begins, and its text."""
    # It comes before the vocabulary, whose texts could look like anything.
    found = _ADDED_KEY.search(text)
    if found is None:
        raise CheckpointError(
            f"{LIBRARY} has no list of added tokens, so it was not written by the tokenizers library. "
            "Fetch it again."
        )
    _, end = json.JSONDecoder().raw_decode(text, found.end())
    return found.end(), text[found.end() : end]


def _with_listed(library: bytes, listed: Sequence[Mapping[str, Any]]) -> bytes:
    text = library.decode()
    start, old = _span(text)
    lines = json.dumps(list(listed), indent=2, ensure_ascii=False)
    if "\n" not in old and listed and "\n" not in text[:start]:
        lines = json.dumps(list(listed), ensure_ascii=False, separators=(",", ":"))
    return (text[:start] + lines.replace("\n", "\n  ") + text[start + len(old) :]).encode()


def _is_in_model(library: bytes, text: str) -> bool:
    vocabulary = json.loads(library)["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram's pieces with their scores
        return any(piece == text for piece, _ in vocabulary)
    return text in vocabulary


def _with_others(
    files: TokenizerFiles, added: Iterable[Mapping[str, Any]], *, has_legacy_files: bool
) -> dict[str, bytes]:
    """Return the files besides tokenizer.json that list added tokens."""
    contents: dict[str, bytes] = {}
    config = dict(files.objects.get(CONFIG, {}))
    if files.replaces_sentencepiece:
        config["tokenizer_class"] = PLAIN_CLASS
        contents[CONFIG] = json_bytes(config)
    if isinstance(config.get("added_tokens_decoder"), dict):
        flags = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in added
        }
        decoder = config["added_tokens_decoder"] | flags
        ordered = dict(sorted(decoder.items(), key=lambda item: int(item[0])))
        contents[CONFIG] = json_bytes({**config, "added_tokens_decoder": ordered})
    legacy = files.objects.get(ADDED)
    if legacy or has_legacy_files:
        ids = {token.text: token.token_id for token in files.added}
        ids = {**(legacy or ids), **{entry["content"]: entry["id"] for entry in added}}
        contents[ADDED] = json_bytes(dict(sorted(ids.items(), key=lambda item: item[1] or 0)))
    if has_legacy_files and SPECIAL_MAP not in files.objects:
        contents[SPECIAL_MAP] = json_bytes(dict(files.named))
    return contents


def _with_roles(
    files: TokenizerFiles, contents: Mapping[str, bytes], roles: Mapping[str, str]
) -> dict[str, bytes]:
    """Return the files that say which token has which role."""
    found = {}
    for name in (CONFIG, SPECIAL_MAP):
        if name != CONFIG and name not in files.objects and name not in contents:
            continue
        value = dict(files.objects.get(name, {}))
        if name in contents:
            value = json.loads(contents[name])
        for role, text in roles.items():
            old = value.get(role)
            value[role] = {**old, "content": text} if isinstance(old, dict) else text
        found[name] = json_bytes(value)
    return found


def _without(value: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the object of a tokenizer file without some tokens."""
    kept = dict(value)
    decoder = kept.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        numbers = {str(token_id) for token_id in ids.values()}
        kept["added_tokens_decoder"] = {k: v for k, v in decoder.items() if k not in numbers}
    for name in LISTS:
        if isinstance(kept.get(name), list):
            kept[name] = [item for item in kept[name] if _content(item) not in ids]
    return kept


def _content(item: object) -> object:
    return item.get("content") if isinstance(item, dict) else item
