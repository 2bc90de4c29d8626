"""Builds a decoder from a checkpoint: on `meta` first, then tensor by tensor, every name accounted for.

A plan says where each unit goes; without one everything goes to the CPU. A weight whose bytes lie in
the file as the decoder wants them stays mapped; the rest is read into one arena (see `tensors.py`). Host
memory beyond the weights is one tensor for each of NUM_READERS threads.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from hanok.attention.base import AttentionSpec, choose, why_not_table
from hanok.checkpoint.files import Checkpoint, TensorRef
from hanok.errors import CheckpointError, UnsupportedError
from hanok.kernels.native import why_not
from hanok.memory.account import Understood, tied_head_error
from hanok.memory.budget import host_budget
from hanok.memory.heap import trim_heap
from hanok.memory.needs import choose_dtype, stays_as_it_is, unit_of
from hanok.memory.offload import Streamer
from hanok.memory.options import LoadOptions
from hanok.memory.plan import HOST_KINDS, LoadPlan
from hanok.memory.planning import GPU_LIBRARY_BYTES, NUM_READERS
from hanok.memory.promote import MappedWeight, Promotion
from hanok.memory.quantize import QuantizedSource, quantize_source, swap
from hanok.memory.tensors import Arena, MappedFiles, read_parameter
from hanok.memory.threads import set_threads
from hanok.memory.watch import Watchdog
from hanok.models.config import ModelConfig
from hanok.models.decoder import Decoder, DeviceLayout, Execution, Stage
from hanok.models.family import Family, Source
from hanok.quant.recipe import read_recipe

Progress = Callable[[int], None]
CPU = torch.device("cpu")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What loading did, and what it decided on the user's behalf."""

    mapped_bytes: int
    copied_bytes: int
    quant: str | None
    """How weights were quantized, as it was asked for."""
    quantized_bytes: int
    attention: Mapping[str, int]
    """How many layers use which attention backend."""
    notes: tuple[str, ...]
    seconds: float
    planned_bytes: int | None
    """What loading was planned to claim of the host's memory at the most; None: there was no plan."""
    peak_bytes: int
    """What it claimed at the most: mapped files are no part of it."""
    held_bytes: int
    """What was still claimed at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A decoder with its weights, and where they came from."""

    decoder: Decoder
    family: Family
    sources: Mapping[str, Source]
    left_out: tuple[TensorRef, ...]
    """Weights in the files that the decoder does not use."""
    report: LoadReport
    promotion: Promotion | None
    """Moves the mapped weights into memory once the model has answered; None: they stay."""
    streamer: Streamer | None
    """Reads the units that stay on disk; None: all are in memory."""


