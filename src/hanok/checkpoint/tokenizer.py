"""Text to token ids and back, from the files a checkpoint brings.

One `Tokenizer` stands before three kinds of folder: `tokenizer.json` (the tokenizers library),
`tokenizer.model` (the sentencepiece library, imported only then) and `vocab.json` + `merges.txt`
(byte-level BPE as GPT-2 was published). `open_tokenizer` decides by what is there, in this order.

Invariants: the beginning-of-sequence token stands at most once at the front, whoever asks for it
(post-processor, configuration, template or the text itself); `decode` is exactly what the stream
of the same ids gives, joined. Where the library's own decode holds no U+FFFD, it is that too.

Cost: opening reads the files once; encoding and decoding are linear. Chat templates: `chat.py`.
Streaming: `stream.py`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from hanok.checkpoint.chat import DEFAULT_TEMPLATE, ChatTemplates, RenderedChat
from hanok.checkpoint.stream import REPLACEMENT, StreamDecoder, TokenTexts
from hanok.errors import CheckpointError, RequestError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer may be made of, besides additional_chat_templates/*.jinja."""

GPT2_END_OF_TEXT = "<|endoftext|>"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


class Tokenizer:
    """One vocabulary with its special tokens and chat templates. Made by `open_tokenizer`.

    Nothing about it changes after it was made, so threads may share it; a stream belongs to one.
    """

    def __init__(
        self,
        vocabulary: "_Vocabulary",
        settings: "_Settings",
        *,
        templates: ChatTemplates,
        files: tuple[Path, ...],
    ) -> None:
        self._vocabulary = vocabulary
        self._texts = vocabulary.texts
        self._templates = templates
        self._ids = vocabulary.ids
        self.files = files
        """The files that a copy of this tokenizer needs, those that exist."""
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        """The largest id + 1. The embedding of a model may have more rows, for padding."""
        self.bos_token_id = self._named_id(settings, "bos_token")
        self.eos_token_id = self._named_id(settings, "eos_token")
        self.pad_token_id = self._named_id(settings, "pad_token")
        self.unk_token_id = self._named_id(settings, "unk_token")
        special = (*settings.named.values(), *settings.extra)
        self.special_token_ids: frozenset[int] = vocabulary.special_ids | {
            self._ids[text] for text in special if text in self._ids
        }
        """The ids that `skip_special_tokens` leaves out."""
        # A folder that says whether to add either of the two replaces the post-processor: that is
        # how published folders switch off the one in their tokenizer.json.
        self._uses_post_processor = settings.adds_bos is None and settings.adds_eos is None
        adds_bos, adds_eos = vocabulary.adds_by_itself(self.bos_token_id, self.eos_token_id)
        self._adds_bos = adds_bos if settings.adds_bos is None else settings.adds_bos
        self._adds_eos = adds_eos if settings.adds_eos is None else settings.adds_eos

    def _named_id(self, settings: "_Settings", name: str) -> int | None:
        text = settings.named.get(name)
        return None if text is None else self._ids.get(text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens spelled out in it become their ids.

        With `add_special_tokens`, what the folder wants at the front and the end is added. The
        beginning-of-sequence token is then there once, even if the text begins with it as well.
        """
        try:
            # The libraries say of half a surrogate pair that it is no string, or stop the process.
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate "
                "pair, which no encoding has: repair the text before it is sent"
            ) from error
        if not add_special_tokens:
            return self._vocabulary.encode(text)
        if self._uses_post_processor:
            ids = self._vocabulary.encode_processed(text)
        else:
            ids = self._vocabulary.encode(text)
        if self._adds_eos and self.eos_token_id is not None and ids[-1:] != [self.eos_token_id]:
            ids.append(self.eos_token_id)
        if self._adds_bos and self.bos_token_id is not None:
            ids = [self.bos_token_id, *_without_leading(ids, self.bos_token_id)]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`: the pieces of their stream, joined.

        An id without a token (a padding row of the embedding) adds nothing. Bytes that are no
        character become U+FFFD, and no valid character beside them is lost.
        """
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        pieces = [stream.push(token_id) for token_id in ids]
        return "".join(pieces) + stream.finish()

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes one id at a time, for one sequence."""
        return self._texts.stream(self.special_token_ids if skip_special_tokens else frozenset())

    def token_text(self, token_id: int) -> str:
        """The text of one token as it reads in the middle of a text; a part of a character as U+FFFD.

        Special tokens are spelled out. RequestError for an id without a token.
        """
        if not self._texts.is_known(token_id):
            raise RequestError(
                f"there is no token {token_id}: ids go from 0 to {self.vocab_size - 1}, and padding "
                "rows of an embedding have no text"
            )
        return self._texts.token_text(token_id)

    def token_to_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells `text` (its own spelling), or None."""
        return self._ids.get(text)

    @property
    def chat_template_names(self) -> tuple[str, ...]:
        """The names that `template` may be, in the order in which they were found."""
        return self._templates.names

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> str:
        """A conversation as text; RequestError where there is no template or it refuses.

        `template` is a name from `chat_template_names` or the text of a template; without it the
        folder's "tool_use" serves where there are tools, else its "default".
        """
        return self._templates.render(
            messages,
            template=template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )

    def render_chat_with_spans(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> RenderedChat:
        """A conversation as text with the character ranges that `{% generation %}` encloses."""
        return self._templates.render_with_spans(
            messages,
            template=template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            template_variables=template_variables,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The ids of `render_chat`. The template alone decides about special tokens.

        A beginning-of-sequence token is there if the template writes one, and then once.
        """
        rendered = self.render_chat(
            messages,
            template=template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )
        ids = self.encode(rendered, add_special_tokens=False)
        if self.bos_token_id is not None and ids[:1] == [self.bos_token_id]:
            ids = [self.bos_token_id, *_without_leading(ids, self.bos_token_id)]
        return ids


def open_tokenizer(folder: Path, *, now: Callable[[], datetime] = datetime.now) -> Tokenizer:
    """The tokenizer of a checkpoint folder. CheckpointError where files are missing or damaged.

    `now` is the clock that chat templates read through `strftime_now`.
    """
    settings = _read_settings(folder)
    vocabulary: _Vocabulary
    if (folder / "tokenizer.json").is_file():
        vocabulary = _JsonVocabulary(_read_library_file(folder / "tokenizer.json"), settings)
    elif (folder / "tokenizer.model").is_file():
        vocabulary = _SentencePieceVocabulary(folder / "tokenizer.model", settings)
        settings = vocabulary.complete(settings)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        library = _read_byte_level_files(folder / "vocab.json", folder / "merges.txt", settings)
        settings = _complete_as_gpt2(settings, library)
        vocabulary = _JsonVocabulary(library, settings)
    else:
        raise CheckpointError(_nothing_found(folder))
    additional = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    present = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return Tokenizer(
        vocabulary,
        settings,
        templates=_read_templates(folder, additional, settings, now),
        files=(*present, *additional),
    )


def _nothing_found(folder: Path) -> str:
    looked_for = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
    if not folder.is_dir():
        return f"{folder} is not a folder; looked in it for {looked_for}. Pass a checkpoint folder"
    names = sorted(entry.name for entry in folder.iterdir())
    there = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return (
        f"{folder} has no tokenizer: looked for {looked_for}; there is {there or 'nothing'}. Copy the "
        "tokenizer files of the published model into the folder"
    )


# What the JSON files say


@dataclass(frozen=True, slots=True, kw_only=True)
class _AddedToken:
    """A token besides those of the model's vocabulary, and how it is found in a text."""

    text: str
    token_id: int | None
    is_special: bool
    is_single_word: bool = False
    strips_left: bool = False
    strips_right: bool = False
    is_normalized: bool = False

    def for_library(self) -> tokenizers.AddedToken:
        return tokenizers.AddedToken(
            self.text,
            single_word=self.is_single_word,
            lstrip=self.strips_left,
            rstrip=self.strips_right,
            normalized=self.is_normalized,
            special=self.is_special,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say together."""

    named: Mapping[str, str]
    """bos_token and the like: name → text."""

    extra: tuple[str, ...]
    """Special tokens without a name of their own."""

    added: tuple[_AddedToken, ...]
    """Tokens with an id, in the order of the ids."""

    adds_bos: bool | None
    adds_eos: bool | None
    adds_prefix_space: bool | None
    is_legacy: bool
    """SentencePiece: put a space before every stretch of text between special tokens, not only
    before the first. Llama 2 was published so, and absent means so."""

    chat_template: object


def _read_settings(folder: Path) -> _Settings:
    config = _read_object(folder / "tokenizer_config.json")
    special = _read_object(folder / "special_tokens_map.json")
    named: dict[str, str] = {}
    extra: list[str] = []
    # What tokenizer_config.json says comes first; newer writers keep the other file no longer.
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
    return _Settings(
        named=named,
        extra=tuple(dict.fromkeys(extra)),
        added=_read_added(folder, config, {*named.values(), *extra}),
        adds_bos=_optional_bool(config, "add_bos_token"),
        adds_eos=_optional_bool(config, "add_eos_token"),
        adds_prefix_space=_optional_bool(config, "add_prefix_space"),
        is_legacy=_optional_bool(config, "legacy") is not False,
        chat_template=config.get("chat_template"),
    )


def _read_added(folder: Path, config: dict[str, Any], special: set[str]) -> tuple[_AddedToken, ...]:
    added: dict[str, _AddedToken] = {}
    entries = config.get("added_tokens_decoder") or {}
    path = folder / "tokenizer_config.json"
    if not isinstance(entries, dict):
        raise CheckpointError(_not_as_expected(path, "added_tokens_decoder", entries))
    for key, entry in entries.items():
        text = _token_content(entry)
        if text is None or not key.isdecimal():
            raise CheckpointError(_not_as_expected(path, f"added_tokens_decoder[{key!r}]", entry))
        flags = entry if isinstance(entry, dict) else {}
        added[text] = _AddedToken(
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
        plain = _AddedToken(text=text, token_id=token_id, is_special=text in special)
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


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds {type(value).__name__}, not an object; fetch the file again"
        )
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}; fetch the file again") from error


def _not_as_expected(path: Path, what: str, value: object) -> str:
    return (
        f"{path}: {what} is {value!r:.80}, not what the format has there; correct it or fetch the "
        "file again"
    )


# Chat templates


def _read_templates(
    folder: Path, additional: list[Path], settings: _Settings, now: Callable[[], datetime]
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


# Vocabularies


class _Vocabulary(Protocol):
    """What `Tokenizer` needs of a library."""

    @property
    def ids(self) -> Mapping[str, int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def texts(self) -> TokenTexts: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_processed(self, text: str) -> list[int]:
        """`encode`, then what the files themselves add (a post-processor)."""

    def adds_by_itself(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        """Whether BOS and EOS are added where tokenizer_config.json does not say."""


def _without_leading(ids: list[int], token_id: int) -> list[int]:
    count = next((place for place, other in enumerate(ids) if other != token_id), len(ids))
    return ids[count:]


def _find_anchor(
    decode: Callable[[Sequence[int]], str], candidates: Iterable[int]
) -> tuple[int, ...]:
    """One id that reads as plain text, whatever stands behind it."""
    for token_id in candidates:
        text = decode((token_id,))
        if text.strip() == text != "" and REPLACEMENT not in text:
            return (token_id,)
    return ()


# tokenizer.json, and vocab.json with merges.txt


def _read_library_file(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises the bare Exception for everything that its parser refuses.
        raise CheckpointError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__}: {error}; fetch the file "
            "again, or install the version of tokenizers it was written with"
        ) from error


def _read_byte_level_files(vocab: Path, merges: Path, settings: _Settings) -> tokenizers.Tokenizer:
    try:
        model = BPE.from_file(str(vocab), str(merges))
    except Exception as error:
        raise CheckpointError(
            f"{vocab} and {merges.name} cannot be read as byte-level BPE: {error}; fetch both again"
        ) from error
    library = tokenizers.Tokenizer(model)
    prefix = bool(settings.adds_prefix_space)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    return library


def _complete_as_gpt2(settings: _Settings, library: tokenizers.Tokenizer) -> _Settings:
    """The names that GPT-2's own folder leaves to the reader."""
    if library.token_to_id(GPT2_END_OF_TEXT) is None:
        return settings
    names = ("bos_token", "eos_token", "unk_token")
    return _with_names(settings, dict.fromkeys(names, GPT2_END_OF_TEXT))


def _with_names(settings: _Settings, names: Mapping[str, str]) -> _Settings:
    return replace(settings, named={**names, **settings.named})


class _JsonVocabulary:
    """A vocabulary of the tokenizers library."""

    def __init__(self, library: tokenizers.Tokenizer, settings: _Settings) -> None:
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._add(settings)
        self.ids: Mapping[str, int] = library.get_vocab(with_added_tokens=True)
        added = library.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._spellings = {token_id: text for text, token_id in self.ids.items()}
        kinds = _decoder_kinds(library)
        self._is_byte_level = kinds == {"ByteLevel"}
        self._has_byte_tokens = "ByteFallback" in kinds
        self._bytes: dict[int, bytes] = {}
        self._alphabet = _byte_alphabet()
        candidates = (
            token_id
            for token_id, text in sorted(self._spellings.items())
            if token_id not in added and not _BYTE_TOKEN.fullmatch(text)
        )
        self.texts = TokenTexts(
            decode=self._decode,
            token_bytes=self._token_bytes,
            is_known=self._spellings.__contains__,
            is_bytes_only=self._is_byte_level,
            can_split_characters="ByteLevel" in kinds,
            anchor=() if self._is_byte_level else _find_anchor(self._decode, candidates),
        )

    def _add(self, settings: _Settings) -> None:
        """Add what tokenizer_config.json lists beyond tokenizer.json, at the next free ids."""
        library = self._library
        new = [token for token in settings.added if library.token_to_id(token.text) is None]
        library.add_tokens([token.for_library() for token in settings.added])
        for token in new:
            token_id = library.token_to_id(token.text)
            if token_id != token.token_id:
                raise CheckpointError(
                    f"token {token.text!r} is {token.token_id} in tokenizer_config.json or "
                    f"added_tokens.json, but the vocabulary would give it {token_id}: files of "
                    "different models; fetch the tokenizer files again"
                )
        known = {token.content for token in library.get_added_tokens_decoder().values()}
        names = dict.fromkeys((*settings.named.values(), *settings.extra))
        library.add_special_tokens(
            [
                tokenizers.AddedToken(text, normalized=False, special=True)
                for text in names
                if text not in known
            ]
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_processed(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=True).ids
        return ids

    def adds_by_itself(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        frame = self.encode_processed("")
        adds_bos = bos is not None and frame[:1] == [bos]
        return adds_bos, eos is not None and frame[int(adds_bos) :][-1:] == [eos]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._library.decode(list(ids), skip_special_tokens=False)
        return text

    def _token_bytes(self, token_id: int) -> bytes | None:
        if not self._is_byte_level and not self._has_byte_tokens:
            return None
        spelling = self._spellings[token_id]
        if not self._is_byte_level:
            found = _BYTE_TOKEN.fullmatch(spelling)
            return bytes.fromhex(found[1]) if found else None
        if token_id not in self._bytes:
            try:
                data = bytes(self._alphabet[character] for character in spelling)
            except KeyError:
                # A token that was added as text, not in the alphabet of bytes.
                data = spelling.encode()
            self._bytes[token_id] = data
        return self._bytes[token_id]


def _decoder_kinds(library: tokenizers.Tokenizer) -> set[str]:
    """The types in the decoder of a tokenizer, those inside sequences included."""
    pending = [json.loads(library.to_str())["decoder"]]
    kinds: set[str] = set()
    while pending:
        decoder = pending.pop() or {}
        if decoder.get("type") == "Sequence":
            pending += decoder["decoders"]
        elif decoder:
            kinds.add(decoder["type"])
    return kinds


def _byte_alphabet() -> dict[str, int]:
    """Character → byte, as byte-level BPE writes bytes.

    Printable characters of Latin-1 stand for themselves, the other bytes for U+0100 onwards, in
    order (Radford et al., 2019).
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(visible))
    return {
        **{chr(byte): byte for byte in visible},
        **{chr(0x100 + place): byte for place, byte in enumerate(hidden)},
    }


# tokenizer.model


class _SentencePieceVocabulary:
    """A vocabulary of the sentencepiece library, with special tokens cut out of the text first."""

    def __init__(self, path: Path, settings: _Settings) -> None:
        # Imported here: most folders need it not, and where it is missing they still open.
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            # A RuntimeError or an OSError, according to the version.
            raise CheckpointError(
                f"{path} cannot be read as a SentencePiece model: {error}; fetch the file again"
            ) from error
        # A message in wire format may be continued: its last value wins. Field 3 is
        # normalizer_spec, whose field 3 is add_dummy_prefix, here set to false.
        bare_model = self._model.serialized_model_proto() + b"\x1a\x02\x18\x00"
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=bare_model)
        if settings.adds_prefix_space is False:
            self._model = self._bare
        self._is_legacy = settings.is_legacy
        self._strips_first_space = self._model.encode("a") != self._bare.encode("a")
        size = self._model.get_piece_size()
        pieces = {token_id: self._model.id_to_piece(token_id) for token_id in range(size)}
        self._data = {
            token_id: bytes.fromhex(piece[3:-1])
            for token_id, piece in pieces.items()
            if self._model.is_byte(token_id)
        }
        control = [
            _AddedToken(text=piece, token_id=token_id, is_special=True)
            for token_id, piece in pieces.items()
            if self._model.is_control(token_id) or self._model.is_unknown(token_id)
        ]
        self._added = _number_added(control, settings, {text: i for i, text in pieces.items()})
        texts = {token.text: token_id for token_id, token in self._added.items()}
        self.special_ids = frozenset(i for i, token in self._added.items() if token.is_special)
        pieces |= {token_id: token.text for token_id, token in self._added.items()}
        self.ids: Mapping[str, int] = {text: token_id for token_id, text in pieces.items()} | texts
        self._pieces = pieces
        # The longest first: an alternation takes the first that fits.
        longest_first = sorted(self._added.values(), key=lambda token: -len(token.text))
        self._cut = re.compile("|".join(map(_token_pattern, longest_first)) or "(?!)")
        plain = (i for i in range(size) if i not in self._added and i not in self._data)
        self.texts = TokenTexts(
            decode=self._decode,
            token_bytes=self._data.get,
            is_known=pieces.__contains__,
            is_bytes_only=False,
            can_split_characters=False,
            anchor=_find_anchor(self._decode, plain),
        )

    def complete(self, settings: _Settings) -> _Settings:
        """`settings` with the names that the model itself knows."""
        model = self._model
        ids = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "unk_token": model.unk_id(),
        }
        names = {name: self._pieces[token_id] for name, token_id in ids.items() if token_id >= 0}
        return _with_names(settings, names)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for begin, part in self._parts(text):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                model = self._model if begin == 0 or self._is_legacy else self._bare
                ids += model.encode(part)
        return ids

    def encode_processed(self, text: str) -> list[int]:
        return self.encode(text)

    def adds_by_itself(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        """As every published reader of such a folder: a beginning, no end."""
        return bos is not None, False

    def _parts(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Stretches of text and ids of added tokens between them, each with where it begins."""
        begin = 0
        for found in self._cut.finditer(text):
            token_id = self.ids[found[0]]
            token = self._added[token_id]
            before = text[begin : found.start()]
            yield begin, before.rstrip() if token.strips_left else before
            yield found.start(), token_id
            begin = found.end()
            if token.strips_right:
                begin = len(text) - len(text[begin:].lstrip())
        yield begin, text[begin:]

    def _decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        for is_data, group in groupby(ids, self._data.__contains__):
            if is_data:
                parts.append(b"".join(map(self._data.__getitem__, group)).decode(errors="replace"))
            else:
                parts += (self._piece_text(token_id) for token_id in group)
        text = "".join(parts)
        return text.removeprefix(" ") if self._strips_first_space else text

    def _piece_text(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        return piece if token_id in self._added else piece.replace(_SPACE_MARK, " ")


def _number_added(
    control: Iterable[_AddedToken], settings: _Settings, pieces: Mapping[str, int]
) -> dict[int, _AddedToken]:
    """Every token that is found in the text before SentencePiece sees it, by id.

    A special token that no file numbers gets the id of the piece with its text, else the next free.
    """
    added = {token.token_id: token for token in (*control, *settings.added)}
    numbered = {token.text: token_id for token_id, token in added.items()}
    following = max([*pieces.values(), *(i for i in added if i is not None)], default=-1) + 1
    for text in dict.fromkeys((*settings.named.values(), *settings.extra)):
        if text in numbered:
            continue
        token_id = pieces.get(text, following)
        following += token_id == following
        added[token_id] = _AddedToken(text=text, token_id=token_id, is_special=True)
    return {token_id: token for token_id, token in added.items() if token_id is not None}


def _token_pattern(token: _AddedToken) -> str:
    text = re.escape(token.text)
    return rf"(?<!\w){text}(?!\w)" if token.is_single_word else text
