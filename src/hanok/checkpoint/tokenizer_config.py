"""The JSON files next to a tokenizer: special and added tokens, flags, chat templates.

`tokenizer_config.json` takes precedence over `special_tokens_map.json` and `added_tokens.json`, which
newer versions of transformers no longer write. All of them may be absent.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from hanok.checkpoint.chat import DEFAULT_TEMPLATE, ChatTemplates
from hanok.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token added to the model's vocabulary, and how it is found in a text."""

    text: str
    token_id: int | None
    is_special: bool
    is_single_word: bool = False
    strips_left: bool = False
    strips_right: bool = False
    is_normalized: bool = False

    def for_library(self) -> tokenizers.AddedToken:
        """The same as the tokenizers library has it."""
        return tokenizers.AddedToken(
            self.text,
            single_word=self.is_single_word,
            lstrip=self.strips_left,
            rstrip=self.strips_right,
            normalized=self.is_normalized,
            special=self.is_special,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say together."""

    named: Mapping[str, str]
    """bos_token and the like: name → text."""

    extra: tuple[str, ...]
    """Special tokens without a name of their own."""

    added: tuple[AddedToken, ...]
    """Tokens with an id, in the order of the ids."""

    adds_bos: bool | None
    adds_eos: bool | None
    adds_prefix_space: bool | None
    is_legacy: bool
    """SentencePiece: put a space before every stretch of text between special tokens, not only
    before the first. Llama 2 was published like this, and it is the default."""

    chat_template: object

    tokenizer_class: str | None
    """The tokenizer class, of transformers or of the folder's own code, that the files name."""

    model_type: str | None
    """Of config.json."""

    def with_names(self, names: Mapping[str, str]) -> "TokenizerConfig":
        """The same settings with `names` as defaults."""
        return replace(self, named={**names, **self.named})


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """What the JSON files of a folder say together; CheckpointError where one is damaged."""
    config = _read_object(folder / "tokenizer_config.json")
    special = _read_object(folder / "special_tokens_map.json")
    model = _read_object(folder / "config.json")
    named: dict[str, str] = {}
    extra: list[str] = []
    # tokenizer_config.json takes precedence; newer versions no longer write the other file.
    for source in (config, special):
        more = source.get("extra_special_tokens")
        entries = [*source.items(), *(more.items() if isinstance(more, dict) else ())]
        for name, value in entries:
            text = _token_content(value)
            if name.endswith("_token") and text:
                named.setdefault(name, text)
        for name in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(name)
            if isinstance(values, list):
                extra += filter(None, map(_token_content, values))
    return TokenizerConfig(
        named=named,
        extra=tuple(dict.fromkeys(extra)),
        added=_read_added(folder, config, {*named.values(), *extra}),
        adds_bos=_optional_bool(config, "add_bos_token"),
        adds_eos=_optional_bool(config, "add_eos_token"),
        adds_prefix_space=_optional_bool(config, "add_prefix_space"),
        is_legacy=_optional_bool(config, "legacy") is not False,
        chat_template=config.get("chat_template"),
        tokenizer_class=_optional_text(config, "tokenizer_class")
        or _optional_text(model, "tokenizer_class"),
        model_type=_optional_text(model, "model_type"),
    )


def _read_added(folder: Path, config: dict[str, Any], special: set[str]) -> tuple[AddedToken, ...]:
    added: dict[str, AddedToken] = {}
    entries = config.get("added_tokens_decoder") or {}
    path = folder / "tokenizer_config.json"
    if not isinstance(entries, dict):
        raise CheckpointError(_not_as_expected(path, "added_tokens_decoder", entries))
    for key, entry in entries.items():
        text = _token_content(entry)
        if text is None or not key.isdecimal():
            raise CheckpointError(_not_as_expected(path, f"added_tokens_decoder[{key!r}]", entry))
        flags = entry if isinstance(entry, dict) else {}
        added[text] = AddedToken(
            text=text,
            token_id=int(key),
            is_special=bool(flags.get("special", False)) or text in special,
            is_single_word=bool(flags.get("single_word", False)),
            strips_left=bool(flags.get("lstrip", False)),
            strips_right=bool(flags.get("rstrip", False)),
            is_normalized=bool(flags.get("normalized", False)),
        )
    path = folder / "added_tokens.json"
    for text, token_id in _read_object(path).items():
        if type(token_id) is not int or token_id < 0:
            raise CheckpointError(_not_as_expected(path, repr(text), token_id))
        plain = AddedToken(text=text, token_id=token_id, is_special=text in special)
        added.setdefault(text, plain)
    return tuple(sorted(added.values(), key=lambda token: token.token_id or 0))


def _token_content(value: object) -> str | None:
    """The text of a token that is written as a string or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _optional_bool(config: dict[str, Any], name: str) -> bool | None:
    value = config.get(name)
    return value if isinstance(value, bool) else None


def _optional_text(config: dict[str, Any], name: str) -> str | None:
    value = config.get(name)
    return value if isinstance(value, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds {type(value).__name__}, not an object; fetch the file again"
        )
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}; fetch the file again") from error


def _not_as_expected(path: Path, what: str, value: object) -> str:
    return (
        f"{path}: {what} is {value!r:.80}, not what the format has there; correct it or fetch the "
        "file again"
    )


def read_templates(
    folder: Path, additional: list[Path], settings: TokenizerConfig, now: Callable[[], datetime]
) -> ChatTemplates:
    """All templates of a folder by name; of two with the same name the first source wins."""
    texts: dict[str, str] = {}
    origins: dict[str, str] = {}
    path = folder / "chat_template.json"
    sources: list[tuple[str, dict[str, str]]] = []
    for file, name in [(folder / "chat_template.jinja", DEFAULT_TEMPLATE)] + [
        (file, file.stem) for file in additional
    ]:
        if file.is_file():
            sources.append((file.name, {name: _read_text(file)}))
    in_config = _named_templates(folder / "tokenizer_config.json", settings.chat_template)
    sources.append(("of tokenizer_config.json", in_config))
    sources.append((path.name, _named_templates(path, _read_object(path).get("chat_template"))))
    for origin, found in sources:
        for name, text in found.items():
            if name not in texts:
                texts[name] = text
                origins[name] = f"{name!r} {origin}" if name != DEFAULT_TEMPLATE else origin
    variables: dict[str, object] = dict(settings.named)
    if settings.extra:
        variables["additional_special_tokens"] = list(settings.extra)
    return ChatTemplates(texts, variables=variables, now=now, origins=origins)


def _named_templates(path: Path, value: object) -> dict[str, str]:
    """Templates written as one string, as {name: text}, or as [{"name": ..., "template": ...}]."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(
        isinstance(part, str) for pair in value.items() for part in pair
    ):
        raise CheckpointError(_not_as_expected(path, "chat_template", value))
    return dict(value)
