"""Placing units: what every plan must satisfy, the fastest plan against trying all, plans by hand."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.errors import OptionError
from hanok.memory.budget import Budget, Limit
from hanok.memory.plan import LoadPlan, Needs, Place, PlaceKind, Unit, make_plan

quick = settings(max_examples=150)
policies = st.sampled_from(["auto", "balanced", "balanced_low_0", "sequential"])


def unit(
    name: str, weight: int, *, token: int | None = None, cache: int = 0, work: int = 0
) -> Unit:
    return Unit(
        name=name,
        modules=(f"model.{name}",),
        parameters=(f"{name}.weight",),
        weight_bytes=weight,
        file_bytes=weight,
        token_bytes=weight if token is None else token,
        stream_bytes=weight,
        cache_bytes=cache,
        work_bytes=work,
    )


def needs(units: Sequence[Unit], load_bytes: int = 0) -> Needs:
    return Needs(
        units=tuple(units),
        context=8,
        batch=1,
        prompt_flops=1.0,
        load_bytes=load_bytes,
        file_bytes_per_s=1e9,
    )


def place(
    name: str, room: int, *, rate: float = 1.0, activation: int = 0, runtime: int = 0
) -> Place:
    kind: PlaceKind = "gpu" if name.isdigit() else "cpu"
    return Place(
        name=name,
        kind=kind,
        budget=Budget(device=name, limits=(Limit(num_bytes=room, source="the test"),)),
        bytes_per_s=rate,
        flops_per_s=1.0,
        rate_source="the test",
        activation_bytes=activation,
        runtime_bytes=runtime,
        is_host=kind == "cpu",
    )


DISK = Place(
    name="disk", kind="disk", budget=None, bytes_per_s=0.01, flops_per_s=1.0, rate_source="the test"
)


@st.composite
def units_of(draw: st.DrawFn) -> list[Unit]:
    block = draw(st.integers(1, 40))
    cache = draw(st.integers(0, 5))
    count = draw(st.integers(0, 7))
    blocks = [unit(f"layers.{index}", block, cache=cache) for index in range(count)]
    embedding = unit("embed_tokens", draw(st.integers(1, 60)), token=1)
    head = unit("lm_head", draw(st.integers(1, 60)), work=draw(st.integers(0, 9)))
    return [embedding, *blocks, unit("norm", 1), head]


@st.composite
def places_of(draw: st.DrawFn) -> list[Place]:
    """GPUs of falling speed, the CPU, and perhaps the disk."""
    rates = sorted(draw(st.lists(st.sampled_from([2.0, 3.0, 5.0]), max_size=3)), reverse=True)
    gpus = [
        place(str(index), draw(st.integers(0, 200)), rate=rate, runtime=draw(st.integers(0, 5)))
        for index, rate in enumerate(rates)
    ]
    cpu = place("cpu", draw(st.integers(0, 300)), activation=draw(st.integers(0, 9)))
    return [*gpus, cpu, *([DISK] if draw(st.booleans()) else [])]


def indices(plan: LoadPlan, places: Sequence[Place]) -> list[int]:
    names = [item.name for item in places]
    return [names.index(item.device) for item in plan.placements]


@quick
@given(units=units_of(), places=places_of(), policy=policies, load=st.integers(0, 20))
def test_every_unit_has_one_place_and_no_budget_is_exceeded(
    units: list[Unit], places: list[Place], policy: str, load: int
) -> None:
    plan = make_plan(needs(units, load), places, policy)
    assert [item.unit for item in plan.placements] == units
    found = indices(plan, places)
    in_memory = [index for index in found if places[index].kind != "disk"]
    assert in_memory == sorted(in_memory)
    streamed = [item.unit for item in plan.placements if item.device == "disk"]
    blocks = [item for item in units if item.is_block]
    streamed_blocks = [item for item in streamed if item.is_block]
    assert streamed_blocks == blocks[len(blocks) - len(streamed_blocks) :]
    others = [item.name for item in streamed if not item.is_block]
    assert others in ([], ["lm_head"])
    assert not others or streamed_blocks == blocks
    held = [module for tier in plan.tiers for module in tier.modules]
    assert sorted(held) == sorted(module for item in units for module in item.modules)
    assert sum(tier.weight_bytes for tier in plan.tiers) == sum(item.weight_bytes for item in units)
    assert sum(tier.cache_bytes for tier in plan.tiers) == sum(item.cache_bytes for item in units)
    for tier in plan.tiers:
        if plan.fits and tier.place.budget is not None and tier.modules:
            assert tier.peak_bytes <= tier.place.budget.num_bytes
        assert tier.missing_bytes == 0 or not plan.fits


@quick
@given(
    units=units_of(),
    places=places_of(),
    policy=st.sampled_from(["auto", "sequential"]),
    more=st.lists(st.integers(0, 80), min_size=4, max_size=4),
)
def test_more_memory_is_never_slower(
    units: list[Unit], places: list[Place], policy: str, more: list[int]
) -> None:
    larger = [
        place(
            item.name,
            item.budget.num_bytes + extra,
            rate=item.bytes_per_s,
            activation=item.activation_bytes,
            runtime=item.runtime_bytes,
        )
        if item.budget
        else item
        for item, extra in zip(places, [*more, 0], strict=False)
    ]
    before, after = (make_plan(needs(units), found, policy) for found in (places, larger))
    if before.fits:
        assert after.fits
        speeds = [plan.prediction.tokens_per_s for plan in (before, after)]
        assert speeds[1] >= speeds[0] * (1 - 1e-9)


@quick
@given(units=units_of(), places=places_of())
def test_auto_is_as_fast_as_the_best_of_all_plans(units: list[Unit], places: list[Place]) -> None:
    """Every way to cut the units into runs is tried, without the disk."""
    in_memory = [item for item in places if item.kind != "disk"]
    rooms = [
        item.budget.num_bytes - item.runtime_bytes - item.activation_bytes if item.budget else 0
        for item in in_memory
    ]
    if min(rooms) < 0:
        return
    best = None
    for cuts in itertools.combinations_with_replacement(range(len(units) + 1), len(rooms) - 1):
        bounds = list(itertools.pairwise([0, *cuts, len(units)]))
        runs = [units[begin:end] for begin, end in bounds]
        if any(
            sum(item.resident_bytes for item in run) > room
            for run, room in zip(runs, rooms, strict=True)
        ):
            continue
        seconds = sum(
            sum(item.token_bytes + item.cache_bytes for item in run) / where.bytes_per_s
            for run, where in zip(runs, in_memory, strict=True)
        )
        best = seconds if best is None else min(best, seconds)
    plan = make_plan(needs(units), in_memory, "auto")
    assert plan.fits == (best is not None)
    if best is not None:
        assert plan.prediction.tokens_per_s == pytest.approx(1 / best)


def test_auto_gives_alike_gpus_equal_work() -> None:
    units = [unit(f"layers.{index}", 10) for index in range(9)]
    places = [place(str(index), 1000, rate=4.0) for index in range(3)] + [place("cpu", 1000)]
    plan = make_plan(needs(units), places, "auto")
    assert [len(tier.modules) for tier in plan.tiers] == [3, 3, 3, 0]


def test_what_no_memory_holds_is_streamed_through_two_buffers() -> None:
    units = [unit(f"layers.{index}", 10, cache=1) for index in range(6)]
    plan = make_plan(needs(units), [place("cpu", 50, activation=3), DISK], "auto")
    cpu, disk = plan.tiers
    # 50 - 3 of activations - 2 x 10 of buffers - 6 of keys and values leaves two units.
    assert (len(cpu.modules), len(disk.modules)) == (2, 4)
    assert (cpu.weight_bytes, cpu.cache_bytes, cpu.stream_bytes) == (20, 6, 20)
    assert (cpu.steady_bytes, cpu.peak_bytes) == (46, 49)
    assert plan.uses_disk
    assert plan.prediction.limited_by == "reading the disk at 0.0 GB/s"
    reasons = [item.reason for item in plan.placements]
    assert reasons == ["auto"] * 2 + ["no memory has room"] * 4


def test_what_does_not_fit_says_where_and_by_how_much() -> None:
    units = [unit(f"layers.{index}", 10) for index in range(6)]
    plan = make_plan(needs(units), [place("cpu", 50, activation=3)], "auto")
    assert not plan.fits
    assert plan.tiers[0].missing_bytes == 13


UNITS = [unit("embed_tokens", 5), *(unit(f"layers.{index}", 5) for index in range(12))]
PLACES = [place("0", 100), place("1", 100), place("cpu", 100)]


def test_places_by_hand_match_whole_components() -> None:
    given_map: dict[str, str | int] = {"model.embed_tokens": "cpu", "model.layers.1": 1}
    given_map |= {f"model.layers.{index}": 0 for index in range(12) if index != 1}
    plan = make_plan(needs(UNITS), PLACES, given_map)
    expected: dict[str, str | int] = {f"model.layers.{index}": 0 for index in range(12)}
    expected |= {"model.embed_tokens": "cpu", "model.layers.1": 1}
    assert plan.hf_device_map == expected
    reordered = dict(reversed(given_map.items()))
    assert make_plan(needs(UNITS), PLACES, reordered).placements == plan.placements


@pytest.mark.parametrize("device", [1, "1", "cuda:1", {"": 1}])
def test_one_device_for_all(device: str | int | dict[str, str | int]) -> None:
    plan = make_plan(needs(UNITS), PLACES, device)
    assert set(plan.hf_device_map.values()) == {1}


@pytest.mark.parametrize(
    ("given_map", "message"),
    [
        ({"": 7}, r"gives 'the model' to 7, which is not there\. Places: 0, 1, cpu"),
        ("cuda:7", "gives 'the model' to 'cuda:7', which is not there"),
        ({"model.layers": 0}, r"no place to model\.embed_tokens"),
        ({"": 0, "model.head": 1}, r"'model\.head', which is not a module"),
        ({"": 0, "model.layers.1": 1}, r"both '' and 'model\.layers\.1'"),
        ({"model.layers.1.mlp": 1, "": 0}, r"a part of model\.layers\.1, which is never split"),
    ],
)
def test_a_map_that_cannot_be_followed(given_map: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_plan(needs(UNITS), PLACES, given_map)  # type: ignore[arg-type]  # what users may write


def test_what_shares_a_weight_is_not_torn() -> None:
    tied = Unit(
        name="embed_tokens",
        modules=("model.embed_tokens", "lm_head"),
        parameters=("embed_tokens.weight",),
        weight_bytes=5,
        file_bytes=5,
        token_bytes=5,
        stream_bytes=5,
    )
    with pytest.raises(OptionError, match=r"model\.embed_tokens and lm_head on 0 and 1"):
        make_plan(needs([tied]), PLACES, {"model": 0, "lm_head": 1})
    plan = make_plan(needs([tied]), PLACES, {"model": 0})
    assert plan.hf_device_map == {"model.embed_tokens": 0, "lm_head": 0}
