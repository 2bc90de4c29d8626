"""Files of other trainers, axolotl's and LLaMA-Factory's, as options of hanok.

Every key of a file comes to one of three ends, each with a sentence: it is translated, it is left out
because it changes no result (hanok does it always, or does it otherwise), or it is refused because the
training would be another one without it. What such a file does not say is set to the other trainer's
default where that is not hanok's.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hanok.checkpoint.lora_config import LoraConfig
from hanok.errors import OptionError
from hanok.training.config import LORA, checked, option_hints, read_yaml, unknown
from hanok.training.foreign_axolotl import read_axolotl
from hanok.training.foreign_keys import ForeignKeys
from hanok.training.foreign_llama_factory import read_llama_factory

AXOLOTL, LLAMA_FACTORY = "axolotl", "LLaMA-Factory"
MARKS: Mapping[str, Collection[str]] = {
    AXOLOTL: ("base_model", "datasets", "micro_batch_size", "sequence_len"),
    LLAMA_FACTORY: ("model_name_or_path", "finetuning_type", "stage", "cutoff_len"),
}
"""Keys that files of one of them have, and of the other have not."""
READERS: Mapping[str, Callable[[ForeignKeys], None]] = {
    AXOLOTL: read_axolotl,
    LLAMA_FACTORY: read_llama_factory,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """What a file of another trainer asks for."""

    trainer: str
    values: Mapping[str, Any]
    """By the names of hanok's options, each in its type."""
    notes: tuple[str, ...]
    """What became of each key, a line each."""


def translate(path: Path, ignored: Collection[str] = ()) -> Translation:
    """Return what a file of axolotl or LLaMA-Factory asks for.

    Raises OptionError for a file of neither, and for keys that would change what is learnt and cannot be
    translated, unless they are `ignored` by name.
    """
    found = read_yaml(path)
    kinds = [name for name, marks in MARKS.items() if any(mark in found for mark in marks)]
    if len(kinds) != 1:
        raise OptionError(
            f"{path} is no file of axolotl (with {', '.join(MARKS[AXOLOTL])}) or of LLaMA-Factory (with "
            f"{', '.join(MARKS[LLAMA_FACTORY])}). A file of hanok's own options is --config."
        )
    (kind,) = kinds
    known = {*option_hints(), *(f"{LORA}.{item.name}" for item in fields(LoraConfig))}
    keys = ForeignKeys(kind, found, known)
    READERS[kind](keys)
    keys.finish()
    for name in ignored:
        if name not in keys.refused:
            raise OptionError(unknown("--ignore", name, list(keys.refused) or ["none is refused"]))
    refused = {key: why for key, why in keys.refused.items() if key not in ignored}
    if refused:
        lines = "".join(f"\n  {key}: {why}" for key, why in refused.items())
        raise OptionError(
            f"{path}: without these keys the training would be another one:{lines}\nTo train without "
            f"them: --ignore {','.join(refused)}."
        )
    ends = [*keys.notes, *((key, f"ignored: {why}") for key, why in keys.refused.items())]
    return Translation(
        trainer=kind,
        values=checked(keys.values, str(path)),
        notes=tuple(f"{key}: {what}" for key, what in ends),
    )
