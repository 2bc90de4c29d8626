"""The comparison of attention backends: what is counted, what is compared, and what is said.

No test looks at a speed: rounds have one call, and where times matter they are made up.
"""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.attention.base import ForwardBatch, backends, reference, visible
from hanok.attention.cache import LayerState
from hanok.bench import attention, turns
from hanok.bench.attention import (
    AttentionCase,
    AttentionReport,
    Conditions,
    Tensors,
    fitting,
    grid,
    measure_attention,
)
from hanok.bench.growth import RESET
from hanok.bench.turns import Timer
from hanok.errors import OptionError

CPU = torch.device("cpu")
SMALL = AttentionCase(num_heads=4, num_kv_heads=2, head_dim=16, queries=3, keys=9, dtype="float32")
# Outputs are averages of numbers around 1, summed in float32 in another order.
FLOAT32_TOLERANCE = 1e-5


def quick(**changes: Any) -> Conditions:
    given = {"rounds": 1, "ring_bytes": 0, "min_sample_s": 0.0, "gb_per_s": 1.0, "gflop_per_s": 1.0}
    return Conditions(device=CPU, **{**given, **changes})


def case(**changes: Any) -> AttentionCase:
    names = ("num_heads", "num_kv_heads", "head_dim", "queries", "keys", "dtype")
    return AttentionCase(**{**{name: getattr(SMALL, name) for name in names}, **changes})


def measure(items: Sequence[AttentionCase], **changes: Any) -> AttentionReport:
    return measure_attention(items, quick(**changes))


@settings(max_examples=40)
@given(keys=st.integers(1, 20), data=st.data(), window=st.one_of(st.none(), st.integers(1, 25)))
def test_flop_and_bytes_count_what_is_visible(
    keys: int, data: st.DataObject, window: int | None
) -> None:
    """Against the mask that backends use."""
    queries = data.draw(st.integers(1, keys))
    seen = visible(queries, keys, window, CPU)
    item = case(queries=queries, keys=keys, window=window, batch=2)
    assert item.flop == 2 * 4 * 2 * int(seen.sum()) * 16 * 2
    kept = 2 * 2 * 2 * 16 * 4 * int(seen.any(0).sum())
    assert item.moved_bytes == kept + 2 * 2 * queries * 4 * 16 * 4


def test_an_int8_cache_counts_its_scales() -> None:
    item = case(cache_dtype="int8", queries=1, keys=10)
    assert item.cache_bytes == 2 * 10 * 2 * (16 + 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "4 heads cannot share 3 KV heads"),
        ({"queries": 10}, "10 queries are more than 9 keys"),
        ({"batch": 0}, "batch is 0"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"window": 0}, "window is 0"),
        ({"softcap": 0.0}, "softcap is 0"),
        ({"dtype": "float64"}, "float32, bfloat16, float16"),
        ({"cache_dtype": "fp8"}, "auto, int8"),
    ],
)
def test_cases_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        case(**changes)


def test_rounds_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match="rounds is 0"):
        quick(rounds=0)


def test_the_grid_says_what_it_leaves_out() -> None:
    cases, left_out = grid([1, 512], [256, 4096], AttentionCase())
    assert [(item.queries, item.keys) for item in cases] == [(1, 256), (1, 4096), (512, 4096)]
    assert left_out == ["512 queries over 256 keys: the queries are the last of the keys' tokens"]
    with pytest.raises(OptionError, match="nothing to measure: 512 queries over 256 keys"):
        grid([512], [256], AttentionCase())


@pytest.mark.parametrize("changes", [{}, {"batch": 3}, {"window": 4}, {"softcap": 2.0}])
def test_the_exact_result_is_the_reference_put_together(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "REFERENCE_ROWS", 2)
    item = case(**changes)
    tensors = Tensors.of(item, quick())
    whole = [
        reference(q, keys, values, item.spec)
        for q, keys, values in zip(
            tensors.q.view(item.batch, item.queries, 4, 16),
            tensors.keys,
            tensors.values,
            strict=True,
        )
    ]
    found = tensors.expected(item.spec)
    assert found.dtype is torch.float64
    assert (found - torch.cat(whole)).abs().max() < FLOAT32_TOLERANCE


@pytest.mark.parametrize("changes", [{}, {"batch": 3, "queries": 1}, {"window": 4}])
def test_backends_are_exact_in_float32(changes: dict[str, Any]) -> None:
    (result,) = measure([case(**changes)]).results
    assert {"eager", "sdpa", "sdpa_math"} <= set(result.measured)
    assert set(result.measured) | set(result.not_measured) == set(backends())
    for row in result.measured.values():
        assert 0 < row.max_error < FLOAT32_TOLERANCE
        assert 0 < row.relative_error < FLOAT32_TOLERANCE


