"""The planner of a grid: every combination is measured once or left out with a reason; time is kept."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.bench.grid import (
    MAX_ROUNDS,
    MIN_QUALITY_TOKENS,
    MIN_ROUNDS,
    Facts,
    GridRow,
    Timing,
    estimate_s,
    has_time_for_a_round,
    pilot,
    plan_grid,
    quality_tokens,
    rotated,
    why_too_slow,
)
from hanok.bench.settings import Setting, Workload
from hanok.errors import OptionError

FACTS = Facts(
    max_context=1024,
    dtype="bfloat16",
    attention=lambda setting: "native" if setting.dtype != "float16" else "sdpa",
    why_not_attention=lambda setting: "needs a GPU" if setting.attention == "triton" else None,
    why_not_speculation=lambda method: "needs a draft" if method == "draft" else None,
    why_not_graphs=lambda setting: "not recorded" if setting.attention != "native" else None,
    why_not_load=lambda setting, workload: (
        "lacks 3 GiB" if setting.dtype == "float32" and workload.batch > 4 else None
    ),
)

settings = st.builds(
    Setting,
    attention=st.sampled_from(["auto", "native", "eager", "triton"]),
    cache=st.booleans(),
    dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    quant=st.sampled_from(["none", "int8"]),
    cache_dtype=st.sampled_from(["auto", "int8"]),
    speculation=st.sampled_from(["off", "ngram", "draft"]),
    graphs=st.booleans(),
)
workloads = st.builds(
    Workload,
    prompt_tokens=st.sampled_from([16, 500, 1000, 4000]),
    new_tokens=st.sampled_from([1, 24, 64]),
    batch=st.sampled_from([1, 8]),
)
grids = st.lists(st.tuples(settings, workloads), min_size=1, max_size=25)


def only(item: tuple[Setting, Workload]) -> bool:
    """Return whether a grid of this row alone is refused."""
    try:
        plan_grid([item], FACTS)
    except OptionError:
        return True
    return False


@given(grids)
def test_each_combination_is_measured_once_or_left_out_for_a_reason(
    grid: list[tuple[Setting, Workload]],
) -> None:
    try:
        plan = plan_grid(grid, FACTS)
    except OptionError:
        # Refused only where nothing of it can be measured.
        assert all(only(item) for item in grid)
        return
    found = [*plan.rows, *(item.row for item in plan.skipped)]
    assert len(set(found)) == len(found)
    wanted = set()
    for setting, workload in grid:
        dtype = "bfloat16" if setting.dtype == "auto" else setting.dtype
        attention = setting.attention
        if attention == "auto":
            attention = "sdpa" if dtype == "float16" else "native"
        wanted.add(
            GridRow(setting=replace(setting, dtype=dtype, attention=attention), workload=workload)
        )
    assert set(found) == wanted
    assert all(item.reason for item in plan.skipped)
    for row in plan.rows:
        assert row.workload.context <= 1024
        assert row.setting.attention != "triton"
        assert row.setting.cache or (
            row.setting.cache_dtype == "auto"
            and row.setting.speculation == "off"
            and row.setting.graphs
        )
        assert row.setting.graphs or row.setting.attention == "native"
        assert row.setting.speculation != "draft"
        assert not (row.setting.dtype == "float32" and row.workload.batch > 4)
    # Rows of a workload stand together, workloads in the order of their first rows.
    order = [row.workload for row in plan.rows]
    assert order == sorted(order, key=order.index)


@given(grids)
def test_a_reference_comes_first_in_each_workload(grid: list[tuple[Setting, Workload]]) -> None:
    reference = Setting(attention="eager")
    possible = [item for item in grid if item[1].context <= 1024]
    if not possible:
        return
    plan = plan_grid(grid, FACTS, reference)
    firsts: dict[Workload, Setting] = {}
    for row in plan.rows:
        firsts.setdefault(row.workload, row.setting)
    assert set(firsts.values()) == {replace(reference, dtype="bfloat16")}
    assert set(firsts) == {workload for _, workload in possible}


def test_reasons_say_what_is_missing() -> None:
    workload = Workload(prompt_tokens=1000, new_tokens=100, batch=1)
    grid = [
        (Setting(), workload),
        (Setting(), replace(workload, prompt_tokens=8)),
        (Setting(attention="triton"), replace(workload, prompt_tokens=8)),
    ]
    plan = plan_grid(grid, FACTS)
    assert [item.reason for item in plan.skipped] == [
        "1,100 tokens are more than the model's context of 1,024",
        "needs a GPU",
    ]
    with pytest.raises(OptionError, match=r"(?s)no row .* more than the model's context"):
        plan_grid(grid[:1], FACTS)


def test_the_first_answer_is_one_with_a_cache() -> None:
    workload = Workload(prompt_tokens=8, new_tokens=4, batch=1)
    without = GridRow(setting=Setting(cache=False), workload=workload)
    cached = GridRow(setting=Setting(), workload=workload)
    assert pilot([without, cached]) == cached
    assert pilot([without]) == without


def test_estimates_follow_prompts_passes_and_sequences() -> None:
    workload = Workload(prompt_tokens=100, new_tokens=11, batch=1)
    row = GridRow(setting=Setting(), workload=workload)
    measured = {row: Timing(seconds=3.0, first_token_s=1.0)}
    assert estimate_s(row, {}) is None
    assert estimate_s(row, measured) == 3.0
    longer = replace(row, workload=replace(workload, prompt_tokens=400, new_tokens=21))
    assert estimate_s(longer, measured) == pytest.approx(4.0 + 20 * 0.2)
    several = replace(row, workload=replace(workload, batch=4))
    assert estimate_s(several, measured) == pytest.approx(4.0 + 2.0)
    without = replace(row, setting=Setting(cache=False))
    assert estimate_s(without, measured) == pytest.approx(11.0)
    # What was measured without a cache says nothing of passes.
    assert estimate_s(row, {without: Timing(seconds=9.0, first_token_s=1.0)}) is None
    # The same setting says more than the same workload.
    other = replace(longer, setting=Setting(quant="int8"))
    both = {**measured, other: Timing(seconds=50.0, first_token_s=40.0)}
    assert estimate_s(replace(row, setting=Setting(quant="int8")), both) == pytest.approx(15.0)


@given(
    times=st.lists(st.floats(0.001, 20), max_size=20),
    budget=st.floats(1, 200),
    start=st.floats(0, 50),
)
def test_what_is_kept_fits_the_time(times: list[float], budget: float, start: float) -> None:
    """Each answer takes what was expected: the warm-up and the least number of rounds end in time."""
    elapsed, kept = start, []
    for expected in times:
        if why_too_slow(expected, sum(kept), budget - elapsed, budget) is None:
            elapsed += expected
            kept.append(expected)
    if kept:
        assert elapsed + MIN_ROUNDS * sum(kept) <= budget * (1 + 1e-9)
    left_out = why_too_slow(budget, 0.0, budget, budget)
    assert left_out is not None
    assert "--budget" in left_out


@given(st.integers(0, 30), st.floats(0.01, 10), st.floats(-5, 100))
def test_rounds_end_with_the_time(done: int, round_s: float, left_s: float) -> None:
    more = has_time_for_a_round(done, round_s, left_s, None)
    if done == 0:
        assert more
    elif done < MIN_ROUNDS:
        assert more == (left_s >= 0)
    else:
        assert more == (done < MAX_ROUNDS and round_s <= left_s)
    assert has_time_for_a_round(done, round_s, None, None) == (done < MIN_ROUNDS)
    assert has_time_for_a_round(done, round_s, left_s, 7) == (done < 7)


def test_scored_tokens_take_a_share_of_the_time() -> None:
    assert quality_tokens(1024, 0.001, 5, None) == 1024
    assert quality_tokens(1024, 1e-6, 5, 90) == 1024
    assert quality_tokens(1024, 0.01, 6, 90) == 300
    assert quality_tokens(1024, 1.0, 6, 90) == MIN_QUALITY_TOKENS
    assert quality_tokens(10, 1.0, 6, 90) == 10


@given(st.integers(1, 9), st.integers(0, 30))
def test_each_round_begins_one_further_on(count: int, number: int) -> None:
    rows = [
        GridRow(
            setting=Setting(), workload=Workload(prompt_tokens=index + 1, new_tokens=1, batch=1)
        )
        for index in range(count)
    ]
    found = rotated(rows, number)
    assert sorted(rows.index(row) for row in found) == list(range(count))
    assert found[0] == rows[number % count]
    assert found == rows[number % count :] + rows[: number % count]
