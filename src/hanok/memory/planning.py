"""Plans a load from a checkpoint's headers, or from its config alone: `hanok.plan_load`.

torch is imported only where it is needed: for GPUs that are there, and for quantizations with options.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Unpack

from hanok.checkpoint.adapter_files import AdapterFiles
from hanok.checkpoint.files import (
    Checkpoint,
    open_checkpoint,
    read_object,
    weights_in,
)
from hanok.checkpoint.formats import foreign_weights, refuse_other_layouts
from hanok.errors import BudgetError, CheckpointError, HanokError, OptionError
from hanok.memory.account import Opened, Understood, check_head, understand
from hanok.memory.budget import device_name, parse_max_memory
from hanok.memory.learning import Learning
from hanok.memory.needs import (
    DRAFTED_SEQUENCES,
    KNOWN_RECIPES,
    Use,
    WeightBits,
    activation_bytes,
    adapter_bytes,
    choose_dtype,
    needs_of,
)
from hanok.memory.options import DeviceMap, LoadOptions, MaxMemory, PlanArguments
from hanok.memory.places import (
    Rates,
    core_places,
    described_place,
    disk_place,
    host_place,
    with_draft,
    with_work,
)
from hanok.memory.plan import LoadPlan, Place, Remedy, make_plan
from hanok.models.config import ModelConfig

CORE = re.compile(r"core:\d+")
GPU_DRIVER = Path("/dev/nvidiactl")
DEFAULT_CONTEXT = 4096
SMALLEST_CONTEXT = 512
NUM_READERS = 2  # threads; two fault in and fill pages nearly twice as fast as one
RUNTIME_BYTES = 148 * 2**20  # Python with torch and hanok loaded, before a weight is
# What CUDA's libraries claim of the host when a GPU quantizes and computes, besides its context (H200).
GPU_LIBRARY_BYTES = 448 * 2**20
FIRST_USE_BYTES = 28 * 2**20  # what threads and libraries claim the first time they compute
LEARNING_BYTES = 40 * 2**20  # the same, the first time that gradients are computed


def plan_load(
    path: str | Path | Opened,
    *,
    devices: Sequence[str] = (),
    rates_file: Path | None = None,
    may_measure: bool = True,
    is_running: bool = True,
    draft: LoadPlan | None = None,
    adapters: Sequence[AdapterFiles] = (),
    training: Learning | None = None,
    **options: Unpack[PlanArguments],
) -> LoadPlan:
    """Return where every byte of a checkpoint would live, without reading a weight.

    `path` is a checkpoint, a folder with a config.json alone, or the id of a model on the Hugging Face
    hub ("org/name", "org/name@revision"), of which only headers are asked for; or what `open_model` made
    of it before. The options are those of `LoadOptions`; `batch` is how many sequences of `context`
    tokens there are, `max_memory` "0=24GiB,cpu=16GiB" or a mapping: only GPUs that it names are used
    then. `devices` describe GPUs that may not be here, as `--device` does, in place of this machine's;
    `max_memory` may name cores ("core:0=2GiB,core:1=2GiB") to use them as devices of their own.
    `rates_file` keeps what was measured of memory and disk; without `may_measure` what it does not hold
    is assumed. `is_running` says that Python and torch are loaded already, so that their memory is no
    part of the plan. `draft` is the plan of a model that will draft for this one and is not loaded yet:
    what it takes is not there for this one. `adapters` are those that will be served. `training` says
    how the model will be trained: then all of that is planned, in place of keys and values. Raises
    OptionError and CheckpointError.
    """
    asked = LoadOptions.of(options)
    opened = path if isinstance(path, Opened) else open_model(path)
    described, quant = opened.understood, asked.quant
    _check_context(asked, described.config)
    places = _places(opened, asked, devices, Rates(rates_file, may_measure=may_measure))
    if draft is not None:
        places = [with_draft(place, draft) for place in places]
    has_gpus = places[0].kind == "gpu"
    use = Use(
        dtype=choose_dtype(
            described.config, described.checkpoint.tensors, asked.dtype, is_on_cpu=not has_gpus
        ),
        context=asked.context or min(DEFAULT_CONTEXT, described.config.max_context_tokens),
        batch=asked.batch,
        recipe=read_bits(quant) if quant is not None else None,
        cache_dtype=asked.cache_dtype,
        may_map=asked.weights != "copied" and training is None,
        learning=training,
    )
    runtime_bytes = FIRST_USE_BYTES + (0 if is_running else RUNTIME_BYTES)
    runtime_bytes += GPU_LIBRARY_BYTES if has_gpus else 0
    runtime_bytes += LEARNING_BYTES if training is not None else 0
    held = adapter_bytes(adapters, use.dtype)
    places = _with_adapters(places, places[0].name, held)
    plan = _plan(described, use, places, asked.device_map, runtime_bytes)
    first = plan.placements[0].device
    if held and first != places[0].name:
        places = _with_adapters(places, first, held)
        plan = _plan(described, use, places, asked.device_map, runtime_bytes)
    if plan.uses_disk and asked.weights == "auto":
        # What streams through the page cache would push mapped weights out of it.
        use, asked = replace(use, may_map=False), asked.updated(weights="copied")
        plan = _plan(described, use, places, asked.device_map, runtime_bytes)
    plan = replace(plan, options=asked, opened=opened, notes=described.notes, training=training)
    if plan.fits and not plan.uses_disk:
        return plan
    in_memory = [place for place in places if place.kind != "disk"]
    found: list[Remedy] = []
    for change, other in _changes(use, quant):
        if any(change.startswith(earlier.change) for earlier in found):
            continue  # the half of it is enough
        trial = _plan(described, other, in_memory, "auto", runtime_bytes, places[-1].bytes_per_s)
        if trial.fits:
            used = tuple(tier.place.name for tier in trial.tiers if tier.modules)
            speed = trial.prediction.tokens_per_s
            found.append(Remedy(change=change, places=used, tokens_per_s=speed))
    return replace(plan, remedies=tuple(found))


def _places(
    opened: Opened, asked: LoadOptions, devices: Sequence[str], rates: Rates
) -> list[Place]:
    """Return GPUs, then the host or its cores, then the disk."""
    allowed = parse_max_memory(asked.max_memory) if asked.max_memory is not None else {}
    gpus = _gpu_places(devices, allowed, has_limits=asked.max_memory is not None)
    files = opened.understood.checkpoint.files if opened.is_here else ()
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    cores = {name: size for name, size in allowed.items() if CORE.fullmatch(name)}
    if cores and (gpus or "cpu" in allowed):
        raise OptionError(
            f"max_memory names {', '.join(cores)}: cores are used as devices only without other devices."
        )
    host = core_places(cores, rates) if cores else [host_place(allowed.get("cpu"), rates)]
    places = [*gpus, *host, disk_place(largest, rates)]
    _check_places(opened.path, asked.max_memory, allowed, places)
    return places


def _with_adapters(places: Sequence[Place], name: str, num_bytes: int) -> list[Place]:
    """Return the places, of which one holds what adapters take."""
    return [
        replace(place, adapter_bytes=num_bytes if place.name == name else 0) for place in places
    ]


def _check_context(asked: LoadOptions, config: ModelConfig) -> None:
    most = config.max_context_tokens
    if asked.context is not None and asked.context > most:
        raise OptionError(
            f"context is {asked.context:,} tokens, and a sequence of this model has {most:,} at the "
            "most. Choose that or fewer."
        )


def check_fits(plan: LoadPlan, path: Path) -> None:
    """Raise BudgetError, which says what is missing and what would help."""
    if plan.fits:
        return
    lacks = ", ".join(
        f"{tier.place.title} lacks {tier.missing_bytes:,} bytes of {tier.peak_bytes:,} "
        f"({tier.place.budget.source})"
        for tier in plan.tiers
        if tier.missing_bytes and tier.place.budget
    )
    changes = ", ".join(remedy.change for remedy in plan.remedies) or "more memory"
    raise BudgetError(
        f"{path} does not fit: {lacks}. What would help: {changes}. `hanok plan` shows where every "
        "byte would be."
    )


def plan_draft(
    path: str | Path | Opened,
    *,
    devices: Sequence[str] = (),
    is_running: bool = True,
    **options: Unpack[PlanArguments],
) -> LoadPlan:
    """Return the plan of a model that drafts, to be made before that of the model it drafts for.

    The options are those of `plan_load`. `batch` is at how many sequences it guesses at a time,
    DRAFTED_SEQUENCES at the most; beyond its own context it does not guess. Raises OptionError where it
    has no head, and BudgetError where it does not fit into memory: to read weights anew for each guess
    never pays.
    """
    asked = LoadOptions.of(options)
    opened = path if isinstance(path, Opened) else open_model(path)
    config, context = opened.understood.config, asked.context
    check_head(opened.path, has_head=config.has_head)
    own = asked.updated(
        context=context and min(context, config.max_context_tokens),
        batch=min(asked.batch, DRAFTED_SEQUENCES),
    )
    plan = plan_load(
        opened, devices=devices, may_measure=False, is_running=is_running, **own.planned
    )
    if plan.uses_disk or not plan.fits:
        raise BudgetError(
            f"{opened.path}, the model that drafts, does not fit into memory. Choose a smaller one or a "
            "shorter context, or do without a draft model."
        )
    return plan


def open_model(path: str | Path) -> Opened:
    """Open a checkpoint once, for its plans and its load; of one on the hub only headers are read."""
    where = Path(path)
    if where.exists():
        return Opened(path=where, understood=describe(path), is_here=True)
    # Imported here: most checkpoints are on this disk, and a client of the hub is not needed for them.
    from hanok.checkpoint.hub import is_repo_id, without_weights

    if not is_repo_id(str(path)):
        return Opened(path=where, understood=describe(path), is_here=True)
    with without_weights(str(path)) as folder:
        try:
            return Opened(path=where, understood=describe(folder), is_here=False)
        except HanokError as error:
            # The folder of the headers is gone when somebody reads this.
            raise type(error)(str(error).replace(str(folder), str(path))) from error


def describe(path: str | Path) -> Understood:
    """Return what the headers and config.json of a checkpoint say; the weights may be missing."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    weights = weights_in(path)
    if path.name != "config.json" and (weights or foreign_weights(folder)):
        return understand(open_checkpoint(path))
    file = folder / "config.json"
    refuse_other_layouts(folder, weights)
    if not file.is_file():
        raise CheckpointError(f"{folder}: has neither weights nor a config.json to plan from")
    return understand(Checkpoint(folder=folder, config=read_object(file), tensors={}, files=()))


