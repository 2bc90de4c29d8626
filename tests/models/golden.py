"""Frozen logits of a tiny model: how a family is tested that transformers does not have.

A golden is a JSON file of `tests/models/goldens`: the `config.json` and the tensor shapes of a tiny
checkpoint, some token ids, the logits after each of them, and in `source` which program computed these.
That program is no part of hanok: the model's own published code, or a plain implementation in a test.
Weights are not in the file, for `weight` makes them from the tensors' names.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "goldens"


@dataclass(frozen=True, kw_only=True)
class Golden:
    source: str
    """What computed the logits."""
    config: Mapping[str, Any]
    """As in config.json."""
    tensors: Mapping[str, Sequence[int]]
    """Shapes by the names that the model's files have."""
    tokens: list[int]
    logits: list[list[float]]
    """After each token, in float32."""

    @classmethod
    def read(cls, path: Path) -> "Golden":
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        values = asdict(self)
        values["logits"] = [[float(f"{value:.7g}") for value in row] for row in self.logits]
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    def weights(self) -> dict[str, list[float]]:
        return {name: weight(name, shape) for name, shape in self.tensors.items()}

    def save(self, folder: Path) -> None:
        """Write the checkpoint that the logits are of."""
        (folder / "config.json").write_text(json.dumps(self.config))
        tensors: dict[str, Tensor] = {
            name: torch.tensor(values).view(list(self.tensors[name]))
            for name, values in self.weights().items()
        }
        save_file(tensors, folder / "model.safetensors")


def goldens() -> dict[str, Golden]:
    """Every golden by the name of its file."""
    return {path.stem: Golden.read(path) for path in sorted(FOLDER.glob("*.json"))}


def weight(name: str, shape: Sequence[int]) -> list[float]:
    """Numbers that follow from a tensor's name, on any machine; logits of them are of the order of 1.

    Norms and biases lie between 0.5 and 1.5, components of matrices have a variance of 2 / columns.
    """
    draw = random.Random(name).random
    if len(shape) == 1:
        return [0.5 + draw() for _ in range(shape[0])]
    scale = (6 / shape[-1]) ** 0.5
    return [(2 * draw() - 1) * scale for _ in range(prod(shape))]
