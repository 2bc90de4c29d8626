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
    left = set(tensors)
    for name, source in sources.items():
        path = name.removesuffix(".weight")
        module = decoder.get_submodule(path) if path.endswith("_proj") else None
        if path == name or not isinstance(module, Linear):
            continue
        pairs = [_pair(part, tensors) for part in source.names]
        if not any(pairs):
            continue
        if source.layout == "heads":
            raise UnsupportedError(f"adapters of {path}, whose rows the files order by heads")
        used = [pair for pair in pairs if pair]
        dtype, device = decoder.dtype, decoder.device
        _check(path, source, pairs, tensors)
        adapter = Adapter(
            torch.cat([tensors[a] for a, _ in used]).to(device, dtype),
            [tensors[pair[1]].to(device, dtype) if pair else None for pair in pairs],
            source.rows,
            scale,
        )
        if module.lora is None:
            module.lora = Lora()
        module.lora.add(index, adapter)
        left -= {item for pair in used for item in pair}
    if left:
        shown = ", ".join(sorted(left)[:SHOWN_NAMES])
        raise CheckpointError(
            f"{len(left)} tensors of the adapter belong to no projection of this model: {shown}. Check "
            "that it was trained on this base."
        )
    decoder.weights_changed()


def activate(decoder: Decoder, index: int | None) -> None:
    """Let an adapter be that of every token whose batch names none; None: of no token."""
    for module in decoder.modules():
        if isinstance(module, Lora):
            module.active = index
    decoder.weights_changed()


def detach(decoder: Decoder, index: int) -> None:
    """Forget an adapter."""
    for module in decoder.modules():
        if isinstance(module, Linear) and module.lora is not None:
            module.lora.adapters.pop(str(index))
            if not module.lora.adapters:
                module.lora = None
    decoder.weights_changed()


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
