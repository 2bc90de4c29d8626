"""What a user says about a model for its card. Imports nothing, for the command line lists it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Relation = Literal["adapter", "merge", "quantized", "finetune"]
"""What the hub knows as base_model_relation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOptions:
    """What the user says about a model. Fields are options of `hanok card`."""

    base_model: tuple[str, ...] = ()
    """Id on the hub (org/name) of a model that this one was made from. Repeatable, for a merge."""
    relation: Relation | None = None
    """How it was made from the base model. None: adapter or quantized, where the files show it."""
    license: str | None = None
    """Identifier of the licence on the hub, such as apache-2.0, or other. None: the base model's, if its
    card is on this disk."""
    license_name: str | None = None
    """Name of a licence that has no identifier."""
    license_link: str | None = None
    """Address or file of its text."""
    dataset: tuple[str, ...] = ()
    """Id on the hub of a dataset that it was trained on. Repeatable."""
    language: tuple[str, ...] = ()
    """Code of a language that it knows, such as en. Repeatable."""
    base_folder: tuple[Path, ...] = ()
    """Folder of a base model on this disk, whose card has the licence. Repeatable; without one,
    the cards of --base-model are looked for in huggingface_hub's cache."""
    quality: Path | None = None
    """Report of `hanok quality --json`, whose table the card is to have. None: the card's own."""
    training: Path | None = None
    """Report of a training: a JSON object with date, machine and rows. None: the card's own."""
