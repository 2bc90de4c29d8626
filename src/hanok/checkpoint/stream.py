"""Token ids to text, one id at a time: the pieces, joined, are the text of the whole list.

A vocabulary spells text in one of two ways, and each has its stream. Where every token is a string
of bytes (byte-level BPE), the bytes go through an incremental UTF-8 decoder. Elsewhere the text of
a token depends on the text before it (the first space of a text is dropped), so a piece is the
difference between two decodes that begin with the same context: the group emitted before.

A continuation is decoded in the context of the tokens before it: a stream may begin with the last of
these, whose own text is then not given again.

Invariants: a piece never ends in half a character; what was emitted is never taken back. A byte
that cannot belong to a character becomes U+FFFD at once, so at most three bytes are ever held back.
Only a decoder which mixes bytes with other rules holds tokens by looking at the text, and then at
most HOLD_LIMIT of them; `Tokenizer.decode` is the join of the pieces, so nothing can disagree.

Cost per token: two decodes of at most HOLD_LIMIT + 1 ids, whatever the length of the text.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

HOLD_LIMIT = 16
"""Tokens that a stream holds back at most. A character has up to four bytes, hence four tokens."""

REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTexts:
    """What a stream needs from a vocabulary. None of the functions skips special tokens."""

    decode: Callable[[Sequence[int]], str]
    """The text of a whole list of ids, as the library that owns the vocabulary writes it."""

    token_bytes: Callable[[int], bytes | None]
    """The bytes a token stands for, or None where it stands for text."""

    is_known: Callable[[int], bool]
    """Whether the id has a token; ids of padding rows have none and add nothing to a text."""

    is_bytes_only: bool
    """Every token is bytes, and the text is what the bytes spell, with nothing added or removed."""

    can_split_characters: bool
    """A token that is not bytes may still hold a part of a character."""

    anchor: tuple[int, ...]
    """Ids of some plain text: put before a token, they show how it reads in the middle of a text."""

    def token_text(self, token_id: int) -> str:
        """The text of one token in the middle of a text; U+FFFD for a part of a character."""
        data = self.token_bytes(token_id)
        if data is not None:
            return data.decode(errors="replace")
        before = self.decode(self.anchor)
        after = self.decode((*self.anchor, token_id))
        return after[len(before) :] if after.startswith(before) else self.decode((token_id,))

    def data(self, token_id: int) -> bytes:
        """The bytes that one token adds in the middle of a text; b"" for a part that has no bytes."""
        data = self.token_bytes(token_id)
        if data is not None:
            return data
        text = self.token_text(token_id)
        return b"" if self.can_split_characters and REPLACEMENT in text else text.encode()

    def stream(self, skipped: frozenset[int], after: Sequence[int] = ()) -> "StreamDecoder":
        """A new stream that skips the ids in `skipped` and continues the text of the ids `after`."""
        kind = ByteStream if self.is_bytes_only else WindowStream
        stream = kind(self, skipped)
        stream.begin_behind(after)
        return stream


class StreamDecoder(ABC):
    """Text from token ids as they come. Not for reuse after `finish`."""

    def __init__(self, texts: TokenTexts, skipped: frozenset[int]) -> None:
        self._texts = texts
        self._skipped = skipped

    def begin_behind(self, ids: Sequence[int]) -> None:
        """Begin as if these ids had been pushed already: their text is not given again.

        A character that they leave unfinished is given whole once its last byte arrives.
        """
        last: list[int] = []
        is_whole = True
        for token_id in reversed(ids):
            if self._adds_text(token_id):
                if len(last) == HOLD_LIMIT:
                    is_whole = False
                    break
                last.append(token_id)
        if not is_whole:
            self._begin_in_a_text()
        for token_id in reversed(last):
            self._take(token_id)

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; often "", never half a character."""
        return self._take(token_id) if self._adds_text(token_id) else ""

    def passed_over(self, token_id: int) -> str:
        """The text that `push` leaves out for this id: how it reads where none is skipped."""
        is_left_out = token_id in self._skipped and self._texts.is_known(token_id)
        return self._texts.token_text(token_id) if is_left_out else ""

    def _adds_text(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._texts.is_known(token_id)

    @abstractmethod
    def finish(self) -> str:
        """What was held back: "" or an unfinished character as U+FFFD."""

    @abstractmethod
    def _take(self, token_id: int) -> str:
        """`push` for an id that has a token and is not skipped."""

    @abstractmethod
    def _begin_in_a_text(self) -> None:
        """Continue as if after some unknown text."""


class ByteStream(StreamDecoder):
    """For vocabularies whose tokens are bytes only."""

    def __init__(self, texts: TokenTexts, skipped: frozenset[int]) -> None:
        super().__init__(texts, skipped)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def finish(self) -> str:
        """What was held back: "" or an unfinished character as U+FFFD."""
        return self._decoder.decode(b"", final=True)

    def _take(self, token_id: int) -> str:
        return self._decoder.decode(self._texts.token_bytes(token_id) or b"")

    def _begin_in_a_text(self) -> None:
        """Bytes read alike at the beginning of a text and in the middle."""


class WindowStream(StreamDecoder):
    """For vocabularies of text pieces, with or without a fallback to bytes.

    The library's decoder sees a byte token only once its character is whole: it would otherwise
    decode the valid characters next to a bad byte to U+FFFD as well, after they were emitted.
    """

    def __init__(self, texts: TokenTexts, skipped: frozenset[int]) -> None:
        super().__init__(texts, skipped)
        self._context: tuple[int, ...] = ()
        self._context_text = ""
        self._bytes: list[tuple[int, bytes]] = []
        self._tokens: list[int] = []

    def finish(self) -> str:
        """What was held back: "" or an unfinished character as U+FFFD."""
        return self._take_bytes(final=True) + self._emit_tokens()

    def _take(self, token_id: int) -> str:
        data = self._texts.token_bytes(token_id)
        if data is not None:
            self._bytes.append((token_id, data))
            return self._emit_tokens() + self._take_bytes(final=False)
        piece = self._take_bytes(final=True)
        self._tokens.append(token_id)
        if self._texts.can_split_characters and len(self._tokens) < HOLD_LIMIT:
            text = self._texts.decode((*self._context, *self._tokens))
            if text.endswith(REPLACEMENT):
                return piece
        return piece + self._emit_tokens()

    def _take_bytes(self, *, final: bool) -> str:
        """The characters that the held bytes spell; an unfinished one is kept, unless `final`."""
        piece = ""
        while self._bytes:
            data = b"".join(held for _, held in self._bytes)
            try:
                text, _ = codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as error:
                piece += REPLACEMENT
                del self._bytes[: error.end]
                # The library has not seen these tokens, but the text has begun: a space that
                # follows is no longer its first.
                self._begin_in_a_text()
                continue
            if not text:
                break
            group = tuple(token_id for token_id, _ in self._bytes)
            self._bytes.clear()
            piece += self._emit(group)
        return piece

    def _emit_tokens(self) -> str:
        group = tuple(self._tokens)
        self._tokens.clear()
        return self._emit(group) if group else ""

    def _emit(self, group: tuple[int, ...]) -> str:
        """The text that `group` adds after the context; the group becomes the context."""
        decode = self._texts.decode
        extended = (*self._context, *group)
        text = decode(extended)
        alone = decode(group)
        # A decoder may rewrite what came before; what was emitted stays as it is.
        is_extension = text.startswith(self._context_text)
        piece = text[len(self._context_text) :] if is_extension else alone
        if alone:
            self._context, self._context_text = group, alone
        elif len(extended) <= HOLD_LIMIT:
            # A space that is dropped at the start of a text: only together with the tokens before it
            # does it tell the next token that the text has begun.
            self._context, self._context_text = extended, text
        else:
            self._begin_with((extended[0], *extended[1 - HOLD_LIMIT :]))
        return piece

    def _begin_in_a_text(self) -> None:
        self._begin_with(self._texts.anchor)

    def _begin_with(self, context: tuple[int, ...]) -> None:
        self._context, self._context_text = context, self._texts.decode(context)