def read_bits(quant: str) -> WeightBits:
    """Return the bits of a recipe; torch is imported only where the text says more than a name."""
    if quant in KNOWN_RECIPES:
        return KNOWN_RECIPES[quant]
    from hanok.quant.recipe import read_recipe

    return read_recipe(quant)


def _plan(
    described: Understood,
    use: Use,
    places: Sequence[Place],
    device_map: DeviceMap,
    runtime_bytes: int,
    file_bytes_per_s: float | None = None,
) -> LoadPlan:
    needs = needs_of(
        described.family,
        described.config,
        described.table,
        described.checkpoint.tensors,
        use,
        num_readers=NUM_READERS,
        file_bytes_per_s=file_bytes_per_s or places[-1].bytes_per_s,
    )
    work = activation_bytes(described.family, described.config, use)
    return make_plan(needs, [with_work(place, work, runtime_bytes) for place in places], device_map)


def _changes(use: Use, quant: str | None) -> list[tuple[str, Use]]:
    """Return what could be changed, the least harmful first."""
    if use.learning is not None:
        return _training_changes(use, use.learning, quant)
    found = []
    if use.cache_dtype != "int8":
        found.append(("--cache-dtype int8", replace(use, cache_dtype="int8")))
    if use.batch > 1:
        found.append(("--batch 1", replace(use, batch=1)))
    context = use.context // 2
    while context >= SMALLEST_CONTEXT:
        found.append((f"--context {context}", replace(use, context=context)))
        context //= 2
    for name in ("int8", "int4"):
        if quant is None or (quant == "int8" and name == "int4"):
            recipe = KNOWN_RECIPES[name]
            found.append((f"--quant {name}", replace(use, recipe=recipe)))
            both = replace(use, recipe=recipe, cache_dtype="int8")
            found.append((f"--quant {name} --cache-dtype int8", both))
    return found


