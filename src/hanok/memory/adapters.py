"""Adapters between files and a decoder: read, made from nothing for training, and written again.

Products are named as transformers names its modules, whatever prefix the base's own files have.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanok.checkpoint.adapter_files import PREFIX, WEIGHTS, A, AdapterFiles, B
from hanok.checkpoint.aside import folder_aside
from hanok.checkpoint.formats import ADAPTER_CONFIG
from hanok.checkpoint.lora_config import LoraConfig
from hanok.checkpoint.writer import TensorData, write_json, write_tensors
from hanok.errors import CheckpointError
from hanok.memory.save import bytes_of
from hanok.memory.tensors import DTYPE_NAMES, MappedFiles, from_file_order, to_file_order
from hanok.models.adapters import attach, attached, paths_of, products
from hanok.models.decoder import Decoder
from hanok.models.family import Source, family_of, sources
from hanok.models.lora import Part


def usual_sources(config: Mapping[str, Any], decoder: Decoder, where: str) -> dict[str, Source]:
    """Return the sources of a decoder's parameters by the names that transformers gives modules.

    `config` is the base's config.json, which `where` names in errors.
    """
    return sources(family_of(config, where), decoder.config, ())


def attach_files(
    decoder: Decoder,
    table: Mapping[str, Source],
    files: AdapterFiles,
    *,
    index: int,
    trains: bool = False,
) -> None:
    """Read an adapter into a decoder: in its dtype to serve, in float32 to train it further.

    Raises CheckpointError where it does not fit the base.
    """
    mapped = MappedFiles()
    orders = _orders(decoder, table)
    dtype = torch.float32 if trains else decoder.dtype
    parts = {}
    for path in files.paths():
        a, b = (mapped.view(files.tensors[f"{PREFIX}{path}{end}"]) for end in (A, B))
        source = orders.get(path)
        if source is not None:
            b = from_file_order(b, source)
        kept = [item.to(decoder.device, dtype, copy=True) for item in (a, b)]
        parts[path] = Part(a=kept[0], b=kept[1], scale=files.config.scale_of(path))
    dropout = files.config.lora_dropout if trains else 0.0
    attach(decoder, table, parts, index=index, dropout=dropout)


def attach_new(
    decoder: Decoder,
    table: Mapping[str, Source],
    config: LoraConfig,
    *,
    index: int,
    generator: torch.Generator,
) -> None:
    """Give a decoder an adapter that adds nothing yet: A drawn as PEFT draws it, B zero, in float32.

    Raises OptionError where `target_modules` names a product that the model does not have.
    """
    sizes = {
        path: (rows, source.shape[1])
        for _, source in products(decoder, table)
        for path, rows in zip(paths_of(source), source.rows, strict=True)
    }
    parts = {}
    for path in config.targets(sizes):
        rows, columns = sizes[path]
        rank, bound = config.rank_of(path), 1 / math.sqrt(columns)
        a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        parts[path] = Part(
            a=a.to(decoder.device),
            b=torch.zeros(rows, rank, device=decoder.device),
            scale=config.scale_of(path),
        )
    attach(decoder, table, parts, index=index, dropout=config.lora_dropout)


def save_adapter(
    folder: str | Path,
    decoder: Decoder,
    table: Mapping[str, Source],
    config: LoraConfig,
    *,
    index: int,
) -> Path:
    """Write an adapter as PEFT does, into a new folder, all of it or nothing; return the folder.

    Raises CheckpointError where the folder exists and is not empty.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another folder.")
    with folder_aside(target) as unfinished:
        write_adapter(unfinished, decoder, table, config, index=index)
    return target


def write_adapter(
    folder: Path,
    decoder: Decoder,
    table: Mapping[str, Source],
    config: LoraConfig,
    *,
    index: int,
) -> None:
    """Write an adapter's two files into a folder that is there."""
    orders = _orders(decoder, table)
    tensors = []
    for path, part in attached(decoder, table, index).items():
        b = part.b.detach()
        if path in orders:
            b = to_file_order(b, orders[path])
        for end, value in ((A, part.a.detach()), (B, b)):
            tensors.append(
                TensorData(
                    name=f"{PREFIX}{path}{end}",
                    dtype=DTYPE_NAMES[value.dtype],
                    shape=tuple(value.shape),
                    read=_reader(value),
                )
            )
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / ADAPTER_CONFIG, config.as_json())


def _reader(value: Tensor) -> Callable[[], memoryview]:
    return lambda: bytes_of(value)


def _orders(decoder: Decoder, table: Mapping[str, Source]) -> dict[str, Source]:
    """Return the sources of products whose rows lie in another order in files, by their paths."""
    return {
        path: source
        for _, source in products(decoder, table)
        if source.layout == "heads"
        for path in paths_of(source)
    }