def load_decoder(
    found: Understood,
    options: LoadOptions | None = None,
    *,
    plan: LoadPlan | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Return the decoder of a checkpoint, ready to run.

    `plan` says where each unit goes; without one everything goes to the CPU. Weights of "auto" are
    mapped, and moved into memory after the first answer if twice their bytes are available; float16 of
    "auto" becomes bfloat16 on a CPU. Units on disk are read anew in every pass, and not quantized.
    `progress` is called with the bytes of each weight placed. Raises CheckpointError for a head that
    differs from the embedding it is tied to, UnsupportedError for a plan with a device that is not here,
    BudgetError when memory runs out.
    """
    started = time.perf_counter()
    options = options or LoadOptions()
    checkpoint = found.checkpoint
    family, config, table = found.family, found.config, found.table
    _check_tied_head(found)
    recipe = None if options.quant is None else read_recipe(options.quant)
    places = _Places(plan)
    notes = list(found.notes)
    if recipe is not None and recipe.names_head and not config.has_head:
        notes.append(f"quant: {recipe.text} says what becomes of a head, and this model has none")
    used_threads = set_threads(options.threads)
    if used_threads.is_held_by_quota:
        notes.append(f"threads: {used_threads}")
    target_dtype = _dtype(checkpoint, config, options.dtype, places.is_on_cpu, notes)
    streamed, kept = _parted(table, places)
    layout = places.layout(config.num_layers)
    with torch.device("meta"):
        execution = Execution(
            layout=layout,
            cache_dtype=torch.int8 if options.cache_dtype == "int8" else None,
            records_passes=options.graphs,
            is_streamed=bool(streamed),
        )
        decoder = Decoder(config, execution)
    swapped = swap(decoder, kept, recipe, places.device_of, target_dtype)
    placer = _Placer(checkpoint, target_dtype, places, options.weights != "copied")
    planned = None if plan is None else _planned_bytes(plan)
    with (
        Watchdog(planned, host_budget) as watchdog,
        ThreadPoolExecutor(NUM_READERS, thread_name_prefix="hanok-load") as pool,
    ):
        work = _Work(pool, watchdog, progress)
        mapped = _place_floats(decoder, placer, swapped.floats, work)
        folder = options.cache_packed
        if folder is None or not swapped.quantized:
            _quantize(checkpoint, swapped.quantized, work)
        else:
            notes += _quantize_once(checkpoint, swapped.quantized, work, folder, str(recipe))
        streamer = None
        if streamed:
            runner = places.device_of(next(iter(streamed)))
            streamer = Streamer(decoder, streamed, checkpoint.tensors, target_dtype, runner)
        trim_heap()
    decoder.tie()
    decoder.eval()
    used = decoder.use_attention(options.attn_implementation)
    notes += _fallback_notes(decoder, options.attn_implementation, used)
    mapped_bytes = sum(weight.parameter.nbytes for weight in mapped)
    report = LoadReport(
        mapped_bytes=mapped_bytes,
        copied_bytes=sum(parameter.nbytes for parameter in decoder.parameters()) - mapped_bytes,
        quant=options.quant,
        quantized_bytes=sum(item.stored.nbytes for item in swapped.quantized),
        attention=used,
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
        planned_bytes=planned,
        peak_bytes=watchdog.peak_bytes,
        held_bytes=watchdog.held_bytes,
    )
    may_move = options.weights == "auto" and not streamed and bool(mapped)
    moves = may_move and host_budget().num_bytes > 2 * mapped_bytes
    return Loaded(
        decoder=decoder,
        family=family,
        sources=table,
        left_out=tuple(ref for refs in found.left_out.values() for ref in refs),
        report=report,
        promotion=Promotion(decoder, mapped, placer.files) if moves else None,
        streamer=streamer,
    )


def _planned_bytes(plan: LoadPlan) -> int:
    """Return the host memory that a plan allows loading to use besides mapped files."""
    libraries = GPU_LIBRARY_BYTES if plan.runner.kind == "gpu" else 0
    return libraries + sum(
        tier.weight_bytes - tier.mapped_bytes + tier.load_bytes + tier.stream_bytes
        for tier in plan.tiers
        if tier.place.kind in HOST_KINDS
    )


class _Places:
    """Where a plan puts each unit, as torch devices."""

    def __init__(self, plan: LoadPlan | None) -> None:
        self._units = plan.units if plan is not None else {}
        self._runner = plan.runner.name if plan is not None else "cpu"
        for name in {*self._units.values(), self._runner} - {"disk"}:
            _check_device(name)
        self.is_on_cpu = _device(self._runner).type == "cpu"

    def is_streamed(self, parameter: str) -> bool:
        """Return whether a parameter stays on disk."""
        return self._units.get(unit_of(parameter)) == "disk"

    def device_of(self, name: str) -> torch.device:
        """Return where a parameter or unit is computed with."""
        return _device(self._name_of(unit_of(name)))

    def layout(self, num_layers: int) -> DeviceLayout | None:
        """Return which device computes what; None where one computes everything."""
        computing = [self._name_of(unit) for unit in self._units]
        if len(set(computing)) < 2:
            return None
        blocks = range(num_layers)
        runs = [
            (name, list(run))
            for name, run in groupby(blocks, key=lambda index: self._name_of(f"layers.{index}"))
        ]
        head = "lm_head" if "lm_head" in self._units else "embed_tokens"
        return DeviceLayout(
            stages=tuple(
                Stage(
                    device=_device(name),
                    blocks=range(run[0], run[-1] + 1),
                    core=int(name.removeprefix("core:")) if name.startswith("core:") else None,
                )
                for name, run in runs
            ),
            embed_device=self.device_of("embed_tokens"),
            head_device=self.device_of(head),
        )

    def _name_of(self, unit: str) -> str:
        name = self._units.get(unit, self._runner)
        return self._runner if name == "disk" else name


def _device(place: str) -> torch.device:
    return torch.device("cuda", int(place)) if place.isdigit() else CPU


def _check_device(place: str) -> None:
    if place.isdigit() and int(place) >= torch.cuda.device_count():
        raise UnsupportedError(
            f"the plan uses GPU {place}, but torch finds {torch.cuda.device_count()} GPUs here. Plan "
            "again on this machine: `hanok plan` without --device."
        )


@dataclass(frozen=True, slots=True)
class _Work:
    """The loader, its watchdog, and its progress callback."""

    pool: ThreadPoolExecutor
    watchdog: Watchdog
    progress: Progress | None

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in order; when one fails or the caller stops, the rest is not begun."""

        def run(item: Item) -> Result:
            self.watchdog.check()
            return function(item)

        futures = [self.pool.submit(run, item) for item in items]
        try:
            for future in futures:
                yield future.result()
            self.watchdog.check()
        finally:
            for future in futures:
                future.cancel()

    def done(self, num_bytes: int) -> None:
        """Report that so many bytes are in place."""
        if self.progress is not None:
            self.progress(num_bytes)


def _parted(
    table: Mapping[str, Source], places: _Places
) -> tuple[dict[str, dict[str, Source]], dict[str, Source]]:
    """Return the parameters of each unit that stays on disk, and those that are loaded."""
    streamed: dict[str, dict[str, Source]] = {}
    kept: dict[str, Source] = {}
    for name, source in table.items():
        if places.is_streamed(name):
            streamed.setdefault(unit_of(name), {})[name] = source
        else:
            kept[name] = source
    return streamed, kept


def _place_floats(
    decoder: Decoder, placer: "_Placer", table: Mapping[str, Source], work: _Work
) -> list[MappedWeight]:
    """Place the weights that keep their floats, in file order; return those that stay mapped."""
    order = sorted(table, key=lambda name: _file_position(placer.tensors, table[name]))
    placer.claim(order, table)
    mapped: list[MappedWeight] = []
    placed = work.each(lambda name: placer.place(name, table[name]), order)
    for name, weight in zip(order, placed, strict=True):
        module_path, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        if placer.is_mapped(name, table[name]):
            ref = placer.tensors[table[name].names[0]]
            mapped.append(MappedWeight(parameter=parameter, ref=ref))
        decoder.get_submodule(module_path).register_parameter(leaf, parameter)
        work.done(weight.nbytes)
    return mapped


def _quantize(checkpoint: Checkpoint, items: Sequence[QuantizedSource], work: _Work) -> None:
    """Quantize what the recipe asked for, in file order."""
    order = sorted(items, key=lambda item: _file_position(checkpoint.tensors, item.source))
    for size in work.each(lambda item: quantize_source(checkpoint.tensors, item), order):
        work.done(size)


def _quantize_once(
    checkpoint: Checkpoint,
    items: Sequence[QuantizedSource],
    work: _Work,
    folder: Path,
    recipe: str,
) -> list[str]:
    """Read the packed copy of what the recipe asked for, or quantize it and keep a copy."""
    # Imported here: most loads keep none.
    from hanok.memory.packed import PackedCopy

    if not all(item.stored.parts and item.stored.device == CPU for item in items):
        _quantize(checkpoint, items, work)
        return ["packed: no copy is kept of nested scales, nor of weights on a GPU"]
    copy = PackedCopy(folder, checkpoint.files, items, recipe)
    if copy.is_there:
        for size in work.each(copy.read, range(len(items))):
            work.done(size)
        return []
    _quantize(checkpoint, items, work)
    try:
        copy.write()
    except CheckpointError as error:
        return [f"packed: {error}"]
    return []


def _fallback_notes(decoder: Decoder, attention: str, used: Mapping[str, int]) -> list[str]:
    """Say what runs slower than it could: our kernels missing, layers without the usual backend."""
    notes = []
    missing = why_not() if decoder.device.type == "cpu" else None
    if missing is not None:
        notes.append(f"hanok's kernels are {missing}")
    plain = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=64, scale=1.0)
    preferred = choose(attention, plain, decoder.device, decoder.dtype).name
    if attention == "auto" and used and set(used) != {preferred}:
        specs = {mixer.spec for _, mixer in decoder.mixers() if mixer.spec is not None}
        tables = [why_not_table(spec, decoder.device, decoder.dtype) for spec in specs]
        reasons = {reason for table in tables if (reason := table[preferred])}
        others = ", ".join(f"{name} in {count} layers" for name, count in used.items())
        because = " and ".join(sorted(reasons))
        notes.append(f"attention: {others}, because {preferred} {because}")
    return notes


