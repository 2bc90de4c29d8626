"""Builds a decoder from a checkpoint: on `meta` first, then tensor by tensor, every name accounted for.

A weight whose bytes lie in the file as the decoder wants them stays mapped; the rest is read into one
arena (see `tensors.py`). Host memory beyond the weights is one tensor for each of NUM_READERS threads.
"""

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

import torch
from torch import Tensor

from hanok.attention.base import AttentionSpec, choose, why_not_table
from hanok.checkpoint.files import Checkpoint, TensorRef
from hanok.errors import CheckpointError, OptionError, UnsupportedError
from hanok.kernels.native import why_not
from hanok.memory.promote import MappedWeight, Promotion, available_bytes
from hanok.memory.quantize import Swapped, quantize_source, swap
from hanok.memory.tensors import Arena, MappedFiles, dtype_of, from_file_order, read_into
from hanok.models.config import DTYPE_BYTES, ModelConfig
from hanok.models.decoder import Block, Decoder
from hanok.models.family import Family, Source, read_config, sources
from hanok.quant.recipe import Recipe

Progress = Callable[[int], None]
Weights = Literal["auto", "mapped", "copied"]
SHOWN_NAMES = 8
NUM_READERS = 2  # threads; two fault in and fill pages nearly twice as fast as one


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What loading did, and what it decided on the user's behalf."""

    mapped_bytes: int
    copied_bytes: int
    quantized_bytes: int
    attention: Mapping[str, int]
    """How many layers use which attention backend."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A decoder with its weights, and where they came from."""

    decoder: Decoder
    family: Family
    sources: Mapping[str, Source]
    report: LoadReport
    promotion: Promotion | None
    """Moves the mapped weights into memory once the model has answered; None: they stay."""