def _training_changes(use: Use, learning: Learning, quant: str | None) -> list[tuple[str, Use]]:
    found, made = [], []
    if not learning.gradient_checkpointing:
        learning = replace(learning, gradient_checkpointing=True)
        made.append("--gradient-checkpointing")
        found.append((" ".join(made), replace(use, learning=learning)))
    tokens = learning.pack_tokens // 2
    while tokens >= SMALLEST_CONTEXT:
        smaller = replace(learning, pack_tokens=tokens)
        found.append((" ".join([*made, f"--pack-tokens {tokens}"]), replace(use, learning=smaller)))
        tokens //= 2
    if learning.lora is not None and quant is None:
        for name in ("int8", "nf4"):
            with_fewer = replace(use, recipe=KNOWN_RECIPES[name], learning=learning)
            found.append((" ".join([*made, f"--quant {name}"]), with_fewer))
    return found


def _gpu_places(
    described: Sequence[str], allowed: Mapping[str, int], *, has_limits: bool
) -> list[Place]:
    if described:
        return [
            described_place(text, index, allowed.get(str(index)))
            for index, text in enumerate(described)
        ]
    if not GPU_DRIVER.exists():
        return []
    from hanok.memory.gpus import gpu_places

    found = gpu_places(allowed)
    return [place for place in found if not has_limits or device_name(place.name) in allowed]


def _check_places(
    path: Path,
    max_memory: MaxMemory | None,
    allowed: Mapping[str, int],
    places: Sequence[Place],
) -> None:
    """Refuse memory of what is not there; of GPUs, say how they are described."""
    if any(place.kind == "disk" and place.name in allowed for place in places):
        raise OptionError(
            "max_memory names disk, which has no budget: what nothing else holds stays in its file."
        )
    unknown = sorted(set(allowed) - {place.name for place in places})
    if not unknown:
        return
    gpus = [int(name) for name in allowed if name.isdigit()]
    how = ""
    if gpus and any(name.isdigit() for name in unknown):
        sizes = max_memory
        if isinstance(max_memory, Mapping):
            sizes = ",".join(f"{name}={size}" for name, size in max_memory.items())
        device = " --device name=a100" * (max(gpus) + 1)
        how = (
            " To plan for GPUs that are not in this machine, describe each from 0 on by its name or "
            f"its memory and bandwidth: hanok plan {quote(str(path))} --max-memory {sizes}{device}"
        )
    raise OptionError(
        f"max_memory names {', '.join(unknown)}, which is not there. Places: "
        f"{', '.join(place.name for place in places)}.{how}"
    )
