"""Adapters of a whole decoder: tensors under PEFT's names find their places, fused weights included."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hanok.errors import CheckpointError, UnsupportedError
from hanok.models.decoder import Decoder
from hanok.models.family import Source
from hanok.models.linear import Linear
from hanok.models.lora import Adapter, Lora

PREFIX = "base_model.model."
SHOWN_NAMES = 4


def attach(
    decoder: Decoder,
    sources: Mapping[str, Source],
    tensors: Mapping[str, Tensor],
    *,
    index: int,
    scale: float,
) -> None:
    """Let the decoder's products hold an adapter under an index.

    `tensors` are lora_A (rank, in) and lora_B (out, rank) by PEFT's names, `scale` is lora_alpha / rank.
    `ForwardBatch.adapters` then chooses it, or `activate`. Raises CheckpointError for tensors that fit
    nowhere, or have another shape than the base asks for.
    """
    left, made = set(tensors), list[tuple[Linear, Adapter]]()
    for name, source in sources.items():
        path = name.removesuffix(".weight")
        module = decoder.get_submodule(path) if path.endswith("_proj") else None
        if path == name or not isinstance(module, Linear):
            continue
        pairs = [_pair(part, tensors) for part in source.names]
        if not any(pairs):
            continue
        if source.layout == "heads":
            raise UnsupportedError(
                f"adapters of {path} are not read yet: its files order rows by heads. Merge the adapter "
                "into its base elsewhere, and load the result."
            )
        if module.lora is not None and str(index) in module.lora.adapters:
            raise ValueError(f"adapter {index} is attached already; detach it first")
        used = [pair for pair in pairs if pair]
        dtype, device = decoder.dtype, decoder.device
        _check(path, source, pairs, tensors)
        adapter = Adapter(
            torch.cat([tensors[a] for a, _ in used]).to(device, dtype),
            [tensors[pair[1]].to(device, dtype) if pair else None for pair in pairs],
            source.rows,
            scale,
        )
        made.append((module, adapter))
        left -= {item for pair in used for item in pair}
    if left:
        shown = ", ".join(sorted(left)[:SHOWN_NAMES])
        raise CheckpointError(
            f"{len(left)} tensors of the adapter belong to no projection of this model: {shown}. Check "
            "that it was trained on this base."
        )
    for module, adapter in made:
        if module.lora is None:
            module.lora = Lora()
        module.lora.add(index, adapter)
    decoder.weights_changed()


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


def _pair(part: str, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    base = PREFIX + part.removesuffix(".weight")
    a, b = f"{base}.lora_A.weight", f"{base}.lora_B.weight"
    return (a, b) if a in tensors and b in tensors else None


def _check(
    path: str,
    source: Source,
    pairs: list[tuple[str, str] | None],
    tensors: Mapping[str, Tensor],
) -> None:
    for pair, rows in zip(pairs, source.rows, strict=True):
        if pair is None:
            continue
        a, b = (tuple(tensors[name].shape) for name in pair)
        if a[1] != source.shape[1] or b != (rows, a[0]):
            raise CheckpointError(
                f"{pair[0]} is {list(a)} and {pair[1]} {list(b)}; for {path} of this base they "
                f"should be [rank, {source.shape[1]}] and [{rows}, rank]."
            )