def load_decoder(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attention: str = "auto",
    weights: Weights = "auto",
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Return the decoder of a checkpoint, ready to run.

    `dtype` is a torch name or "auto" (what config.json declares, else what the file holds; float16
    becomes bfloat16 on a CPU). `weights` says whether bytes that can stay in the file do: "mapped", read
    at once: "copied", or "auto": mapped, and moved into memory after the first answer if twice their
    bytes are available. `recipe` says which weights are quantized on the way. `progress` is called
    with the bytes of each weight placed. Raises CheckpointError for tensors that are missing, left over
    or of the wrong shape.
    """
    family, config = read_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    table = sources(family, config, checkpoint.tensors)
    notes: list[str] = []
    account_for(checkpoint, family, config, table)
    target_device = _choose_device(device)
    target_dtype = _choose_dtype(checkpoint, config, dtype, target_device, notes)
    with torch.device("meta"):
        decoder = Decoder(config)
    if weights not in ("auto", "mapped", "copied"):
        raise OptionError(f"weights {weights!r} is unknown. Choose auto, mapped or copied.")
    swapped = swap(decoder, table, recipe, target_device, target_dtype)
    placer = _Placer(checkpoint, target_dtype, target_device, weights != "copied")
    with ThreadPoolExecutor(NUM_READERS) as pool:
        mapped = _place_floats(decoder, placer, swapped.floats, pool, progress)
        _quantize(checkpoint, swapped, pool, progress)
    decoder.tie()
    decoder.eval()
    used = decoder.use_attention(attention)
    notes += _fallback_notes(decoder, attention, used)
    mapped_bytes = sum(weight.parameter.nbytes for weight in mapped)
    quantized_bytes = sum(item.stored.nbytes for item in swapped.quantized)
    report = LoadReport(
        mapped_bytes=mapped_bytes,
        copied_bytes=sum(parameter.nbytes for parameter in decoder.parameters()) - mapped_bytes,
        quantized_bytes=quantized_bytes,
        attention=used,
        notes=tuple(notes),
    )
    moves = weights == "auto" and bool(mapped) and available_bytes() > 2 * mapped_bytes
    return Loaded(
        decoder=decoder,
        family=family,
        sources=table,
        report=report,
        promotion=Promotion(mapped, placer.files) if moves else None,
    )


def _place_floats(
    decoder: Decoder,
    placer: "_Placer",
    table: Mapping[str, Source],
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> list[MappedWeight]:
    """Place the weights that keep their floats, in file order; return those that stay mapped."""
    order = sorted(table, key=lambda name: _file_position(placer.tensors, table[name]))
    placer.claim([table[name] for name in order])
    mapped: list[MappedWeight] = []
    placed = pool.map(placer.place, [table[name] for name in order])
    for name, weight in zip(order, placed, strict=True):
        module_path, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        if placer.is_mapped(table[name]):
            ref = placer.tensors[table[name].names[0]]
            mapped.append(MappedWeight(parameter=parameter, ref=ref))
        decoder.get_submodule(module_path).register_parameter(leaf, parameter)
        if progress is not None:
            progress(weight.nbytes)
    return mapped


def _quantize(
    checkpoint: Checkpoint, swapped: Swapped, pool: ThreadPoolExecutor, progress: Progress | None
) -> None:
    """Quantize what the recipe asked for, in file order."""
    order = sorted(
        swapped.quantized, key=lambda item: _file_position(checkpoint.tensors, item.source)
    )
    for size in pool.map(lambda item: quantize_source(checkpoint.tensors, item), order):
        if progress is not None:
            progress(size)


def _fallback_notes(decoder: Decoder, attention: str, used: Mapping[str, int]) -> list[str]:
    """Say what runs slower than it could: our kernels missing, layers without the usual backend."""
    notes = []
    missing = why_not() if decoder.device.type == "cpu" else None
    if missing is not None:
        notes.append(f"hanok's kernels are {missing}")
    plain = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=64, scale=1.0)
    preferred = choose(attention, plain, decoder.device, decoder.dtype).name
    if attention == "auto" and set(used) != {preferred}:
        specs = {block.self_attn.spec for block in decoder.layers if isinstance(block, Block)}
        tables = [why_not_table(spec, decoder.device, decoder.dtype) for spec in specs]
        reasons = {reason for table in tables if (reason := table[preferred])}
        others = ", ".join(f"{name} in {count} layers" for name, count in used.items())
        because = " and ".join(sorted(reasons))
        notes.append(f"attention: {others}, because {preferred} {because}")
    return notes


def account_for(
    checkpoint: Checkpoint, family: Family, config: ModelConfig, table: Mapping[str, Source]
) -> None:
    """Raise CheckpointError unless files and decoder agree on every tensor's name and shape."""
    expected = {
        name: shape
        for source in table.values()
        for name, shape in zip(source.names, source.file_shapes(), strict=True)
    }
    missing = [name for name in expected if name not in checkpoint.tensors]
    left_over = [
        name
        for name in checkpoint.tensors
        if name not in expected
        and not any(re.fullmatch(pattern, name) for pattern in family.ignored_tensors)
        and not _is_tied_head(name, checkpoint, family, config, table)
    ]
    wrong = [
        f"{name} is {list(checkpoint.tensors[name].shape)} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in checkpoint.tensors and checkpoint.tensors[name].shape != shape
    ]
    complaints = [
        f"{len(items)} {what}: {_shown(items)}"
        for what, items in (
            ("missing", missing),
            ("of the wrong shape", wrong),
            ("left over", left_over),
        )
        if items
    ]
    if complaints:
        raise CheckpointError(
            f"{checkpoint.folder}: the tensors are not those of the {config.model_type} model that "
            f"config.json describes. {'; '.join(complaints)}. Check that config.json and the weights "
            "belong together and that every file was downloaded."
        )


def _is_tied_head(
    name: str,
    checkpoint: Checkpoint,
    family: Family,
    config: ModelConfig,
    table: Mapping[str, Source],
) -> bool:
    """Return whether `name` is a second copy of the embedding, which ties allow when it is the same."""
    if not config.tie_embeddings or name != f"{family.names['lm_head']}.weight":
        return False
    embedding_name = table["embed_tokens.weight"].names[0]
    if embedding_name not in checkpoint.tensors:
        return False
    files = MappedFiles()
    head = files.view(checkpoint.tensors[name])
    embedding = files.view(checkpoint.tensors[embedding_name])
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json ties the head to the embedding, but {name} differs "
            "from it. Set tie_word_embeddings to false to use both, or delete the tensor."
        )
    return True


