"""Where every byte of a model will live, decided before one is read. Pure: no torch, no files, no clock.

What is placed are units, in the order of the forward pass: the embedding, each block whole, the norm,
the head. A tied head is part of the embedding's unit, so ties are never torn. Tiers come in one order:
GPUs, CPU, disk; what lies on disk is streamed through two buffers of the place that computes it.

`auto` makes the step of one token as fast as the budgets allow, and among equally fast plans the one
whose GPUs do equal work. `balanced`, `balanced_low_0` and `sequential` follow accelerate's rules
(docs/plan.md lists what differs and why). A device, or a mapping of module names, places by hand.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from hanok.errors import OptionError
from hanok.memory.budget import Budget, device_name
from hanok.memory.cpus import CpuBudget
from hanok.memory.learning import NOTHING, Learning, LearningBytes
from hanok.memory.options import DeviceMap, LoadOptions

if TYPE_CHECKING:
    from hanok.memory.account import Opened

PlaceKind = Literal["gpu", "core", "cpu", "disk"]
POLICIES = ("auto", "balanced", "balanced_low_0", "sequential")
HOST_KINDS: tuple[PlaceKind, ...] = ("core", "cpu")  # whose memory is the host's
STREAM_BUFFERS = 2  # one is computed with while the other is read
BALANCE_STEPS = 48  # halvings of the search for equal work


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Weights that are placed together, and what comes with them."""

    name: str
    """As in `Decoder`: "layers.3"."""
    modules: tuple[str, ...]
    """As in the checkpoint: "model.layers.3"; a tied head with the embedding."""
    parameters: tuple[str, ...]
    weight_bytes: int
    """In their final form, scales included."""
    file_bytes: int
    """Read from the checkpoint for them."""
    token_bytes: int
    """Of the weights that one token reads: an embedding is looked up, experts are chosen."""
    stream_bytes: int
    """In a buffer while it computes, where it stays on disk: never quantized."""
    mapped_bytes: int = 0
    """Of `weight_bytes`, what can stay in the file when it is on the CPU."""
    cache_bytes: int = 0
    """Keys and values of all sequences."""
    work_bytes: int = 0
    """Claimed while it computes and given back: the logits of a head."""
    learning: LearningBytes = NOTHING
    """Of a training."""

    @property
    def is_block(self) -> bool:
        """Whether it is one of the decoder's blocks."""
        return self.name.startswith("layers.")

    @property
    def resident_bytes(self) -> int:
        """What its place must have room for."""
        return self.weight_bytes + self.cache_bytes + self.work_bytes + self.learning.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device, or the disk."""

    name: str
    kind: PlaceKind
    budget: Budget | None
    """None on disk, which the checkpoint's files fit already."""
    bytes_per_s: float
    """At which it reads weights."""
    flops_per_s: float
    rate_source: str
    runtime_bytes: int = 0
    """Always held: a GPU's context, Python and torch where they are not loaded yet."""
    draft_bytes: int = 0
    """Always held by a model that drafts: its weights, keys and values."""
    adapter_bytes: int = 0
    """Always held by adapters, which are where tokens go in."""
    activation_bytes: int = 0
    """Held while computing, whatever the units: activations and kernels' workspace."""
    cpus: CpuBudget | None = None
    """Of the host's memory: who computes with what lies there."""
    is_host: bool = False
    """Whether loading's own memory, besides the weights, is here."""

    @property
    def computes_first(self) -> bool:
        """Whether it comes before the CPU as a whole: a GPU, or a core as a separate device."""
        return self.kind in ("gpu", "core")

    @property
    def held_bytes(self) -> int:
        """Held whatever is placed here."""
        return self.runtime_bytes + self.draft_bytes + self.adapter_bytes

    @property
    def title(self) -> str:
        """What people call it."""
        names = {"gpu": f"GPU {self.name}", "core": f"core {self.name.rpartition(':')[2]}"}
        return names.get(self.kind, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model and its use ask for."""

    units: tuple[Unit, ...]
    context: int
    batch: int
    prompt_flops: float
    """Of computing prompts that fill the context."""
    load_bytes: int
    """Allocated on the host besides the weights while they are read."""
    file_bytes_per_s: float
    """At which the checkpoint's files are read."""
    has_head: bool = True  # whether tokens are generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One unit, its place and why it is there."""

    unit: Unit
    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """What one place holds in the end, in bytes."""

    place: Place
    modules: tuple[str, ...]
    weight_bytes: int
    mapped_bytes: int
    cache_bytes: int
    work_bytes: int
    """Claimed while computing: activations, kernels' workspace, logits."""
    stream_bytes: int
    """Buffers for what is streamed through here."""
    load_bytes: int
    """Claimed only while loading."""
    learning: LearningBytes = NOTHING
    """Of a training."""

    @property
    def steady_bytes(self) -> int:
        """Held between two steps."""
        if self.place.kind == "disk":
            return 0
        held = self.weight_bytes + self.cache_bytes + self.stream_bytes + self.learning.total
        return held + self.place.held_bytes

    @property
    def peak_bytes(self) -> int:
        """Held at the most, while loading or while computing."""
        if self.place.kind == "disk":
            return 0
        return max(
            self.steady_bytes + self.work_bytes,
            self.weight_bytes + self.place.held_bytes + self.load_bytes,
        )

    @property
    def missing_bytes(self) -> int:
        """By how much the budget is too small."""
        budget = self.place.budget
        return 0 if budget is None else max(0, self.peak_bytes - budget.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How long things will take, and what limits them."""

    load_s: float
    first_token_s: float
    tokens_per_s: float
    limited_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One change that would make everything fit into memory, and its effect."""

    change: str
    places: tuple[str, ...]
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """The whole answer."""

    needs: Needs
    device_map: str
    placements: tuple[Placement, ...]
    tiers: tuple[Tier, ...]
    prediction: Prediction
    remedies: tuple[Remedy, ...] = ()
    """The cheapest first; only where something does not fit into memory."""
    options: LoadOptions = field(default_factory=LoadOptions)
    """What the plan was made with."""
    opened: "Opened | None" = None
    """The checkpoint that was planned, as a load goes on with it; None where there was none."""
    notes: tuple[str, ...] = ()
    """What is unusual about the checkpoint's files, and how it was taken."""
    training: Learning | None = None
    """How the model will be trained; None: it generates."""

    @property
    def uses_disk(self) -> bool:
        """Whether weights are streamed from the checkpoint's files for each token."""
        return any(tier.weight_bytes for tier in self.tiers if tier.place.kind == "disk")

    @property
    def units(self) -> dict[str, str]:
        """The place of each unit, by its name in `Decoder`, in the order of the pass."""
        return {item.unit.name: item.device for item in self.placements}

    @property
    def runner(self) -> Place:
        """The place that computes what lies on disk."""
        return self.tiers[runner_of([tier.place for tier in self.tiers])].place

    @property
    def fits(self) -> bool:
        """Whether every place has room for what it is given."""
        return not any(tier.missing_bytes for tier in self.tiers)

    @property
    def hf_device_map(self) -> dict[str, str | int]:
        """The place of each module, by the checkpoint's names; GPUs are numbers."""
        return {
            module: int(item.device) if item.device.isdigit() else item.device
            for item in self.placements
            for module in item.unit.modules
        }


def make_plan(needs: Needs, places: Sequence[Place], device_map: DeviceMap = "auto") -> LoadPlan:
    """Place every unit of `needs`.

    `places` are the GPUs in order, the CPU, and the disk where it may be used. Raises OptionError for a
    device map that names what is not there, or leaves something out. A plan that does not fit is
    returned all the same, so that it can be shown: see `fits`.
    """
    if isinstance(device_map, str) and device_map in POLICIES:
        chosen, asked = _by_policy(device_map, needs, places), device_map
    else:
        by_hand = device_map if isinstance(device_map, Mapping) else {"": device_map}
        chosen, asked = _by_hand(by_hand, needs.units, places), "by hand"
    placements = tuple(
        Placement(unit=unit, device=places[index].name, reason=_reason(asked, index, places))
        for unit, index in zip(needs.units, chosen, strict=True)
    )
    return LoadPlan(
        needs=needs,
        device_map=asked,
        placements=placements,
        tiers=tuple(_tier(index, places, needs, chosen) for index in range(len(places))),
        prediction=_predict(needs, places, chosen),
    )


# Placing


def _reason(asked: str, index: int, places: Sequence[Place]) -> str:
    if asked == "by hand":
        return "device_map names it"
    if places[index].kind == "disk":
        return "no memory has room"
    if places[index].kind == "cpu" and any(place.computes_first for place in places):
        return "no GPU has room"
    return asked


def _by_policy(policy: str, needs: Needs, places: Sequence[Place]) -> list[int]:
    """Return the place of each unit; as few of the last blocks as can be are on disk, then the head.

    The embedding is never there: whole, it would be read for a row of it. The head follows the blocks,
    since both stream buffers would have its size.
    """
    units = needs.units
    rooms = [_room(place, needs) for place in places if place.kind != "disk"]
    disk = next((index for index, place in enumerate(places) if place.kind == "disk"), None)
    blocks = [number for number, unit in enumerate(units) if unit.is_block]
    head = [number for number, unit in enumerate(units) if unit.name == "lm_head"]
    order = [] if disk is None else [*reversed(blocks), *head]
    for count in range(len(order) + 1):
        on_disk = set(order[:count])
        streamed = [units[number] for number in on_disk]
        left = _rooms_beside(streamed, rooms, places)
        if streamed and left[runner_of(places)] < 0:
            continue
        kept = [unit for number, unit in enumerate(units) if number not in on_disk]
        # A place without room for what computing takes gets nothing to compute.
        found = _in_memory(policy, kept, places, [max(0, room) for room in left])
        if found is not None:
            resident = iter(found)
            return [
                disk or 0 if number in on_disk else next(resident) for number in range(len(units))
            ]
    # Nothing fits, streamed or not: the last place in memory shows by how much.
    return _in_turn(units, [*rooms[:-1], 2**62]) or [len(rooms) - 1] * len(units)


def _room(place: Place, needs: Needs) -> int:
    """Return what weights, keys and values may take of a place."""
    if place.budget is None:
        return 2**62
    beside = max(place.activation_bytes, needs.load_bytes if place.is_host else 0)
    return place.budget.num_bytes - place.held_bytes - beside


def _rooms_beside(
    streamed: Sequence[Unit], rooms: Sequence[int], places: Sequence[Place]
) -> list[int]:
    """Return the rooms less what units on disk take where they are computed."""
    if not streamed:
        return list(rooms)
    left = list(rooms)
    buffers = STREAM_BUFFERS * max(unit.stream_bytes for unit in streamed)
    left[runner_of(places)] -= buffers + sum(
        unit.cache_bytes + unit.work_bytes for unit in streamed
    )
    return left


def runner_of(places: Sequence[Place]) -> int:
    """Return which place computes what lies on disk: the first GPU or core, else the CPU."""
    return min(
        (index for index, place in enumerate(places) if place.kind != "disk"),
        key=lambda index: not places[index].computes_first,
    )


def _in_memory(
    policy: str, units: Sequence[Unit], places: Sequence[Place], rooms: Sequence[int]
) -> list[int] | None:
    if policy == "auto":
        return _fastest(units, places, rooms)
    gpus = [
        index for index in range(len(rooms)) if places[index].computes_first and rooms[index] > 0
    ]
    if policy == "sequential" or len(gpus) < 2 or not units:
        return _in_turn(units, rooms)
    is_low = policy == "balanced_low_0"
    return _in_turn(units, _balanced_rooms(units, rooms, gpus, is_low=is_low), keeping=gpus[0])


def _in_turn(
    units: Sequence[Unit], rooms: Sequence[int], keeping: int | None = None
) -> list[int] | None:
    """Fill one place after the other, never going back; None where something is left.

    The place `keeping` stays free for the largest of the units that are still to be placed.
    """
    found: list[int] = []
    index, taken = 0, 0
    for number, unit in enumerate(units):
        while index < len(rooms):
            largest = max(item.resident_bytes for item in units[number:])
            room = rooms[index] - (largest if index == keeping else 0)
            if taken + unit.resident_bytes <= room:
                break
            index, taken = index + 1, 0
        if index == len(rooms):
            return None
        taken += unit.resident_bytes
        found.append(index)
    return found


def _balanced_rooms(
    units: Sequence[Unit], rooms: Sequence[int], gpus: Sequence[int], *, is_low: bool
) -> list[int]:
    """Return the room in each place as accelerate's `get_balanced_memory` allots it.

    Every GPU but the last gets an equal share and a buffer of 1.25 of the largest block; with `is_low`
    the first one gets what the others cannot hold.
    """
    allotted = list(rooms)
    total = sum(unit.resident_bytes for unit in units)
    block = max((unit.resident_bytes for unit in units if unit.is_block), default=0)
    share = total // (len(gpus) - is_low) + int(1.25 * block)
    for index in gpus[1 if is_low else 0 : -1]:
        allotted[index] = min(share, allotted[index])
    if is_low:
        rest = sum(allotted[index] for index in gpus[1:])
        allotted[gpus[0]] = min(allotted[gpus[0]], max(0, total - rest))
    return allotted


def _fastest(
    units: Sequence[Unit], places: Sequence[Place], rooms: Sequence[int]
) -> list[int] | None:
    """Return the contiguous placement whose step is shortest; of these, whose GPUs work most alike.

    None where nothing fits. The least step is found first, then the lowest cap on the time of a GPU
    that still allows it.
    """
    best = _partition(units, places, rooms, None)
    if best is None or sum(place.computes_first for place in places) < 2:
        return best
    shortest = _step_s(units, places, best)
    low, high = 0.0, shortest
    for _ in range(BALANCE_STEPS):
        cap = (low + high) / 2
        found = _partition(units, places, rooms, cap)
        if found is not None and _step_s(units, places, found) <= shortest * (1 + 1e-9):
            best, high = found, cap
        else:
            low = cap
    return best


def _partition(
    units: Sequence[Unit], places: Sequence[Place], rooms: Sequence[int], cap_s: float | None
) -> list[int] | None:
    """Return the contiguous placement with the shortest step; `cap_s` bounds the time of each GPU.

    cost[end] after some places is the least time of the first `end` units. A place that takes units
    [begin, end) adds spent[end] - spent[begin], so the best `begin` is the least of a sliding window.
    """
    held = [0, *accumulate(unit.resident_bytes for unit in units)]
    infinite = float("inf")
    cost = [0.0] + [infinite] * len(units)
    begins: list[list[int]] = []
    for place, room in zip(places, rooms, strict=False):
        spent = [0.0, *accumulate(_unit_s(unit, place, places) for unit in units)]
        most_s = cap_s if cap_s is not None and place.computes_first else infinite
        window: deque[int] = deque()
        next_cost, begin_of = [infinite] * len(cost), [0] * len(cost)
        for end in range(len(cost)):
            while window and cost[window[-1]] - spent[window[-1]] > cost[end] - spent[end]:
                window.pop()
            window.append(end)
            # Taking nothing is always possible, so the window is never empty.
            while held[end] - held[window[0]] > room or spent[end] - spent[window[0]] > most_s:
                window.popleft()
            begin_of[end] = window[0]
            next_cost[end] = cost[window[0]] + spent[end] - spent[window[0]]
        cost = next_cost
        begins.append(begin_of)
    if cost[-1] == infinite:
        return None
    found, end = [0] * len(units), len(units)
    for index in reversed(range(len(begins))):
        begin = begins[index][end]
        found[begin:end] = [index] * (end - begin)
        end = begin
    return found


def _by_hand(
    given: Mapping[str, str | int], units: Sequence[Unit], places: Sequence[Place]
) -> list[int]:
    """Return the places that a mapping of module names gives, matched by whole components."""
    names = {place.name: index for index, place in enumerate(places)}
    for prefix, device in given.items():
        if device_name(device) not in names:
            raise OptionError(
                f"device_map gives {prefix or 'the model'!r} to {device!r}, which is not there. "
                f"Places: {', '.join(names)}; policies: {', '.join(POLICIES)}."
            )
        _check_prefix(prefix, given, units)
    kinds = {place.name: place.kind for place in places}
    found, uncovered = [], []
    for unit in units:
        owners = {
            module: prefix
            for module in unit.modules
            for prefix in given
            if _is_below(module, prefix)
        }
        devices = {device_name(given[prefix]) for prefix in owners.values()}
        if len(devices) > 1:
            raise OptionError(
                f"device_map puts {' and '.join(owners)} on {' and '.join(sorted(devices))}, but they "
                "share a weight or are computed together. Give them one place."
            )
        if not devices:
            uncovered.append(unit.modules[0])
        elif unit.name == "embed_tokens" and kinds[next(iter(devices))] == "disk":
            raise OptionError(
                f"device_map leaves {unit.modules[0]} on disk, where all of it would be read for a row "
                "of it. Give it a device."
            )
        found += [names[name] for name in devices]
    if uncovered:
        raise OptionError(
            f"device_map gives no place to {_listed(uncovered)}. Name every module, or '' for all."
        )
    return found


def _check_prefix(prefix: str, given: Mapping[str, str | int], units: Sequence[Unit]) -> None:
    modules = [module for unit in units for module in unit.modules]
    whole = next((module for module in modules if prefix.startswith(f"{module}.")), None)
    if whole is not None:
        raise OptionError(
            f"device_map names {prefix!r}, a part of {whole}, which is never split. "
            f"Give {whole} a place."
        )
    if not any(_is_below(module, prefix) for module in modules):
        raise OptionError(
            f"device_map names {prefix!r}, which is not a module of this checkpoint. Modules: "
            f"{_listed(modules)}."
        )
    outer = next((other for other in given if other != prefix and _is_below(prefix, other)), None)
    if outer is not None:
        raise OptionError(
            f"device_map names both {outer!r} and {prefix!r}, which is inside it. Name each once."
        )


def _is_below(module: str, prefix: str) -> bool:
    return prefix == "" or module == prefix or module.startswith(f"{prefix}.")


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + rest


# What a placement costs


def _tier(index: int, places: Sequence[Place], needs: Needs, chosen: Sequence[int]) -> Tier:
    place, is_runner = places[index], index == runner_of(places)
    at = [places[where] for where in chosen]
    mine = [unit for unit, where in zip(needs.units, at, strict=True) if where is place]
    streamed = [unit for unit, where in zip(needs.units, at, strict=True) if where.kind == "disk"]
    # Keys and values are where the unit is computed, wherever its weights come from.
    computed = [] if place.kind == "disk" else mine + (streamed if is_runner else [])
    most_streamed = max((unit.stream_bytes for unit in streamed), default=0)
    return Tier(
        place=place,
        modules=tuple(module for unit in mine for module in unit.modules),
        weight_bytes=sum(unit.weight_bytes for unit in mine),
        mapped_bytes=sum(unit.mapped_bytes for unit in mine) if place.kind in HOST_KINDS else 0,
        cache_bytes=sum(unit.cache_bytes for unit in computed),
        work_bytes=place.activation_bytes + max(unit.work_bytes for unit in computed)
        if computed
        else 0,
        stream_bytes=STREAM_BUFFERS * most_streamed if is_runner else 0,
        load_bytes=needs.load_bytes if place.is_host else 0,
        learning=sum((unit.learning for unit in computed), NOTHING),
    )


def _unit_s(unit: Unit, place: Place, places: Sequence[Place]) -> float:
    """Return the seconds a unit adds to a step: its weights are read where they lie."""
    if place.kind == "disk":
        runner = places[runner_of(places)]
        return unit.stream_bytes / place.bytes_per_s + unit.cache_bytes / runner.bytes_per_s
    return (unit.token_bytes + unit.cache_bytes) / place.bytes_per_s


def _step_s(units: Sequence[Unit], places: Sequence[Place], chosen: Sequence[int]) -> float:
    """Return the seconds of one token for every sequence, one place after the other."""
    pairs = zip(units, chosen, strict=True)
    return sum(_unit_s(unit, places[index], places) for unit, index in pairs)


def _predict(needs: Needs, places: Sequence[Place], chosen: Sequence[int]) -> Prediction:
    step_s = _step_s(needs.units, places, chosen)
    share = dict.fromkeys(range(len(places)), 0.0)
    for unit, index in zip(needs.units, chosen, strict=True):
        share[index] += _unit_s(unit, places[index], places)
    slowest = places[max(share, key=lambda index: share[index])]
    name = slowest.title if slowest.computes_first else "the CPU"
    what = "reading the disk" if slowest.kind == "disk" else f"reading the memory of {name}"
    read = max(1, sum(unit.token_bytes for unit in needs.units))
    compute_s = sum(
        unit.token_bytes / read * needs.prompt_flops / runner.flops_per_s
        for unit, index in zip(needs.units, chosen, strict=True)
        for runner in [places[runner_of(places)] if places[index].kind == "disk" else places[index]]
    )
    pairs = zip(needs.units, chosen, strict=True)
    loaded = sum(unit.file_bytes for unit, index in pairs if places[index].kind != "disk")
    return Prediction(
        load_s=loaded / needs.file_bytes_per_s,
        first_token_s=max(compute_s, step_s),
        tokens_per_s=needs.batch / step_s if step_s else 0.0,
        limited_by=f"{what} at {slowest.bytes_per_s / 1e9:.1f} GB/s",
    )