def test_an_int8_cache_shows_in_the_error() -> None:
    (exact,) = measure([case(keys=64)]).results
    (rounded,) = measure([case(keys=64, cache_dtype="int8")]).results
    for name, row in rounded.measured.items():
        # A value is off by at most 1/254 of its token's largest, which is below 4.
        assert 100 * exact.measured[name].max_error < row.max_error < 4 / 127


def test_reasons_stand_beside_what_was_measured() -> None:
    (result,) = measure([case(softcap=5.0)]).results
    assert "cannot soft-cap scores (softcap 5.0)" in result.not_measured["sdpa"]
    assert "eager" in result.measured
    assert "needs a CUDA device" in result.not_measured["triton"]


class Wrong:
    """A backend that is off by a known amount, or fails."""

    name, summary, recorded_on = "wrong", "wrong on purpose", None

    def __init__(self, by: float | None) -> None:
        self.by = by

    def why_not(self, *_: object) -> str | None:
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, spec: Any, batch: ForwardBatch, state: LayerState
    ) -> Tensor:
        if self.by is None:
            raise RuntimeError("no kernel for that\nsecond line")
        return backends()["eager"].attend(q, k, v, spec, batch, state) + self.by


class Greedy(Wrong):
    """A backend that claims a MiB for each query."""

    def __init__(self) -> None:
        super().__init__(by=0.0)
        self.most_queries = 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, spec: Any, batch: ForwardBatch, state: LayerState
    ) -> Tensor:
        self.most_queries = max(self.most_queries, len(q))
        claimed = torch.ones(len(q), 2**18)
        return super().attend(q, k, v, spec, batch, state) + 0 * claimed[0, 0]


@pytest.mark.skipif(not RESET.exists(), reason="no /proc/self/clear_refs")
def test_what_would_not_fit_is_tried_with_few_queries_only() -> None:
    item = case(queries=256, keys=300)
    for free, fits in ((2**28 + 2**26, True), (2**28 - 2**26, False)):
        greedy = Greedy()
        (result,) = measure([item], others={"greedy": greedy}, free_bytes=free).results
        assert ("greedy" in result.measured) == fits
        assert (greedy.most_queries == 256) == fits
        assert "eager" in result.measured
    assert "would claim about 0.2" in result.not_measured["greedy"]
    assert result.not_measured["greedy"].endswith("and 0.19 GiB are free")


def test_contestants_fit_the_time_the_fastest_first() -> None:
    calls_s = {"eager": 9.0, "native": 1.0, "sdpa": 2.0}
    assert fitting(calls_s, None) == set(calls_s)
    assert fitting(calls_s, 60.0) == set(calls_s)
    assert fitting(calls_s, 59.9) == {"native", "sdpa"}
    assert fitting(calls_s, 14.0) == {"native"}
    assert fitting(calls_s, 4.9) == set()


def test_what_would_take_too_long_is_tried_with_few_queries_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item = case(queries=256, keys=300)
    monkeypatch.setattr(attention, "fitting", lambda calls_s, left_s: set(calls_s) - {"greedy"})
    greedy = Greedy()
    (result,) = measure([item], others={"greedy": greedy}, budget_s=1000.0).results
    assert greedy.most_queries == attention.TRIED_QUERIES
    assert result.not_measured["greedy"].startswith("no time for it within --budget (a call would")
    assert next(iter(result.measured)) == "eager"
    monkeypatch.setattr(attention, "fitting", lambda calls_s, left_s: set())
    monkeypatch.setattr(attention.Tensors, "expected", None)  # nothing is compared with it
    (result,) = measure([item], others={"greedy": greedy}).results
    assert not result.measured


def test_the_exact_result_takes_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []

    def two_seconds(timer: Timer) -> float:
        timer.action()
        return 2.0

    def fitting(calls_s: dict[str, float], left_s: float | None) -> set[str]:
        assert set(calls_s.values()) == {4.0}  # of 32 queries, of which 16 were tried
        seen.append(left_s)
        return set()

    monkeypatch.setattr(Timer, "__call__", two_seconds)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(attention, "fitting", fitting)
    measure([case(queries=32, keys=40)] * 2, budget_s=100.0)
    assert seen == [50.0 - 4.0, 100.0 - 4.0]


