"""Adapters between files and a decoder: read, made from nothing for training, and written again.

Modules are named as transformers names them, whatever prefix the base's own files have.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hanok.checkpoint.adapter_files import (
    MAGNITUDE,
    PREFIX,
    TOKEN_ROWS,
    WEIGHTS,
    A,
    AdapterFiles,
    B,
)
from hanok.checkpoint.formats import ADAPTER_CONFIG
from hanok.checkpoint.lora_config import LoraConfig
from hanok.checkpoint.safetensors import TensorRef
from hanok.checkpoint.writer import TensorData, write_json, write_tensors
from hanok.errors import CheckpointError, OptionError
from hanok.kernels.lora import by_columns
from hanok.memory.save import bytes_of
from hanok.memory.tensors import DTYPE_NAMES, MappedFiles, from_file_order, to_file_order
from hanok.models.adapters import (
    TokenRows,
    Weights,
    Whole,
    attach,
    attached,
    own_modules,
    paths_of,
    products,
)
from hanok.models.decoder import Decoder
from hanok.models.family import Source
from hanok.models.linear import Linear, Weighted
from hanok.models.lora import Part, row_lengths

# PiSSA's rough search looks at this many directions more than it keeps.
MORE_DIRECTIONS = 2


def attach_files(
    decoder: Decoder,
    table: Mapping[str, Source],
    files: AdapterFiles,
    *,
    index: int,
    training: LoraConfig | None = None,
) -> None:
    """Read an adapter into a decoder, as `read_files` does; CheckpointError where it does not fit."""
    weights = read_files(decoder, table, files, training=training)
    dropout = 0.0 if training is None else training.lora_dropout
    attach(decoder, table, weights, index=index, dropout=dropout)


def read_files(
    decoder: Decoder,
    table: Mapping[str, Source],
    files: AdapterFiles,
    *,
    training: LoraConfig | None = None,
) -> Weights:
    """Read an adapter for a decoder: in its dtype to serve, in float32 to train it further.

    `training` is what it was begun with, if it is to be trained further.
    """
    mapped = MappedFiles()
    dtype = decoder.dtype if training is None else torch.float32

    def kept(ref: TensorRef) -> Tensor:
        return mapped.view(ref).to(decoder.device, dtype, copy=True)

    orders = _orders(decoder, table)
    parts = {}
    for path in files.products:
        a, b, length = (files.of(path, end) for end in (A, B, MAGNITUDE))
        assert a is not None
        assert b is not None  # `check` has seen both
        part = Part(
            a=kept(a),
            b=kept(b),
            scale=files.config.scale_of(path),
            magnitude=None if length is None else kept(length).float(),
        )
        if path in orders:
            part = _reordered(part, partial(from_file_order, source=orders[path]))
        parts[path] = part
        if training is not None and training.is_pissa:
            parts[path] = _split(part, training.rank_of(path))
        if training is None:  # an optimizer wants rows
            parts[path] = replace(part, b=by_columns(part.b))
    whole = {}
    for path in files.whole:
        weight, bias = files.of(path, ".weight"), files.of(path, ".bias")
        assert weight is not None
        whole[path] = Whole(weight=kept(weight), bias=None if bias is None else kept(bias))
    token_rows = {}
    for path in files.token_rows:
        ref = files.of(path, TOKEN_ROWS)
        assert ref is not None
        token_rows[path] = token_rows_of(path, files, kept(ref))
    if training is not None and training.ensure_weight_tying:
        whole = _tied(decoder, table, whole)
    return Weights(parts=parts, whole=whole, token_rows=token_rows)


def attach_new(
    decoder: Decoder,
    table: Mapping[str, Source],
    config: LoraConfig,
    *,
    index: int,
    generator: torch.Generator,
) -> None:
    """Give a decoder an adapter that adds nothing yet, in float32, made as PEFT makes it.

    Raises OptionError where a name is that of no module that the model has.
    """
    embedding, head = (_path(table, f"{name}.weight") for name in ("embed_tokens", "lm_head"))
    places = {}
    for module, source in products(decoder, table):
        start = 0
        for path, rows in zip(paths_of(source), source.rows, strict=True):
            places[path] = (module, start, rows, source.shape[1])
            start += rows
    parts = {
        path: _new_part(*places[path], config=config, path=path, generator=generator)
        for path in config.targets(places, head)
    }
    modules = own_modules(decoder, table)
    whole = {}
    for path in config.whole(modules):
        weight = modules[path].weight
        if not isinstance(weight, Tensor):
            raise OptionError(
                f"modules_to_save: {path} is quantized and cannot learn. Load the model with embed=none "
                "and head=none."
            )
        bias = getattr(modules[path], "bias", None)
        whole[path] = Whole(
            weight=weight.detach().float().clone(),
            bias=None if bias is None else bias.detach().float().clone(),
        )
    if config.ensure_weight_tying:
        whole = _tied(decoder, table, whole)
    token_rows = {}
    for path, ids in config.token_rows(embedding, head).items():
        if ids[-1] >= decoder.config.vocab_size or ids[0] < 0:
            raise OptionError(
                f"trainable_token_indices: {ids[-1] if ids[0] >= 0 else ids[0]} is no token of this "
                f"model; they are 0 to {decoder.config.vocab_size - 1}."
            )
        owner: Weighted = decoder.embed_tokens if path == embedding else decoder.lm_head
        kept = torch.cat([owner.float_rows(slice(token, token + 1)) for token in ids])
        token_rows[path] = TokenRows(ids=torch.tensor(ids, device=kept.device), rows=kept.clone())
    weights = Weights(parts=parts, whole=whole, token_rows=token_rows)
    attach(decoder, table, weights, index=index, dropout=config.lora_dropout)


def _new_part(
    module: Linear,
    start: int,
    rows: int,
    columns: int,
    *,
    config: LoraConfig,
    path: str,
    generator: torch.Generator,
) -> Part:
    rank, scale, device = (
        config.rank_of(path),
        config.scale_of(path),
        module.float_rows(slice(0, 1)).device,
    )
    a = torch.empty(rank, columns)
    if config.init_lora_weights == "gaussian":
        a.normal_(0.0, 1 / rank, generator=generator)
    else:
        bound = 1 / math.sqrt(columns)
        a.uniform_(-bound, bound, generator=generator)
    part = Part(a=a.to(device), b=torch.zeros(rows, rank, device=device), scale=scale)
    if config.pissa_iterations is not None:
        weight = module.float_rows(slice(start, start + rows))
        a, b = _principal(weight, rank, scale, config.pissa_iterations, generator)
        part = replace(part, a=a, b=b, initial=(a.clone(), b.clone()))
    if config.use_dora:
        part = replace(part, magnitude=row_lengths(module, part, start))
    return part


def _principal(
    weight: Tensor, rank: int, scale: float, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return A and B of the largest singular values: scale x B A is the nearest matrix of that rank."""
    if rank > min(weight.shape):
        raise OptionError(f"the rank {rank} is larger than a weight of {list(weight.shape)}.")
    if iterations == 0:
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
    else:  # Halko et al., arXiv 0909.4061
        more = min(rank + MORE_DIRECTIONS, *weight.shape)
        drawn = torch.randn(weight.shape[1], more, generator=generator).to(weight.device)
        found = torch.linalg.qr(weight @ drawn).Q
        for _ in range(iterations):
            found = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ found).Q).Q
        inner, values, v = torch.linalg.svd(found.t() @ weight, full_matrices=False)
        u = found @ inner
    root = (values[:rank] / scale).sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def _split(part: Part, rank: int) -> Part:
    """Return a part of files, of twice the rank, as what was learnt and what is taken away."""
    return replace(
        part,
        a=part.a[:rank].clone(),
        b=part.b[:, :rank].clone(),
        initial=(part.a[rank:].clone(), -part.b[:, rank:]),
    )