def _check_tied_head(found: Understood) -> None:
    """Refuse a second copy of the embedding that is another one."""
    if found.tied_head is None:
        return
    files, tensors = MappedFiles(), found.checkpoint.tensors
    embedding = tensors[found.table["embed_tokens.weight"].names[0]]
    if not torch.equal(files.view(found.tied_head), files.view(embedding)):
        raise tied_head_error(found.checkpoint, found.tied_head.name)


def _dtype(
    checkpoint: Checkpoint, config: ModelConfig, asked: str, is_on_cpu: bool, notes: list[str]
) -> torch.dtype:
    name = choose_dtype(config, checkpoint.tensors, asked, is_on_cpu=is_on_cpu)
    if asked == "auto" and name != choose_dtype(config, checkpoint.tensors, asked, is_on_cpu=False):
        notes.append(
            "dtype: bfloat16 instead of the file's float16, which CPUs multiply several times "
            "slower; choose float32 for the exact values"
        )
    found: torch.dtype = getattr(torch, name)
    return found


def _file_position(tensors: Mapping[str, TensorRef], source: Source) -> tuple[str, int]:
    ref = tensors[source.names[0]]
    return str(ref.path), ref.offset_bytes


class _Placer:
    """Puts weights where they will live."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, places: _Places, may_map: bool
    ) -> None:
        self.tensors = checkpoint.tensors
        self.files = MappedFiles()
        self._may_map = may_map
        self._dtype = dtype
        self._places = places
        self._arena = Arena(0, 0)

    def claim(self, names: Sequence[str], table: Mapping[str, Source]) -> None:
        """Claim the arena for every weight on the CPU that cannot stay mapped."""
        sizes = [
            prod(table[name].shape)
            for name in names
            if self._places.device_of(name) == CPU and not self.is_mapped(name, table[name])
        ]
        self._arena = Arena(sum(sizes) * self._dtype.itemsize, len(sizes))

    def place(self, name: str, source: Source) -> Tensor:
        """Return the weight of a source in its final place, dtype and order."""
        device = self._places.device_of(name)
        if self._may_map and self._fits_as_it_is(source):
            num_bytes = prod(source.shape) * self._dtype.itemsize
            weight = self.files.view(self.tensors[source.names[0]], num_bytes).view(source.shape)
        else:
            make = self._arena.empty if device == CPU else torch.empty
            weight = make(source.shape, dtype=self._dtype)
            read_parameter(self.tensors, source, weight)
        return weight if device == CPU else weight.to(device)

    def is_mapped(self, name: str, source: Source) -> bool:
        """Return whether the weight stays in the file."""
        on_cpu = self._places.device_of(name) == CPU
        return self._may_map and on_cpu and self._fits_as_it_is(source)

    def _fits_as_it_is(self, source: Source) -> bool:
        return stays_as_it_is(source, self.tensors, str(self._dtype).removeprefix("torch."))
