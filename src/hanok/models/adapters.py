"""Adapters of a whole decoder: modules by the names that files have, fused weights included."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hanok.errors import CheckpointError, UnsupportedError
from hanok.models.decoder import Decoder
from hanok.models.family import Source
from hanok.models.layers import NormLayer
from hanok.models.linear import Embedding, Linear
from hanok.models.lora import Adapter, Lora, Part
from hanok.models.own import OwnModule, OwnRows, OwnScores

SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A module's weights of an adapter's own, in place of the base's."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Rows of single tokens of an adapter's own."""

    ids: Tensor
    """(n,) int64, ascending."""
    rows: Tensor
    """(n, size)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of an adapter, each by the path of its module in files: model.layers.0.mlp.up_proj."""

    parts: Mapping[str, Part] = field(default_factory=dict)
    """Of products; rows of B are in the order of the decoder's."""
    whole: Mapping[str, Whole] = field(default_factory=dict)
    """Of the embedding, the head and norms."""
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    """Of the embedding, and so of a head that is tied to it; or of a head."""


def products(decoder: Decoder, sources: Mapping[str, Source]) -> Iterator[tuple[Linear, Source]]:
    """Yield the products that may have an adapter, each with the names of its parts in files."""
    for name, source in sources.items():
        path = name.removesuffix(".weight")
        if path != name and (path.endswith("_proj") or path == "lm_head"):
            module = decoder.get_submodule(path)
            if isinstance(module, Linear):
                yield module, source


def own_modules(
    decoder: Decoder, sources: Mapping[str, Source]
) -> dict[str, Embedding | Linear | NormLayer]:
    """Return by their paths in files the modules that an adapter may have weights of its own of."""
    found = {}
    for name, source in sources.items():
        path = name.removesuffix(".weight")
        if path == name:
            continue
        module = decoder.get_submodule(path)
        if isinstance(module, Embedding | NormLayer) or module is getattr(decoder, "lm_head", None):
            found[paths_of(source)[0]] = module
    return found


def paths_of(source: Source) -> list[str]:
    """Return the paths of a product's parts, as adapters name them."""
    return [name.removesuffix(".weight") for name in source.names]


def attach(
    decoder: Decoder,
    sources: Mapping[str, Source],
    weights: Weights,
    *,
    index: int,
    dropout: float = 0.0,
) -> None:
    """Let the decoder's modules hold an adapter under an index.

    `ForwardBatch.adapters` then chooses the adapter, or `activate`. Raises CheckpointError for weights
    that fit nowhere, or have another shape than the base asks for.
    """
    made = _adapters_of(decoder, sources, weights.parts, dropout)
    made += _own_of(decoder, sources, weights)
    held = [str(index) in module.lora.adapters for module, _ in made if module.lora is not None]
    if any(held):
        raise ValueError(f"adapter {index} is attached already; detach it first")
    for module, adapter in made:
        if module.lora is None:
            module.lora = Lora()
        module.lora.add(index, adapter)
    _changed(decoder, index, [module.lora for module, _ in made])


Held = Embedding | Linear | NormLayer


def _adapters_of(
    decoder: Decoder, sources: Mapping[str, Source], parts: Mapping[str, Part], dropout: float
) -> list[tuple[Held, nn.Module]]:
    left, made = set(parts), list[tuple[Held, nn.Module]]()
    for module, source in products(decoder, sources):
        paths = paths_of(source)
        found = [parts.get(path) for path in paths]
        if not any(found):
            continue
        for path, part, rows in zip(paths, found, source.rows, strict=True):
            if part is not None:
                _check(path, part, (rows, source.shape[1]))
        made.append((module, Adapter(found, source.rows, dropout=dropout)))
        left -= set(paths)
    _refuse_left(left, "projection")
    return made


def _own_of(
    decoder: Decoder, sources: Mapping[str, Source], weights: Weights
) -> list[tuple[Held, nn.Module]]:
    modules = own_modules(decoder, sources)
    _refuse_left({*weights.whole, *weights.token_rows} - modules.keys(), "embedding, head or norm")
    made = list[tuple[Held, nn.Module]]()
    shapes = {paths_of(source)[0]: source.shape for source in sources.values()}
    shared: dict[int, nn.Parameter] = {}  # of a head that stays tied to the embedding
    for path, whole in weights.whole.items():
        if tuple(whole.weight.shape) != shapes[path]:
            raise CheckpointError(
                f"the adapter's {path} is {list(whole.weight.shape)}, and the base's "
                f"{list(shapes[path])}. Check that it was trained on this base, with as many tokens."
            )
        own = shared.setdefault(id(whole.weight), nn.Parameter(whole.weight))
        made.append((modules[path], OwnModule(own, whole.bias)))
    for path, item in weights.token_rows.items():
        module, (rows, size) = modules[path], shapes[path]
        if item.rows.shape[1] != size or int(item.ids[-1]) >= rows:
            raise CheckpointError(
                f"the adapter has rows of {item.rows.shape[1]} numbers for tokens up to "
                f"{int(item.ids[-1])} of {path}, and the base's is {list(shapes[path])}. Check that it "
                "was trained on this base, with as many tokens."
            )
        of_tokens = nn.Parameter(item.rows)
        is_head = isinstance(module, Linear)
        made.append((module, (OwnScores if is_head else OwnRows)(item.ids, of_tokens)))
        if not is_head and decoder.config.tie_embeddings and decoder.config.has_head:
            made.append((decoder.lm_head, OwnScores(item.ids, of_tokens)))
    return made


