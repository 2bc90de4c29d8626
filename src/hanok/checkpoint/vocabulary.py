"""The libraries that implement vocabularies, under one interface.

`LibraryVocabulary` is the tokenizers library (`tokenizer.json`, and what `byte_level.py` and
`ranks.py` make of other files), `SentencePieceVocabulary` the sentencepiece library
(`tokenizer.model`), with special tokens cut out of the text first.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tokenizers

from hanok.checkpoint.byte_level import NO_CLASS, Cuts, byte_alphabet
from hanok.checkpoint.protobuf import fields
from hanok.checkpoint.sentencepiece_json import first_difference, read_model, to_library
from hanok.checkpoint.stream import REPLACEMENT, TokenTexts
from hanok.checkpoint.token_bounds import TokenBound, library_bound, sentencepiece_bound
from hanok.checkpoint.tokenizer_config import AddedToken, TokenizerConfig
from hanok.errors import CheckpointError, UnsupportedError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"

LIBRARY_SAMPLES = (
    " a leading space,  two, a tab\tand a\nline break\r\n\n",
    "Zoë's café: 3.14159 × 10⁻⁷ — ﬁne “quotes” … №½",
    "한국어 문장과 日本語の文、中文字符，русский текст, عربي, עברית, हिन्दी, ไทย",
    "\u200b\ufeff \x00 \x7f e\u0301 👩\u200d👩\u200d👧",
    "def f(x):\n    return {'a': [x for x in range(10)], \"b\": x ** 2}\n",
    "",
    " ",
    "a",
)
"""Texts that a tokenizer.json made of a SentencePiece model is tried on, besides all its pieces."""
_PLAIN_CLASSES = frozenset(
    {
        "LlamaTokenizer",
        "CodeLlamaTokenizer",
        "GemmaTokenizer",
        "MistralCommonTokenizer",
        "MistralCommonBackend",
    }
)
"""Classes whose ids are those of the SentencePiece model, with the tokens that the files add."""


class Located(NamedTuple):
    """The ids of a text, and where each token lies in it."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """(start, end) of each token in characters; tokens that share a character have it in common."""


class Vocabulary(Protocol):
    """What `Tokenizer` needs from a library."""

    @property
    def ids(self) -> Mapping[str, int]:
        """Every token's own spelling → id."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""

    @property
    def texts(self) -> TokenTexts:
        """What a stream needs."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens spelled out in it included, with nothing added."""

    def encode_processed(self, text: str) -> list[int]:
        """`encode`, then what the files themselves add (a post-processor)."""

    def encode_located(self, texts: Sequence[str]) -> list[Located]:
        """`encode` of several texts, with the places of their tokens."""

    @property
    def added(self) -> Sequence[AddedToken]:
        """All tokens that are found in a text before the vocabulary's own, by their ids."""

    def library_file(self, frame: "Frame") -> bytes:
        """A tokenizer.json with the same ids, which puts `frame` around a text if the files do.

        Raises UnsupportedError where there is none.
        """

    @property
    def bound(self) -> TokenBound | None:
        """A lower bound on the number of tokens of a text; None if there is no certain one."""

    def adds_by_itself(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        """Whether BOS and EOS are added where tokenizer_config.json does not say."""

    def adds_others(self, bos: int | None, eos: int | None) -> bool:
        """Whether `encode_processed` adds tokens other than BOS and EOS."""


Frame = tuple[tuple[str, int] | None, tuple[str, int] | None]
"""The tokens that are put before and after a text, with their ids."""


def _find_anchor(
    decode: Callable[[Sequence[int]], str], candidates: Iterable[int]
) -> tuple[int, ...]:
    """One id that decodes to plain text, whatever follows it."""
    for token_id in candidates:
        text = decode((token_id,))
        if text.strip() == text != "" and REPLACEMENT not in text:
            return (token_id,)
    return ()


# tokenizer.json, and what is byte-level BPE


def read_library_file(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json; CheckpointError with the library's reason where it cannot be."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises the bare Exception for everything that its parser refuses.
        raise CheckpointError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__}: {error}; fetch the file "
            "again, or install the version of tokenizers it was written with"
        ) from error


