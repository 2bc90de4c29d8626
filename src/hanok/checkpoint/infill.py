"""Fill in the middle: prompts for a text with a gap, for models that were trained to fill gaps.

Such models were trained on documents cut in three and put together in another order, with special
tokens as markers between the parts (arXiv 2207.14255). `SPELLINGS` lists the markers and their order by
vocabulary; a vocabulary may have them although its model was not trained with them. The text around the
gap is ordinary text: nothing in it is tokenized as a marker or another special token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hanok.checkpoint.tokenizer import Tokenizer

_JOINS_NOTHING = "\x02"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How a family's vocabularies spell their markers; some of `ends` may be missing."""

    prefix: str
    suffix: str
    middle: str | None
    """None: the text before the gap comes last, and is continued."""
    file: str | None = None
    """Stands before each file of a project."""
    ends: tuple[str, ...] = ()
    is_suffix_first: bool = False


SPELLINGS = (
    Spelling(  # Qwen2.5-Coder and Qwen3-Coder, CodeGemma, Granite
        prefix="<|fim_prefix|>",
        suffix="<|fim_suffix|>",
        middle="<|fim_middle|>",
        file="<|file_sep|>",
        ends=("<|fim_pad|>", "<|repo_name|>", "<|file_separator|>", "<|endoftext|>"),
    ),
    Spelling(  # StarCoder and StarCoder2, Granite Code, Stable Code
        prefix="<fim_prefix>",
        suffix="<fim_suffix>",
        middle="<fim_middle>",
        file="<file_sep>",
        ends=("<fim_pad>", "<repo_name>", "<|endoftext|>"),
    ),
    Spelling(  # Code Llama
        prefix="\u2581<PRE>", suffix="\u2581<SUF>", middle="\u2581<MID>", ends=("\u2581<EOT>",)
    ),
    Spelling(  # DeepSeek-Coder and DeepSeek-V2 and later
        prefix="<\uff5cfim\u2581begin\uff5c>",
        suffix="<\uff5cfim\u2581hole\uff5c>",
        middle="<\uff5cfim\u2581end\uff5c>",
        ends=("<\uff5cend\u2581of\u2581sentence\uff5c>", "<|EOT|>"),
    ),
    Spelling(  # Codestral
        prefix="[PREFIX]", suffix="[SUFFIX]", middle=None, ends=("[MIDDLE]",), is_suffix_first=True
    ),
    Spelling(  # Seed-Coder
        prefix="<[fim-prefix]>",
        suffix="<[fim-suffix]>",
        middle="<[fim-middle]>",
        is_suffix_first=True,
    ),
)


class Infill:
    """A vocabulary's markers. Made by `find_infill`; threads may share it."""

    def __init__(self, tokenizer: Tokenizer, spelling: Spelling) -> None:
        self._tokenizer = tokenizer
        self._is_suffix_first = spelling.is_suffix_first
        self._prefix = self._ids(spelling.prefix)
        self._suffix = self._ids(spelling.suffix)
        self._middle = self._ids(spelling.middle)
        self._file = self._ids(spelling.file)
        ends = (number for text in spelling.ends for number in self._ids(text))
        markers = (*self._prefix, *self._suffix, *self._middle, *self._file, *ends)
        self.end_ids = tuple(sorted(set(markers)))
        """The tokens that end the text in the gap besides the model's own: every marker."""
        unknown = {tokenizer.unk_token_id}  # what a text without a token for it becomes
        self._no_text = (tokenizer.special_token_ids | set(self.end_ids)) - unknown
        first = tokenizer.encode("a", add_special_tokens=False)[:1]
        self._adds_space = b"".join(map(tokenizer.token_bytes, first)).startswith(b" ")
        bos = tokenizer.bos_token_id
        self._begin = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []

    def encode(
        self,
        prefix: str | Sequence[int],
        suffix: str,
        *,
        files: Sequence[tuple[str, str]] = (),
        middle: str = "",
    ) -> list[int]:
        """Return the prompt whose continuation belongs between `prefix` and `suffix`.

        `files` are names and texts of other files as context, the most relevant one last; `middle` is
        the beginning of the text in the gap. Nothing is truncated.
        """
        before = self._text(prefix, is_first=True) if isinstance(prefix, str) else list(prefix)
        parts = [[*self._prefix, *before], [*self._suffix, *self._text(suffix)]]
        if self._is_suffix_first:
            parts.reverse()
        found = list(self._begin)
        for name, text in files:
            whole = f"{name}\n{text}" + ("" if text.endswith("\n") else "\n")
            found += [*self._file, *self._text(whole)]
        if files:
            found += self._file
        return [*found, *parts[0], *parts[1], *self._middle, *self._text(middle)]

    def end_texts(self) -> list[str]:
        """Return the markers that a stream would show as text, and that no answer should end in."""
        special = self._tokenizer.special_token_ids
        shown = [token for token in self.end_ids if token not in special]
        return [self._tokenizer.token_text(token) for token in shown]

    def _ids(self, spelling: str | None) -> list[int]:
        found = None if spelling is None else self._tokenizer.token_to_id(spelling)
        return [] if found is None else [found]

    def _text(self, text: str, *, is_first: bool = False) -> list[int]:
        """Return the tokens of a text, none of which is special.

        A text that spells a special token is cut in two there. Vocabularies that begin a text with a
        space add it only where `is_first`, as their models were trained.
        """
        ids = self._plain(text, is_first=is_first)
        if len(text) < 2 or self._no_text.isdisjoint(ids):
            return ids
        half = len(text) // 2
        return [*self._text(text[:half], is_first=is_first), *self._text(text[half:])]

    def _plain(self, text: str, *, is_first: bool) -> list[int]:
        encode = self._tokenizer.encode
        if is_first or not self._adds_space or not text:
            return encode(text, add_special_tokens=False)
        before = encode(_JOINS_NOTHING, add_special_tokens=False)
        ids = encode(_JOINS_NOTHING + text, add_special_tokens=False)
        is_apart = ids[: len(before)] == before
        return ids[len(before) :] if is_apart else encode(text, add_special_tokens=False)


def find_infill(tokenizer: Tokenizer) -> Infill | None:
    """Return the markers that a vocabulary has; None if it has none of the known ones."""
    for spelling in SPELLINGS:
        needed = [spelling.prefix, spelling.suffix, *filter(None, [spelling.middle])]
        if all(tokenizer.token_to_id(text) is not None for text in needed):
            return Infill(tokenizer, spelling)
    return None