def test_a_case_that_comes_too_late_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.Tensors, "of", None)
    (result,) = measure([SMALL], budget_s=1e-9).results
    assert not result.measured
    assert set(result.not_measured) == set(backends())
    with pytest.raises(OptionError, match="the budget is 0 s"):
        quick(budget_s=0.0)


def test_caches_that_would_not_fit_are_refused() -> None:
    item = case(keys=4096)
    with pytest.raises(OptionError, match=r"1 x 4096 keys take .* Ask for fewer keys"):
        measure([item], free_bytes=item.cache_bytes)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_last_queries_have_the_last_results(batch: int) -> None:
    item = case(queries=7, keys=12, batch=batch)
    tensors = Tensors.of(item, quick())
    whole = tensors.expected(item.spec).view(batch, 7, *tensors.q.shape[1:])
    last = tensors.last(2)
    found = backends()["eager"].attend(
        last.q, last.k, last.v, item.spec, last.batch, last.states[0]
    )
    assert torch.allclose(found.double(), whole[:, -2:].flatten(0, 1), atol=FLOAT32_TOLERANCE)
    assert torch.allclose(last.expected(item.spec), whole[:, -2:].flatten(0, 1))


def test_errors_are_absolute_and_relative() -> None:
    (result,) = measure([SMALL], others={"wrong": Wrong(0.5), "broken": Wrong(None)}).results
    assert next(iter(result.measured)) == "wrong"
    row = result.measured["wrong"]
    assert row.max_error == pytest.approx(0.5, abs=FLOAT32_TOLERANCE)
    expected = Tensors.of(SMALL, quick()).expected(SMALL.spec)
    root_mean_square = float(expected.square().mean().sqrt())
    assert row.relative_error == pytest.approx(0.5 / root_mean_square, rel=1e-3)
    assert result.not_measured["broken"] == "failed: no kernel for that"


def test_rates_shares_and_ratios_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"eager": [4.0, 4.0, 6.0], "native": [2.0, 1.0, 3.0], "sdpa": [4.0, 2.0, 8.0]}
    monkeypatch.setattr(attention, "take_turns", lambda timers, *_: times)
    (result,) = measure([SMALL], gb_per_s=1e-6, gflop_per_s=2e-6).results
    row = result.measured["native"]
    assert (row.ratio.median, row.ratio.low, row.ratio.high) == (2.0, 2.0, 4.0)
    assert row.gb_per_s == pytest.approx(SMALL.moved_bytes / 2e9)
    assert row.bandwidth_share == pytest.approx(SMALL.moved_bytes / 2e3)
    assert row.gflop_per_s == pytest.approx(SMALL.flop / 2e9)
    assert row.flop_share == pytest.approx(SMALL.flop / 4e3)
    assert result.measured["eager"].ratio.high == 1.0


def test_the_ring_is_larger_than_asked_and_holds_the_same() -> None:
    states = Tensors.of(SMALL, quick(ring_bytes=5 * SMALL.cache_bytes - 1)).states
    assert len(states) == 5
    assert all(torch.equal(state.keys, states[0].keys) for state in states)
    assert len({state.keys.data_ptr() for state in states}) == 5
    eight = Tensors.of(case(cache_dtype="int8"), quick()).states
    assert torch.equal(eight[0].key_scale, eight[1].key_scale)  # type: ignore[arg-type]


@pytest.mark.skipif(not RESET.exists(), reason="no /proc/self/clear_refs")
def test_memory_of_scores_is_seen() -> None:
    """Eager keeps at least the float32 scores of all heads; our kernel and flash do not."""
    item = AttentionCase(num_heads=8, num_kv_heads=2, head_dim=16, queries=256, keys=1024)
    (result,) = measure([item]).results
    scores = 8 * 256 * 1024 * 4
    assert (result.measured["eager"].extra_bytes or 0) > scores
    assert (result.measured["sdpa_flash"].extra_bytes or 0) < scores


def test_the_report_is_json() -> None:
    progress: list[AttentionCase] = []
    report = measure_attention([SMALL], quick(), progress=progress.append)
    found = json.loads(json.dumps(report.as_object()))
    assert progress == [SMALL]
    assert found["results"][0]["case"]["keys"] == 9
    assert found["results"][0]["measured"]["eager"]["seconds"]["median"] > 0
    assert found["gb_per_s"] == 1.0


def test_limits_are_measured_where_they_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "read_gb_per_s", lambda device: 20.0)
    monkeypatch.setattr(attention, "gflop_per_s", lambda device, dtype: 300.0)
    report = measure([SMALL], gb_per_s=None, gflop_per_s=None)
    assert (report.gb_per_s, report.gflop_per_s) == (20.0, 300.0)
