"""How a checkpoint makes one vector of a text's hidden states: sentence-transformers' files.

`modules.json` lists what follows one another (a transformer, a pooling, perhaps a normalization), and
the pooling's `config.json` says which kind. Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hanok.errors import CheckpointError, UnsupportedError

Pooling = Literal["last", "mean"]
"""The hidden state of the last token, or the mean of those of all."""

KINDS: Mapping[str, Pooling] = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean"}
MODULES = ("Transformer", "Pooling", "Normalize")
ELSE = "say --pooling last or --pooling mean to have vectors all the same"


def read_pooling(folder: Path) -> Pooling | None:
    """Return the pooling that a checkpoint asks for; None where it says nothing of it.

    Raises UnsupportedError for another kind, or for modules behind it that change the vector, and
    CheckpointError for files that cannot be read.
    """
    config = folder / "1_Pooling" / "config.json"
    if (folder / "modules.json").is_file():
        modules = _read(folder / "modules.json")
        if not isinstance(modules, list) or not all(isinstance(item, dict) for item in modules):
            raise CheckpointError(f"{folder / 'modules.json'} is not a list of modules.")
        for module in modules:
            kind = str(module.get("type", "")).rpartition(".")[2]
            if kind not in MODULES:
                raise UnsupportedError(
                    f"{folder / 'modules.json'} has a {kind} module, which is not computed here; {ELSE}."
                )
            if kind == "Pooling":
                config = folder / str(module.get("path", "")) / "config.json"
    if not config.is_file():
        return None
    values = _read(config)
    if not isinstance(values, dict):
        raise CheckpointError(f"{config} is not an object.")
    found = _kinds(values)
    if len(found) != 1 or found[0] not in KINDS:
        names = " and ".join(found) or "nothing"
        raise UnsupportedError(
            f"{config} asks for {names}; only lasttoken or mean_tokens alone is computed here; {ELSE}."
        )
    return KINDS[found[0]]


def _kinds(values: Mapping[str, Any]) -> list[str]:
    """Return what a pooling's config asks for, in its older or its newer spelling."""
    if values.get("pooling_mode") is not None:
        given = values["pooling_mode"]
        return [str(item) for item in given] if isinstance(given, list) else [str(given)]
    prefix = "pooling_mode_"
    return [key.removeprefix(prefix) for key, on in values.items() if key.startswith(prefix) and on]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch the file again.") from error