def _refuse_left(left: set[str], kind: str) -> None:
    if left:
        shown = ", ".join(sorted(left)[:SHOWN_NAMES])
        raise CheckpointError(
            f"{len(left)} modules of the adapter belong to no {kind} of this model: {shown}. Check "
            "that it was trained on this base."
        )


def attached(decoder: Decoder, sources: Mapping[str, Source], index: int) -> Weights:
    """Return the weights of an adapter, views of its parameters, as `attach` takes them."""
    parts: dict[str, Part | None] = {}
    for module, source in products(decoder, sources):
        adapter = _held(module, index)
        if isinstance(adapter, Adapter):
            parts |= dict(zip(paths_of(source), adapter.parts(), strict=True))
    whole, token_rows = {}, {}
    embeddings = getattr(_held(decoder.embed_tokens, index), "rows", None)
    for path, owner in own_modules(decoder, sources).items():
        own = _held(owner, index)
        if isinstance(own, OwnModule):
            whole[path] = Whole(weight=own.weight, bias=own.bias)
        elif isinstance(own, OwnRows) and (type(own) is OwnRows or own.rows is not embeddings):
            token_rows[path] = TokenRows(ids=own.ids, rows=own.rows)
    found = {path: part for path, part in parts.items() if part is not None}
    return Weights(parts=found, whole=whole, token_rows=token_rows)


def activate(decoder: Decoder, index: int | None) -> None:
    """Let an adapter be that of every token whose batch names none; None: of no token."""
    for module in decoder.modules():
        if isinstance(module, Lora):
            module.active = index
    decoder.weights_changed()


def activated(decoder: Decoder) -> int | None:
    """Return which adapter is that of tokens whose batch names none, or -1.

    None where no product has any.
    """
    found = [module.active for module in decoder.modules() if isinstance(module, Lora)]
    return next((index for index in found if index is not None), -1) if found else None


def detach(decoder: Decoder, index: int) -> None:
    """Remove an adapter from every module that has it."""
    changed = []
    for module in decoder.modules():
        if isinstance(module, Held) and module.lora is not None:
            if str(index) in module.lora.adapters:
                changed.append(module.lora)
                del module.lora.adapters[str(index)]
            if not module.lora.adapters:
                module.lora = None
    _changed(decoder, index, changed)


def _changed(decoder: Decoder, index: int, loras: Sequence[Lora | None]) -> None:
    """Say what came or went: nothing that others have computed, unless all used that adapter."""
    if any(item is not None and item.active == index for item in loras):
        decoder.weights_changed()
    else:
        decoder.adapters_changed()


def merge(decoder: Decoder, index: int) -> None:
    """Add an adapter to the weights of its products, and remove it.

    Raises UnsupportedError, before any weight is changed, where a product is quantized, or where the
    adapter has weights of its own beside them.
    """
    holders = [
        item
        for item in decoder.modules()
        if isinstance(item, Held) and _held(item, index) is not None
    ]
    if any(isinstance(item, Linear) and item.stored is not None for item in holders):
        raise UnsupportedError(
            f"adapter {index} cannot be merged into quantized weights; load the model without quant."
        )
    if any(not isinstance(_held(item, index), Adapter) for item in holders):
        raise UnsupportedError(
            f"adapter {index} has weights of its own (modules_to_save, trainable_token_indices); merge "
            "it as files: hanok merge."
        )
    with torch.no_grad():
        for item in holders:
            adapter = _held(item, index)
            if isinstance(adapter, Adapter) and isinstance(item, Linear):
                assert isinstance(item.weight, Tensor)
                item.weight.copy_(adapter.merged(item))
    detach(decoder, index)
    decoder.weights_changed()


def _held(module: Held, index: int) -> nn.Module | None:
    adapters = {} if module.lora is None else dict(module.lora.adapters.items())
    return adapters.get(str(index))


def _check(path: str, part: Part, shape: tuple[int, int]) -> None:
    a, b = tuple(part.a.shape), tuple(part.b.shape)
    if a[1] != shape[1] or b != (shape[0], a[0]):
        raise CheckpointError(
            f"lora_A of {path} is {list(a)} and lora_B {list(b)}; for this base they should be [rank, "
            f"{shape[1]}] and [{shape[0]}, rank]."
        )
    if part.magnitude is not None and part.magnitude.shape != (shape[0],):
        raise CheckpointError(
            f"lora_magnitude_vector of {path} is {list(part.magnitude.shape)}; for this base it should "
            f"be [{shape[0]}]."
        )
