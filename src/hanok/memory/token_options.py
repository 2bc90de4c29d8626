"""Every option of adding tokens, once: for Python and the command line. Imports no torch."""

from dataclasses import dataclass
from difflib import get_close_matches

from hanok.errors import OptionError

MEAN, PIECES, LIKE = "mean", "pieces", "like="


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOptions:
    """How tokens are added."""

    special: bool = False
    """Special tokens are found before anything else in a text, and left out where it is decoded."""
    init: str = PIECES
    """What new rows begin as: pieces, the mean of the rows that the token's text had before; mean, that
    of all rows; like=TOKEN, that token's; a description in words, the mean of its pieces."""
    single_word: bool = False
    """Find a token only between characters that are no letters or digits."""
    lstrip: bool = False
    """Let a token take the spaces before it."""
    rstrip: bool = False
    """Let a token take the spaces after it."""
    normalized: bool = False
    """Find a token in the text after the tokenizer has normalized it."""
    pad_to_multiple_of: int | None = None
    """Let the number of rows be a multiple of this. None: as many as are needed."""
    eos: str | None = None
    """The token that ends an answer from now on; older end tokens keep ending it. None: as before."""
    pad: str | None = None
    """The token that fills up short rows of a batch. None: as before."""
    legacy_tokenizer_files: bool = False
    """Write special_tokens_map.json and added_tokens.json too, which older servers read."""

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise OptionError(
                f"pad_to_multiple_of is {self.pad_to_multiple_of}; it must be at least 1."
            )
        if self.special and self.normalized:
            raise OptionError(
                "special and normalized exclude each other: special tokens are found in a text as it is."
            )
        if not self.init.strip():
            raise OptionError("init is empty. Give mean, pieces, like=TOKEN, or a description.")
        if self.init in (MEAN, PIECES) or self.init.startswith(LIKE):
            return
        if near := get_close_matches(self.init.strip().lower(), [MEAN, PIECES, LIKE]):
            raise OptionError(f"init {self.init!r} is unknown; did you mean {near[0]!r}?")

    @property
    def roles(self) -> dict[str, str]:
        """The tokens that get a role, by its name in tokenizer_config.json."""
        asked = {"eos_token": self.eos, "pad_token": self.pad}
        return {name: text for name, text in asked.items() if text is not None}