def _choose_dtype(
    checkpoint: Checkpoint, config: ModelConfig, dtype: str, device: torch.device, notes: list[str]
) -> torch.dtype:
    stored = [dtype_of(ref) for ref in checkpoint.tensors.values()]
    floats = [item for item in stored if item.is_floating_point]
    declared = config.dtype or (str(floats[0]).removeprefix("torch.") if floats else "float32")
    name = dtype
    if dtype == "auto":
        name = declared if declared in DTYPE_BYTES else "float32"
        if name == "float16" and device.type == "cpu":
            name = "bfloat16"
            notes.append(
                "dtype: bfloat16 instead of the file's float16, which CPUs multiply several times "
                "slower; choose float32 for the exact values"
            )
    if name not in DTYPE_BYTES:
        raise OptionError(f"dtype {name!r} is unknown. Choose auto, {', '.join(DTYPE_BYTES)}.")
    found: torch.dtype = getattr(torch, name)
    return found


def _choose_device(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device {device!r} is not a device: {error}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device!r} was asked for, but torch finds no CUDA device.")
    return torch.device("cpu") if found.type == "cpu" else found  # "cpu:0" is no other place


def _file_position(tensors: Mapping[str, TensorRef], source: Source) -> tuple[str, int]:
    ref = tensors[source.names[0]]
    return str(ref.path), ref.offset_bytes


class _Placer:
    """Puts weights where they will live, and counts the bytes of each way."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, may_map: bool
    ) -> None:
        self.tensors = checkpoint.tensors
        self.may_map = may_map
        self.dtype = dtype
        self.device = device
        self.files = MappedFiles()
        self.arena: Arena | None = None

    def claim(self, all_sources: list[Source]) -> None:
        """Claim the arena for every weight that cannot stay mapped."""
        if self.device.type == "cpu":
            sizes = [prod(item.shape) for item in all_sources if not self.is_mapped(item)]
            self.arena = Arena(sum(sizes) * self.dtype.itemsize, len(sizes))

    def place(self, source: Source) -> Tensor:
        """Return the weight of a source in its final place, dtype and order."""
        if self.may_map and self._fits_as_it_is(source):
            weight = self.files.view(self.tensors[source.names[0]], self._num_bytes(source))
            weight = weight.view(source.shape)
        else:
            weight = self._read(source)
        return weight if weight.device == self.device else weight.to(self.device)

    def _num_bytes(self, source: Source) -> int:
        return prod(source.shape) * self.dtype.itemsize

    def is_mapped(self, source: Source) -> bool:
        """Return whether the weight stays in the file."""
        return self.may_map and self.device.type == "cpu" and self._fits_as_it_is(source)

    def _fits_as_it_is(self, source: Source) -> bool:
        refs = [self.tensors[name] for name in source.names]
        keeps_order = source.layout == "rows" or (
            source.layout == "columns" and len(source.shape) == 1
        )
        return (
            keeps_order
            and all(dtype_of(ref) == self.dtype and ref.strides is None for ref in refs)
            and _is_aligned(refs[0])
            and _lie_together(refs)
        )

    def _read(self, source: Source) -> Tensor:
        refs = [self.tensors[name] for name in source.names]
        make = torch.empty if self.arena is None else self.arena.empty
        target: Tensor = make(source.shape, dtype=self.dtype)
        if source.layout == "rows":
            start = 0
            for ref, rows in zip(refs, source.rows, strict=True):
                read_into(ref, target[start : start + rows])
                start += rows
            return target
        stored = torch.empty(source.file_shapes()[0], dtype=self.dtype)
        read_into(refs[0], stored)
        return target.copy_(from_file_order(stored, source))


def _is_aligned(ref: TensorRef) -> bool:
    """Return whether the bytes start at a multiple of the item's size, as vector loads may assume."""
    return ref.offset_bytes % dtype_of(ref).itemsize == 0


def _lie_together(refs: list[TensorRef]) -> bool:
    return all(
        first.path == second.path and first.offset_bytes + first.size_bytes == second.offset_bytes
        for first, second in pairwise(refs)
    )


def _shown(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN_NAMES} more" if len(items) > SHOWN_NAMES else ""
    return ", ".join(items[:SHOWN_NAMES]) + more
