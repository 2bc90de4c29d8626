"""Adapters of a whole decoder: products by the names that files have, fused weights included."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hanok.errors import CheckpointError, UnsupportedError
from hanok.models.decoder import Decoder
from hanok.models.family import Source
from hanok.models.linear import Linear
from hanok.models.lora import Adapter, Lora, Part

SHOWN_NAMES = 4


def products(decoder: Decoder, sources: Mapping[str, Source]) -> Iterator[tuple[Linear, Source]]:
    """Yield the products that may have an adapter, each with the names of its parts in files."""
    for name, source in sources.items():
        path = name.removesuffix(".weight")
        module = decoder.get_submodule(path) if path.endswith("_proj") else None
        if path != name and isinstance(module, Linear):
            yield module, source


def paths_of(source: Source) -> list[str]:
    """Return the paths of a product's parts, as adapters name them."""
    return [name.removesuffix(".weight") for name in source.names]


def attach(
    decoder: Decoder,
    sources: Mapping[str, Source],
    parts: Mapping[str, Part],
    *,
    index: int,
    dropout: float = 0.0,
) -> None:
    """Let the decoder's products hold an adapter under an index.

    `parts` are by the paths of the products in files, such as model.layers.0.self_attn.q_proj; rows of B
    are in the order of the decoder's. `ForwardBatch.adapters` then chooses the adapter, or `activate`.
    Raises CheckpointError for parts that fit nowhere, or have another shape than the base asks for.
    """
    left, made = set(parts), list[tuple[Linear, Adapter]]()
    for module, source in products(decoder, sources):
        paths = paths_of(source)
        found = [parts.get(path) for path in paths]
        if not any(found):
            continue
        if module.lora is not None and str(index) in module.lora.adapters:
            raise ValueError(f"adapter {index} is attached already; detach it first")
        for path, part, rows in zip(paths, found, source.rows, strict=True):
            if part is not None:
                _check(path, part, (rows, source.shape[1]))
        made.append((module, Adapter(found, source.rows, dropout=dropout)))
        left -= set(paths)
    if left:
        shown = ", ".join(sorted(left)[:SHOWN_NAMES])
        raise CheckpointError(
            f"{len(left)} products of the adapter belong to no projection of this model: {shown}. Check "
            "that it was trained on this base."
        )
    for module, adapter in made:
        if module.lora is None:
            module.lora = Lora()
        module.lora.add(index, adapter)
    decoder.weights_changed()


def attached(decoder: Decoder, sources: Mapping[str, Source], index: int) -> dict[str, Part]:
    """Return the parts of an adapter, views of its parameters, as `attach` takes them."""
    found: dict[str, Part | None] = {}
    for module, source in products(decoder, sources):
        held = {} if module.lora is None else dict(module.lora.adapters.items())
        adapter = held.get(str(index))
        if isinstance(adapter, Adapter):
            found |= dict(zip(paths_of(source), adapter.parts(), strict=True))
    return {path: part for path, part in found.items() if part is not None}


def activate(decoder: Decoder, index: int | None) -> None:
    """Let an adapter be that of every token whose batch names none; None: of no token."""
    for module in decoder.modules():
        if isinstance(module, Lora):
            module.active = index
    decoder.weights_changed()


def detach(decoder: Decoder, index: int) -> None:
    """Remove an adapter from every product that has it."""
    for module in decoder.modules():
        if isinstance(module, Linear) and module.lora is not None:
            if str(index) in module.lora.adapters:
                del module.lora.adapters[str(index)]
            if not module.lora.adapters:
                module.lora = None
    decoder.weights_changed()


def merge(decoder: Decoder, index: int) -> None:
    """Add an adapter to the weights of its products, and remove it.

    Raises UnsupportedError, before any weight is changed, where a product is quantized.
    """
    holders = [
        item
        for item in decoder.modules()
        if isinstance(item, Linear) and item.lora is not None and str(index) in item.lora.adapters
    ]
    if any(item.stored is not None for item in holders):
        raise UnsupportedError(
            f"adapter {index} cannot be merged into quantized weights; load the model without quant."
        )
    with torch.no_grad():
        for item in holders:
            adapter = None if item.lora is None else item.lora.adapters[str(index)]
            if isinstance(adapter, Adapter) and isinstance(item.weight, Tensor):
                item.weight.copy_(item.weight.float() + adapter.delta())
    detach(decoder, index)


def _check(path: str, part: Part, shape: tuple[int, int]) -> None:
    a, b = tuple(part.a.shape), tuple(part.b.shape)
    if a[1] != shape[1] or b != (shape[0], a[0]):
        raise CheckpointError(
            f"lora_A of {path} is {list(a)} and lora_B {list(b)}; for this base they should be [rank, "
            f"{shape[1]}] and [{shape[0]}, rank]."
        )
