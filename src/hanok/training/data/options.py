"""Every option of training data, once: for Python and the command line. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hanok.errors import OptionError
from hanok.registry import nearest_first
from hanok.training.data.formats import FORMATS

ALL_MASKED, NONE_MASKED, NO_END = "all-masked", "none-masked", "no-end-token"
DOUBLED_BOS, TRUNCATED = "doubled-bos", "truncated"
FINDINGS = {
    ALL_MASKED: "nothing of it would be learnt",
    NONE_MASKED: "all of it would be learnt, the prompt too",
    NO_END: "no token ends the answer, so a model would not learn to stop (append_eos adds one)",
    DOUBLED_BOS: "the beginning-of-sequence token is there twice in a row, as it never is when serving",
    TRUNCATED: "documents longer than max_length are cut: more of them than max_truncated allows",
}
"""What is refused unless it is allowed, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """How rows become documents. Raises OptionError for a value that cannot be."""

    chat_template: str | None = None
    """How conversations are rendered: one of the checkpoint's templates by name, vicuna_v1.1, a file, or
    the text of one. None: the checkpoint's own."""
    append_eos: bool = False
    """End a conversation with the end-of-sequence token where the template writes no end token after the
    last answer."""
    max_length: int | None = None
    """Tokens of the longest document: conversations are cut there, plain texts go on in the next one.
    None: those of a pack."""
    packing: bool = True
    """Put several documents into a pack, which do not see each other."""
    max_bad_rows: float = 0.01
    """The share of a file's rows that may be bad; with more it is refused."""
    max_truncated: float = 0.05
    """The share of conversations that may be cut; with more they are refused."""
    allow: tuple[str, ...] = ()
    """What is learnt from although it looks wrong: all-masked, none-masked, no-end-token, doubled-bos,
    truncated. Of all-masked documents nothing can be learnt; they are left out."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise OptionError(f"max_length is {self.max_length}; it must be at least 2.")
        for name in ("max_bad_rows", "max_truncated"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        for name in self.allow:
            if name not in FINDINGS:
                known = ", ".join(nearest_first(name, list(FINDINGS)))
                raise OptionError(f"allow: {name!r} is unknown. Known: {known}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file or a folder of training data, and how much of it is read."""

    path: Path
    times: float = 1.0
    """How often each document is read in an epoch; of a fraction, another part in each epoch."""
    cap: int | None = None
    """Rows of each file at the most, drawn by the seed. None: all."""
    format: str | None = None
    """None: detected."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Which column of the file each column of a format is."""

    def __post_init__(self) -> None:
        if not self.times > 0:
            raise OptionError(f"{self.path}: times is {self.times}; it must be above 0.")
        if self.cap is not None and self.cap < 1:
            raise OptionError(f"{self.path}: cap is {self.cap}; it must be at least 1.")
        if self.format is not None and self.format not in FORMATS:
            known = ", ".join(nearest_first(self.format, list(FORMATS)))
            raise OptionError(f"{self.path}: format {self.format!r} is unknown. Known: {known}.")


COLUMNS = (
    "messages",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
    "tools",
    "system",
)


def read_source(text: str) -> Source:
    """Return what PATH[:NAME=VALUE,…] says. Names: times, cap, format, and the columns of formats.

    For example `gsm8k.jsonl:instruction=question,output=answer,cap=1000`. A path that exists is one.
    """
    path, separator, settings = text.rpartition(":")
    if not separator or Path(text).exists() or "=" not in settings:
        return Source(path=Path(text))
    found: dict[str, Any] = {}
    columns: dict[str, str] = {}
    for setting in settings.split(","):
        name, _, value = setting.partition("=")
        if name in COLUMNS and value:
            columns[name] = value
        elif name == "format":
            found["format"] = value
        elif name in ("times", "cap"):
            try:
                found[name] = int(value) if name == "cap" else float(value)
            except ValueError:
                raise OptionError(f"{text}: {name} is {value!r}, which is not a number.") from None
        else:
            known = ", ".join(nearest_first(name, ["times", "cap", "format", *COLUMNS]))
            raise OptionError(f"{text}: {setting!r} is not understood. Known names: {known}.")
    return Source(path=Path(path), columns=columns, **found)
