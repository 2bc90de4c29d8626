"""What a training changes: an adapter over the weights, or the weights themselves."""

from pathlib import Path
from typing import Protocol

import torch

from hanok.checkpoint.adapter_files import TRAINING, open_adapter
from hanok.checkpoint.lora_config import LoraConfig
from hanok.checkpoint.writer import write_json
from hanok.engine.model import Model, load
from hanok.errors import OptionError
from hanok.memory.adapters import attach_files, attach_new, write_adapter
from hanok.models.adapters import activate
from hanok.models.family import family_of, usual_sources

INDEX = 0


class Learnt(Protocol):
    """What learns of a model."""

    folder: str
    """Where the result lies below the output folder."""

    def begin(self, seed: int) -> None:
        """Make what learns, before the first step."""

    def restore(self, folder: Path) -> None:
        """Take it from a folder that `write` wrote into."""

    def write(self, folder: Path) -> None:
        """Write it into a folder that is there, complete."""


class LearntAdapter:
    """An adapter over weights that stay as they are."""

    folder = "adapter"

    def __init__(self, model: Model, config: LoraConfig) -> None:
        self._decoder = model.decoder
        self._base = {
            "quant": model.report.quant,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        where = model.checkpoint.folder
        self._config = config
        self.table = usual_sources(family_of(model.checkpoint.config, str(where)), model.config)
        self._decoder.requires_grad_(False)

    def begin(self, seed: int) -> None:
        """See `Learnt`."""
        generator = torch.Generator().manual_seed(seed)
        attach_new(self._decoder, self.table, self._config, index=INDEX, generator=generator)
        activate(self._decoder, INDEX)

    def restore(self, folder: Path) -> None:
        """See `Learnt`."""
        files = open_adapter(folder)
        attach_files(self._decoder, self.table, files, index=INDEX, training=self._config)
        activate(self._decoder, INDEX)

    def write(self, folder: Path) -> None:
        """See `Learnt`."""
        write_adapter(folder, self._decoder, self.table, self._config, index=INDEX)
        write_json(folder / TRAINING, self._base)


class LearntWeights:
    """All weights of a model."""

    folder = "model"

    def __init__(self, model: Model) -> None:
        if model.report.quantized_bytes:
            raise OptionError(
                "all weights are to learn, and those of this model are quantized. Load it without "
                "quant, or train an adapter over them."
            )
        self._model = model
        model.decoder.requires_grad_(True)

    def begin(self, seed: int) -> None:
        """See `Learnt`; the weights are there."""

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """See `Learnt`."""
        model = self._model
        dtype = str(model.dtype).removeprefix("torch.")
        read = load(folder, dtype=dtype, weights="mapped")
        for (name, own), other in zip(
            model.decoder.named_parameters(), read.decoder.parameters(), strict=True
        ):
            assert own.shape == other.shape, name
            own.copy_(other)

    def write(self, folder: Path) -> None:
        """See `Learnt`; the folder is a whole checkpoint."""
        self._model.write(folder)
