"""LoRA adapters as files: adapter_config.json, adapter_model.safetensors; PEFT's names and defaults.

What PEFT writes is read and what is written here PEFT reads. A key of the configuration that would
change what is computed, and that is not known here, is refused by its name. Imports no torch.
"""

import json
import re
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
TRAINING = "training.json"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
# A copy of the base's weight, which PEFT writes beside the matrices of embedding and head.
COPY = ".base_layer."
# Beginnings that change the base's weights: without these, an adapter of them means nothing.
CHANGED_BASE = re.compile(r"(pissa|olora|corda|loftq|lora_ga|eva_residual)\w*")
# Keys that change what is computed, and what they are where they do not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "layer_replication": (None, [], ()),
    "target_parameters": (None, [], ()),
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

    @property
    def base_quant(self) -> str | None:
        """How its base was quantized while it was trained here; None: not at all, or not known."""
        file = self.folder / TRAINING
        found = read_object(file).get("quant") if file.is_file() else None
        return found if isinstance(found, str) else None

    @property
    def products(self) -> list[str]:
        """The paths of its products."""
        return self._paths(A)

    @property
    def token_rows(self) -> list[str]:
        """The paths of modules of which it has rows of single tokens."""
        return self._paths(TOKEN_ROWS)

    @property
    def whole(self) -> list[str]:
        """The paths of modules whose weights it has as a whole."""
        return [
            name.removeprefix(PREFIX).removesuffix(".weight")
            for name in self.tensors
            if name.endswith(".weight") and ".lora_" not in name and COPY not in name
        ]

    def of(self, path: str, end: str) -> TensorRef | None:
        """Return a module's tensor whose name ends with `end`, such as A; None where there is none."""
        return self.tensors.get(f"{PREFIX}{path}{end}")

    def check(self) -> None:
        """Raise CheckpointError where a product lacks a matrix, or where something unknown is there."""
        needed = {
            f"{PREFIX}{path}{end}"
            for path in self.products
            for end in (A, B, *((MAGNITUDE,) if self.config.use_dora else ()))
        }
        known = needed | {
            f"{PREFIX}{path}{end}"
            for path, end in (
                *((path, TOKEN_ROWS) for path in self.token_rows),
                *((path, end) for path in self.whole for end in (".weight", ".bias")),
            )
        }
        known |= {name for name in self.tensors if COPY in name}
        wrong = [*sorted(needed - self.tensors.keys()), *sorted(self.tensors.keys() - known)]
        if wrong:
            what = "absent" if wrong[0] in needed else "not known here"
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: {wrong[0]} is {what}; every product needs lora_A and lora_B."
            )

    def _paths(self, end: str) -> list[str]:
        return [
            name.removeprefix(PREFIX).removesuffix(end)
            for name in self.tensors
            if name.endswith(end)
        ]


def open_adapter(folder: str | Path) -> AdapterFiles:
    """Return the adapter in a folder.

    Raises CheckpointError where files are missing or damaged or a product lacks a matrix,
    UnsupportedError for adapters of other kinds, by the key that makes them so.
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
    tensors = {
        name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name: ref
        for name, ref in read_header(weights)[0].items()
    }
    found = AdapterFiles(folder=folder, config=config, tensors=tensors)
    found.check()
    return found


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
    init = value.get("init_lora_weights", True)
    if isinstance(init, str) and CHANGED_BASE.fullmatch(init):
        raise UnsupportedError(
            f"{where}: init_lora_weights is {init!r}: the adapter was trained over weights that this "
            "changed, and is written without that change. Write it again with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    known = {item.name for item in fields(LoraConfig)} - {"init_lora_weights"}
    given = {key: _listed(item) for key, item in value.items() if key in known and item is not None}
    try:
        return LoraConfig(**given)
    except (TypeError, OptionError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