def token_rows_of(path: str, files: AdapterFiles, rows: Tensor) -> TokenRows:
    """Return the rows of single tokens of a module in order; CheckpointError where ids lack."""
    given = files.config.trainable_token_indices
    if isinstance(given, Mapping):
        given = next((ids for name, ids in given.items() if path.endswith(name)), ())
    if len(given) != len(rows):
        raise CheckpointError(
            f"{files.folder}: the adapter has {len(rows)} rows of {path}, and its "
            f"trainable_token_indices are {len(given)}."
        )
    ids, order = torch.tensor(given, dtype=torch.int64).sort()
    return TokenRows(ids=ids.to(rows.device), rows=rows[order.to(rows.device)])


def _tied(
    decoder: Decoder, table: Mapping[str, Source], whole: Mapping[str, Whole]
) -> dict[str, Whole]:
    """Return whole modules with the head's weight that of the embedding, where the model's are tied."""
    embedding, head = (_path(table, f"{name}.weight") for name in ("embed_tokens", "lm_head"))
    if not decoder.config.tie_embeddings or embedding not in whole:
        return dict(whole)
    return {**whole, head: whole[embedding]}


def _path(table: Mapping[str, Source], name: str) -> str:
    return paths_of(table[name])[0] if name in table else ""


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
    held = attached(decoder, table, index)
    values: dict[str, Tensor] = {}
    for path, part in held.parts.items():
        if part.initial is not None:
            a, b = part.initial
            part = replace(part, a=torch.cat([part.a, a]), b=torch.cat([part.b, -b], dim=1))
        if path in orders:
            part = _reordered(part, partial(to_file_order, source=orders[path]))
        values[path + A], values[path + B] = part.a, part.b
        if part.magnitude is not None:
            values[path + MAGNITUDE] = part.magnitude
    for path, whole in held.whole.items():
        values[f"{path}.weight"] = whole.weight
        if whole.bias is not None:
            values[f"{path}.bias"] = whole.bias
    for path, item in held.token_rows.items():
        values[path + TOKEN_ROWS] = item.rows
    tensors = [
        TensorData(
            name=f"{PREFIX}{name}",
            dtype=DTYPE_NAMES[value.dtype],
            shape=tuple(value.shape),
            read=_reader(value.detach()),
        )
        for name, value in values.items()
    ]
    write_tensors(folder / WEIGHTS, tensors)
    config = replace(config.in_files(), trainable_token_indices=_ascending(config))
    write_json(folder / ADAPTER_CONFIG, config.as_json())


def _reader(value: Tensor) -> Callable[[], memoryview]:
    return lambda: bytes_of(value)


def _reordered(part: Part, reorder: Callable[[Tensor], Tensor]) -> Part:
    """Return a part with its rows in another order: of B, and of DoRA's lengths."""
    length = part.magnitude
    return replace(part, b=reorder(part.b), magnitude=None if length is None else reorder(length))


def _ascending(config: LoraConfig) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Return the tokens whose rows learn in the order in which the rows are written."""
    given = config.trainable_token_indices
    if isinstance(given, Mapping):
        return {name: tuple(sorted(set(ids))) for name, ids in given.items()}
    return tuple(sorted(set(given)))


def _orders(decoder: Decoder, table: Mapping[str, Source]) -> dict[str, Source]:
    """Return the sources of products whose rows lie in another order in files, by their paths."""
    return {
        path: source
        for _, source in products(decoder, table)
        if source.layout == "heads"
        for path in paths_of(source)
    }
