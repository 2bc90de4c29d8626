"""The planner of a grid: every combination is measured once or left out with a reason; time is kept."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.bench.grid import (
    MAX_ROUNDS,
    MIN_QUALITY_TOKENS,
    MIN_ROUNDS,
    NO_TIME,
    QUALITY_SHARE,
    Costs,
    Facts,
    GridRow,
    Timing,
    answer_order,
    divisor_that_fits,
    divisors,
    estimate_s,
    has_time_for_a_round,
    peak_s,
    pilot,
    plan_grid,
    rotated,
    rows_s,
    scored,
    scoring_s,
    shrink_note,
    shrunk,
    shrunk_rows,
    why_too_slow,
)
from hanok.bench.settings import Setting, Workload, core_axes, default_axes
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
        "longer than the model's context (1,100 of 1,024 tokens)",
        "needs a GPU",
    ]
    with pytest.raises(OptionError, match=r"(?s)no row .* longer than the model's context"):
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
    # Without it, the same attention does.
    eager = replace(longer, setting=Setting(attention="eager"))
    both = {**measured, eager: Timing(seconds=50.0, first_token_s=40.0)}
    like = Setting(attention="eager", quant="int4")
    assert estimate_s(replace(row, setting=like), both) == pytest.approx(15.0)


def default_rows() -> list[GridRow]:
    combinations = [item for axes in default_axes() for item in axes.combinations()]
    return list(plan_grid(combinations, FACTS).rows)


def test_the_short_grid_has_its_core() -> None:
    core = [item for axes in core_axes() for item in axes.combinations()]
    combinations = [item for axes in default_axes() for item in axes.combinations()]
    plan = plan_grid(combinations, FACTS, core=core)
    assert [row.setting.label("bfloat16") for row in plan.core] == [
        "eager",
        "sdpa",
        "native",
        "native, int8",
        "native, int4",
    ]
    assert set(plan.core) <= set(plan.rows)
    # What is left out is core as well, so that it is said.
    facts = replace(
        FACTS, why_not_load=lambda setting, _: "large" if "4" in setting.quant else None
    )
    lacking = plan_grid(combinations, facts, core=core)
    assert lacking.core == plan.core
    assert plan.core[-1] in {item.row for item in lacking.skipped}


def test_core_rows_answer_before_others() -> None:
    rows = default_rows()
    core = [rows[8], rows[3]]
    order = answer_order(rows, core)
    assert order[:3] == [pilot(rows), *core]
    assert sorted(order, key=rows.index) == rows
    assert order[3:] == [row for row in rows if row not in order[:3]]


@given(workloads, st.integers(0, 12))
def test_workloads_become_smaller_down_to_the_least(workload: Workload, power: int) -> None:
    found = shrunk(workload, 2**power)
    assert found.batch == workload.batch
    for before, after, least in (
        (workload.prompt_tokens, found.prompt_tokens, 16),
        (workload.new_tokens, found.new_tokens, 8),
    ):
        assert after <= before
        assert after == max(before // 2**power, min(least, before))


def test_divisors_end_where_nothing_becomes_smaller() -> None:
    rows = default_rows()
    found = divisors(rows)
    assert found == [1, 2, 4, 8, 16, 32]
    # The longest prompt is the last to become the least; rows that are equal by then are one.
    last = shrunk_rows(rows, found[-1])
    assert {row.workload.prompt_tokens for row in last} == {16}
    assert len(set(last)) == len(last) < len(rows)
    assert len(shrunk_rows(rows, 2)) == len(rows)


COSTS = Costs(process_s=1.5, load_s=0.5, probe_s=0.1)


def test_what_rows_take_is_loads_answers_and_rounds() -> None:
    workload = Workload(prompt_tokens=100, new_tokens=11, batch=1)
    row = GridRow(setting=Setting(), workload=workload)
    other = replace(row, setting=Setting(quant="int8"))
    measured = {row: Timing(seconds=3.0, first_token_s=1.0)}
    rounds_s = MIN_ROUNDS * COSTS.probe_s
    assert rows_s([row], measured, COSTS, [row.setting.load]) == pytest.approx(
        (1 + MIN_ROUNDS) * 3.0 + rounds_s
    )
    assert rows_s([row, other], measured, COSTS, [row.setting.load]) == pytest.approx(
        2.0 + (1 + MIN_ROUNDS) * 6.0 + rounds_s
    )
    # Scoring: a hundredth of a second for each token, of both; at the most a share.
    assert scoring_s([row, other], measured, 100, 1000.0) == pytest.approx(2.0)
    several = replace(other, workload=replace(workload, batch=2))
    assert scoring_s([row, other, several], measured, 100, 1000.0) == pytest.approx(2.0)
    assert scoring_s([row], measured, 10**6, 90.0) == QUALITY_SHARE * 90.0
    assert peak_s(2.0, COSTS) == pytest.approx(0.15 + 0.5 + 2.5)


@given(left_s=st.floats(0, 400), per_token=st.floats(0.001, 0.1), peaks_s=st.floats(0, 100))
def test_workloads_become_no_smaller_than_is_needed(
    left_s: float, per_token: float, peaks_s: float
) -> None:
    rows = default_rows()

    def taken_s(rows: Sequence[GridRow]) -> tuple[float, float]:
        return per_token * sum(row.workload.prompt_tokens for row in rows), peaks_s

    divisor, all_fit = divisor_that_fits(rows, taken_s, left_s)
    takes_s = {item: taken_s(shrunk_rows(rows, item))[0] for item in divisors(rows)}
    assert all_fit == (takes_s[divisor] <= left_s)
    # Where peaks fit some smaller workload, they are counted; else they are given up.
    with_peaks = peaks_s if takes_s[32] + peaks_s <= left_s else 0.0
    larger = [item for item in takes_s if item < divisor]
    assert all(takes_s[item] + with_peaks > left_s for item in larger)
    if not all_fit:
        assert divisor == 32


def test_the_note_says_what_became_smaller() -> None:
    rows = default_rows()
    assert shrink_note(rows, 2, True, 90.0) == (
        "this model is slow on this machine: prompts of 64, 16 and 256 tokens instead of 128, 32 and "
        "512, 16 new tokens instead of 32, so that all rows fit into 90 s (--budget)"
    )
    assert "prompts of 16 tokens instead of 128, 32 and 512, 8 new" in shrink_note(
        rows, 32, False, 4.5
    )
    assert shrink_note(rows, 32, False, 4.5).endswith("so that more rows fit into 4.5 s (--budget)")
    short = [replace(rows[0], workload=Workload(prompt_tokens=16, new_tokens=64, batch=1))]
    assert ": 32 new tokens instead of 64, so" in shrink_note(short, 2, True, 90.0)


@given(
    times=st.lists(st.floats(0.001, 20), max_size=20),
    loads=st.lists(st.floats(0, 10), min_size=20, max_size=20),
    budget=st.floats(1, 200),
    start=st.floats(0, 50),
    rounds=st.integers(1, MIN_ROUNDS),
)
def test_what_is_kept_fits_the_time(
    times: list[float], loads: list[float], budget: float, start: float, rounds: int
) -> None:
    """Each answer takes what was expected: the warm-up and the rounds end in time."""
    elapsed, kept = start, []
    for expected, load in zip(times, loads, strict=False):
        reason = why_too_slow(
            expected, load_s=load, kept_s=sum(kept), left_s=budget - elapsed, rounds=rounds
        )
        if reason is None:
            elapsed += load + expected
            kept.append(expected)
    if kept:
        assert elapsed + rounds * sum(kept) <= budget * (1 + 1e-9)


def test_a_row_without_time_says_what_it_takes() -> None:
    assert why_too_slow(3.5, load_s=0.0, kept_s=0.0, left_s=7.0, rounds=1) is None
    reason = why_too_slow(3.51, load_s=0.0, kept_s=0.0, left_s=7.0, rounds=1)
    assert reason == f"{NO_TIME} (an answer takes about 3.5 s)"
    reason = why_too_slow(2.0, load_s=4.0, kept_s=0.0, left_s=7.0, rounds=1)
    assert reason == f"{NO_TIME} (an answer takes about 2 s and its load 4 s)"


@given(st.integers(0, 30), st.floats(0.01, 10), st.floats(-5, 100), st.floats(0, 20))
def test_rounds_end_with_the_time(done: int, round_s: float, left_s: float, later_s: float) -> None:
    def more(left_s: float | None, asked: int | None) -> bool:
        return has_time_for_a_round(done, round_s, left_s=left_s, later_s=later_s, asked=asked)

    # One is always made; the least number goes before what comes later, others do not.
    needed_s = round_s + (later_s if done >= MIN_ROUNDS else 0.0)
    assert more(left_s, None) == (done == 0 or (done < MAX_ROUNDS and needed_s <= left_s))
    assert more(left_s, 7) == (done == 0 or (done < 7 and needed_s <= left_s))
    assert more(None, None) == (done < MIN_ROUNDS)
    assert more(None, 7) == (done < 7)


def test_scored_tokens_take_what_is_allowed() -> None:
    assert scored(1024, [0.1] * 5, None) == (1024, 5)
    assert scored(1024, [1e-6] * 5, 18.0) == (1024, 5)
    assert scored(1024, [0.01, 0.02, 0.03], 18.0) == (300, 3)
    # Fewer tokens than the least go to fewer settings, never to the reference alone.
    assert scored(1024, [0.1, 0.1, 0.1, 0.2], 20.0) == (MIN_QUALITY_TOKENS, 3)
    assert scored(1024, [0.1, 0.3, 0.1], 20.0) == (0, 0)
    assert scored(1024, [0.1, 0.1], -1.0) == (0, 0)
    assert scored(10, [0.1] * 5, 6.0) == (10, 5)


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
