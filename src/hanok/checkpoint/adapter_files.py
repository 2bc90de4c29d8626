"""LoRA adapters as files: adapter_config.json, adapter_model.safetensors; PEFT's names and defaults.

What PEFT writes is read and what is written here PEFT reads. A key of the configuration that would
change what is computed, and that is not known here, is refused by its name. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hanok.checkpoint.files import read_object
from hanok.checkpoint.formats import ADAPTER_CONFIG
from hanok.checkpoint.lora_config import LoraConfig
from hanok.checkpoint.safetensors import TensorRef, read_header
from hanok.errors import CheckpointError, OptionError, UnsupportedError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
# Keys that change what is computed, and what they are where they do not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "layer_replication": (None, [], ()),
    "target_parameters": (None, [], ()),
    "modules_to_save": (None, [], ()),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None, False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter on disk."""

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, TensorRef]
    """By PEFT's names."""

    def paths(self) -> list[str]:
        """Return its products; CheckpointError where one lacks a matrix, or where others are."""
        paths = [
            name.removeprefix(PREFIX).removesuffix(A) for name in self.tensors if name.endswith(A)
        ]
        expected = {f"{PREFIX}{path}{end}" for path in paths for end in (A, B)}
        if expected != self.tensors.keys():
            odd = min(expected ^ self.tensors.keys())
            what = "absent" if odd in expected else "not known here"
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: {odd} is {what}; every product needs lora_A and lora_B, and "
                "nothing else may be there."
            )
        return paths


def open_adapter(folder: str | Path) -> AdapterFiles:
    """Return the adapter in a folder.

    Raises CheckpointError where files are missing or damaged, UnsupportedError for adapters of other
    kinds, by the key that makes them so.
    """
    folder = Path(folder)
    path, weights = folder / ADAPTER_CONFIG, folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {ADAPTER_CONFIG}, so it is no adapter. Check the path."
        )
    config = read_lora_config(read_object(path), str(path))
    if not weights.is_file():
        pickled = weights.with_suffix(".bin").is_file()
        advice = f"convert it first: hanok convert {folder}" if pickled else "copy it there"
        raise CheckpointError(f"{weights} is absent; {advice}.")
    return AdapterFiles(folder=folder, config=config, tensors=read_header(weights)[0])


def read_lora_config(value: Mapping[str, Any], where: str) -> LoraConfig:
    """Return the configuration that an adapter_config.json holds; `where` names it in errors."""
    kind = value.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{where}: an adapter of type {kind!r}; hanok reads LoRA (peft_type LORA)."
        )
    for key, neutral in NEUTRAL.items():
        if key in value and value[key] not in neutral:
            raise UnsupportedError(
                f"{where}: {key} is {json.dumps(value[key])[:60]}, which hanok does not compute yet. "
                "Merge the adapter into its base with PEFT, and load the result."
            )
    known = {item.name for item in fields(LoraConfig)}
    given = {key: _listed(item) for key, item in value.items() if key in known and item is not None}
    try:
        return LoraConfig(**given)
    except (TypeError, OptionError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