class LibraryVocabulary:
    """A vocabulary of the tokenizers library."""

    def __init__(
        self, library: tokenizers.Tokenizer, settings: TokenizerConfig, cuts: Cuts | None
    ) -> None:
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._add(settings)
        if cuts is not None:
            cuts.frame(library)
        self.ids: Mapping[str, int] = library.get_vocab(with_added_tokens=True)
        added = library.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._spellings = {token_id: text for text, token_id in self.ids.items()}
        parts = json.loads(library.to_str())
        kinds = _decoder_kinds(parts["decoder"])
        self._is_byte_level = kinds == {"ByteLevel"}
        self._has_byte_tokens = "ByteFallback" in kinds
        self._bytes: dict[int, bytes] = {}
        self._alphabet = byte_alphabet()
        self._hidden = cuts.hidden if cuts is not None else {}
        texts = {token.content: token_id for token_id, token in added.items()}
        misread = _misread(texts, parts["model"], self._alphabet) if "ByteLevel" in kinds else ()
        self._misread = {texts[text]: text.encode() for text in misread}
        if cuts is not None:
            self._misread |= cuts.hidden
            self._spellings |= {i: data.decode() for i, data in cuts.hidden.items()}
        self.bound = library_bound(parts, self.ids, self._alphabet)
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

    def _add(self, settings: TokenizerConfig) -> None:
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

    @property
    def added(self) -> Sequence[AddedToken]:
        """See `Vocabulary`."""
        found = self._library.get_added_tokens_decoder()
        return [
            AddedToken(
                text=token.content,
                token_id=token_id,
                is_special=token.special,
                is_single_word=token.single_word,
                strips_left=token.lstrip,
                strips_right=token.rstrip,
                is_normalized=token.normalized,
            )
            for token_id, token in sorted(found.items())
        ]

    def library_file(self, frame: Frame) -> bytes:
        """See `Vocabulary`; the library's post-processor is the frame."""
        if self._hidden:
            raise UnsupportedError(
                f"{len(self._hidden)} tokens of this vocabulary are spelled like special tokens, which "
                "a tokenizer.json cannot tell apart."
            )
        text: str = self._library.to_str(pretty=True)
        return text.encode()

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        return self._encode(text, adds_special=False)

    def encode_processed(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        return self._encode(text, adds_special=True)

    def encode_located(self, texts: Sequence[str]) -> list[Located]:
        """See `Vocabulary`; on all the library's threads."""
        found = self._locating.encode_batch(list(texts), add_special_tokens=False)
        return [Located(encoding.ids, encoding.offsets) for encoding in found]

    @cached_property
    def _locating(self) -> tokenizers.Tokenizer:
        """The library, or a copy without its post-processor, which may take spaces out of the places."""
        parts = json.loads(self._library.to_str())
        if parts["post_processor"] is None:
            return self._library
        return tokenizers.Tokenizer.from_str(json.dumps({**parts, "post_processor": None}))

    def _encode(self, text: str, *, adds_special: bool) -> list[int]:
        # As a batch of one: the library's `encode` holds the interpreter's lock, so no other thread
        # would run during a long text. A batch of one uses none of the library's threads.
        (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=adds_special)
        ids: list[int] = encoding.ids
        return ids

    def adds_by_itself(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        """See `Vocabulary`."""
        frame = self.encode_processed("")
        adds_bos = bos is not None and frame[:1] == [bos]
        return adds_bos, eos is not None and frame[int(adds_bos) :][-1:] == [eos]

    def adds_others(self, bos: int | None, eos: int | None) -> bool:
        """See `Vocabulary`."""
        return not {bos, eos}.issuperset(self.encode_processed(""))

    def _decode(self, ids: Sequence[int]) -> str:
        if self._misread.keys().isdisjoint(ids):
            text: str = self._library.decode(list(ids), skip_special_tokens=False)
        else:
            character = {byte: letter for letter, byte in self._alphabet.items()}
            tokens = [
                "".join(map(character.__getitem__, self._misread[token_id]))
                if token_id in self._misread
                else self._spellings[token_id]
                for token_id in ids
            ]
            text = self._library.decoder.decode(tokens)
        return text

    def _token_bytes(self, token_id: int) -> bytes | None:
        if not self._is_byte_level and not self._has_byte_tokens:
            return None
        spelling = self._spellings[token_id]
        if not self._is_byte_level:
            found = _BYTE_TOKEN.fullmatch(spelling)
            return bytes.fromhex(found[1]) if found else None
        if token_id not in self._bytes:
            data = self._misread.get(token_id)
            if data is None:
                try:
                    data = bytes(self._alphabet[character] for character in spelling)
                except KeyError:
                    # A token that was added as text, not in the alphabet of bytes.
                    data = spelling.encode()
            self._bytes[token_id] = data
        return self._bytes[token_id]


def _misread(
    added: Iterable[str], model: Mapping[str, Any], alphabet: Mapping[str, int]
) -> set[str]:
    """The added tokens that are text, but that the library decodes as if they were spelled in bytes.

    `naïve` in a text is the token of that name, but in the byte alphabet its ï stands for a byte.
    Tokens that the model itself makes of bytes (one byte, or a merge) are spelled in bytes, even if
    they are listed as added.
    """
    readable = {text for text in added if not text.isascii() and set(text) <= alphabet.keys()}
    in_model = {text for text in readable if text in model.get("vocab", ())}
    made = {text for text in in_model if len(text) == 1}
    if in_model:
        made |= in_model.intersection(map("".join, model.get("merges", ())))
    return readable - made


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The types in the decoder of a tokenizer, those inside sequences included."""
    pending = [decoder]
    kinds: set[str] = set()
    while pending:
        decoder = pending.pop() or {}
        if decoder.get("type") == "Sequence":
            pending += decoder["decoders"]
        elif decoder:
            kinds.add(decoder["type"])
    return kinds


# tokenizer.model


class SentencePieceVocabulary:
    """A vocabulary of the sentencepiece library, with special tokens cut out of the text first."""

    def __init__(self, path: Path, settings: TokenizerConfig) -> None:
        named = settings.tokenizer_class
        if named is not None and named.removesuffix("Fast") not in _PLAIN_CLASSES | NO_CLASS:
            raise CheckpointError(
                f"{path} is to be read by {named}, whose rules beyond the SentencePiece model are not "
                "known here (code that a checkpoint brings is never run). Put the model's "
                "tokenizer.json into the folder; if the SentencePiece model is all there is to it, "
                "write LlamaTokenizer as tokenizer_class into tokenizer_config.json"
            )
        # Imported here: most folders do not need it, and open without it.
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            # A RuntimeError or an OSError, depending on the version.
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
            AddedToken(text=piece, token_id=token_id, is_special=True)
            for token_id, piece in pieces.items()
            if self._model.is_control(token_id) or self._model.is_unknown(token_id)
        ]
        self._added = _number_added(control, settings, {text: i for i, text in pieces.items()})
        texts = {token.text: token_id for token_id, token in self._added.items()}
        self.special_ids = frozenset(i for i, token in self._added.items() if token.is_special)
        pieces |= {token_id: token.text for token_id, token in self._added.items()}
        self.ids: Mapping[str, int] = {text: token_id for token_id, text in pieces.items()} | texts
        self._pieces = pieces
        self.bound = sentencepiece_bound(
            self._model.serialized_model_proto(),
            pieces.values(),
            self._added.values(),
            has_bytes=bool(self._data),
        )
        # The longest first: an alternation takes the first match.
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

    def complete(self, settings: TokenizerConfig) -> TokenizerConfig:
        """`settings` with the names that the model file defines."""
        model = self._model
        ids = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "unk_token": model.unk_id(),
        }
        names = {name: self._pieces[token_id] for name, token_id in ids.items() if token_id >= 0}
        return settings.with_names(names)

    @property
    def added(self) -> Sequence[AddedToken]:
        """See `Vocabulary`."""
        return [token for _, token in sorted(self._added.items())]

    def library_file(self, frame: Frame) -> bytes:
        """See `Vocabulary`; it was compared with this vocabulary on all its pieces and on a text."""
        proto = self._model.serialized_model_proto()
        library = to_library(read_model(proto), self.added, is_legacy=self._is_legacy, frame=frame)
        texts = [*LIBRARY_SAMPLES, *(text.replace(_SPACE_MARK, " ") for text in self.ids)]
        differing = first_difference(library, {text: self.encode(text) for text in texts})
        if differing is not None:
            raise UnsupportedError(
                "this SentencePiece model cannot be written as a tokenizer.json with the same ids: "
                f"they would differ for {differing[:80]!r}. Put the published tokenizer.json of the "
                "model into the folder."
            )
        text: str = library.to_str(pretty=True)
        return text.encode()

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        ids: list[int] = []
        for begin, part in self._parts(text):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                model = self._model if begin == 0 or self._is_legacy else self._bare
                ids += model.encode(part)
        return ids

    def encode_located(self, texts: Sequence[str]) -> list[Located]:
        """See `Vocabulary`."""
        return [self._encode_located(text) for text in texts]

    def _encode_located(self, text: str) -> Located:
        located = Located([], [])
        for begin, part in self._parts(text):
            if isinstance(part, int):
                located.ids.append(part)
                located.spans.append((begin, begin + len(self._added[part].text)))
            elif part:
                model = self._model if begin == 0 or self._is_legacy else self._bare
                pieces = list(self._pieces_of(model, part))
                spans: list[tuple[int, int]] = []
                for token_id, start, end in reversed(pieces):
                    if start == end and token_id in self._data and spans:
                        spans.append(spans[-1])  # of the bytes of a character the last one has it
                    else:
                        spans.append((begin + start, begin + end))
                located.ids.extend(token_id for token_id, _, _ in pieces)
                located.spans.extend(reversed(spans))
        return located

    def _pieces_of(self, model: Any, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield each token's id, and where it begins and ends in the text in characters."""
        # The one form with places that every version of the library has: a SentencePieceText, whose
        # field 2 are pieces; of each 2 is the id, 4 and 5 where it begins and ends, in bytes.
        place_of = {0: 0}
        place = 0
        for number, character in enumerate(text, 1):
            place += len(character.encode())
            place_of[place] = number
        for field, message in fields(model.encode(text, out_type="serialized_proto")):
            if field == 2 and isinstance(message, bytes):
                values = dict(fields(message))
                start, end = values.get(4, 0), values.get(5, 0)
                yield _number(values[2]), place_of[_number(start)], place_of[_number(end)]

    def encode_processed(self, text: str) -> list[int]:
        """The same: these files have no post-processor."""
        return self.encode(text)

    def adds_by_itself(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        """As in every published reader of such a folder: BOS, no EOS."""
        return bos is not None, False

    def adds_others(self, bos: int | None, eos: int | None) -> bool:
        """Never: these files have no post-processor."""
        return False

    def _parts(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Stretches of text and ids of added tokens between them, each with its start."""
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
        # The space before the first word is the model's; one spelled as a byte is the text's.
        strips = self._strips_first_space and bool(ids) and ids[0] not in self._data
        return text.removeprefix(" ") if strips else text

    def _piece_text(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        return piece if token_id in self._added else piece.replace(_SPACE_MARK, " ")


def _number(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value


def _number_added(
    control: Iterable[AddedToken], settings: TokenizerConfig, pieces: Mapping[str, int]
) -> dict[int, AddedToken]:
    """Every token that is found in the text before SentencePiece sees it, by id.

    A special token without an id in any file gets that of the piece with its text, else the next free.
    """
    added = {token.token_id: token for token in (*control, *settings.added)}
    numbered = {token.text: token_id for token_id, token in added.items()}
    following = max([*pieces.values(), *(i for i in added if i is not None)], default=-1) + 1
    for text in dict.fromkeys((*settings.named.values(), *settings.extra)):
        if text in numbered:
            continue
        token_id = pieces.get(text, following)
        following += token_id == following
        added[token_id] = AddedToken(text=text, token_id=token_id, is_special=True)
    return {token_id: token for token_id, token in added.items() if token_id is not None}


def _token_pattern(token: AddedToken) -> str:
    text = re.escape(token.text)
    return rf"(?<!\w){text}(?!\w)" if token.is_single_word else text
