"""The metrics as text: TGI's names and buckets to the letter, ours beside them, and sums that add up."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hanok.engine.stats import EngineStats
from hanok.server.metrics import Metrics, Outcome, RequestRecord

COUNTERS = {
    "tgi_request_count": {},
    "tgi_request_success": {},
    "tgi_request_failure": {
        "err": ["overloaded", "validation", "template", "incomplete", "dropped", "generation"]
    },
    "tgi_batch_inference_count": {"method": ["prefill", "decode"]},
    "tgi_batch_inference_success": {"method": ["prefill", "decode"]},
    "tgi_batch_inference_failure": {"method": ["prefill", "decode"]},
    "tgi_batch_concat": {"reason": ["backpressure", "wait_exceeded", "chunking"]},
}
GAUGES = {
    "hanok_most_tokens_after_abort": 1,
    "tgi_queue_size": 3,
    "tgi_batch_current_size": 2,
    "tgi_batch_current_max_tokens": 5 * 16,
    "tgi_batch_max_total_tokens": 20 * 16,
    "hanok_requests_waiting": 3,
    "hanok_requests_running": 2,
    "hanok_waiting_tokens": 70,
    "hanok_cache_used_blocks": 5,
    "hanok_cache_cached_blocks": 4,
    "hanok_cache_total_blocks": 20,
    "hanok_cache_block_size": 16,
    "hanok_cache_occupancy": 0.25,
}
SECONDS = [0.0001 * 1.5**k for k in range(1, 36)]
REQUEST_SECONDS = [
    "tgi_request_duration",
    "tgi_request_validation_duration",
    "tgi_request_queue_duration",
    "tgi_request_inference_duration",
    "tgi_request_mean_time_per_token_duration",
    "hanok_time_to_first_token_seconds",
    "hanok_inter_token_seconds",
    "hanok_queue_seconds",
    "hanok_grammar_compile_seconds",
]
STEP_SECONDS = [
    "tgi_batch_inference_duration",
    "tgi_batch_forward_duration",
    "tgi_batch_decode_duration",
    "tgi_batch_filter_duration",
    "tgi_batch_concat_duration",
]
BOUNDS = {
    "tgi_request_input_length": [10.0 * k for k in range(1, 101)],
    "tgi_request_generated_tokens": [20.0 * k for k in range(1, 101)],
    "tgi_request_max_new_tokens": [20.0 * k for k in range(1, 101)],
    "tgi_batch_next_size": [2.0**k for k in range(11)],
    "tgi_request_skipped_tokens": [float(k) for k in range(11)],
    **dict.fromkeys(REQUEST_SECONDS, SECONDS),
    **dict.fromkeys(STEP_SECONDS, SECONDS),
}


STATS = EngineStats(
    num_waiting=3,
    num_running=2,
    waiting_tokens=70,
    used_blocks=5,
    cached_blocks=4,
    total_blocks=20,
    block_size=16,
    steps=50,
    preemptions=6,
    prefix_hit_tokens=128,
    prefix_query_tokens=300,
    cancelled=7,
    most_tokens_after_abort=1,
    generated_tokens=45,
    drafted_tokens=40,
    accepted_tokens=25,
)


RECORD = RequestRecord(
    route="/generate",
    outcome="success",
    prompt_tokens=30,
    generated_tokens=4,
    max_new_tokens=50,
    cached_tokens=16,
    validation_s=0.01,
    queue_s=0.5,
    inference_s=2.0,
    total_s=2.6,
    first_token_s=0.7,
    inter_token_s=[0.5, 0.25, 0.25],
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(max_input_tokens=1000, max_total_tokens=2000)


def text(metrics: Metrics, stats: EngineStats | None = None) -> str:
    body, content_type = metrics.render(stats or STATS)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    return body.decode()


def families(metrics: Metrics) -> dict[str, Metric]:
    found = {family.name: family for family in text_string_to_metric_families(text(metrics))}
    assert all(family.type != "unknown" for family in found.values())
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Return one sample by its name as it is written, not as the parser completes it."""
    listed = ",".join(f'{key}="{item}"' for key, item in labels.items())
    series = re.escape(f"{name}{{{listed}}}" if labels else name)
    found = re.findall(rf"^{series} (\S+)$", text(metrics), flags=re.MULTILINE)
    assert len(found) == 1, name
    return float(found[0])


def bounds(family: Metric) -> dict[tuple[tuple[str, str], ...], list[float]]:
    """Return the upper bounds of each series of a histogram."""
    series: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            labels = {key: item for key, item in sample.labels.items() if key != "le"}
            series.setdefault(tuple(labels.items()), []).append(float(sample.labels["le"]))
    return series


@pytest.mark.parametrize("name", COUNTERS)
def test_tgi_counters_are_named_exactly_and_there_from_the_start(
    metrics: Metrics, name: str
) -> None:
    assert f"\n# TYPE {name} counter\n" in "\n" + text(metrics)
    assert f"# HELP {name} " in text(metrics)
    labels = [{key: item} for key, items in COUNTERS[name].items() for item in items]
    for one in labels or [{}]:
        assert value(metrics, name, **one) == 0
    assert len(families(metrics)[name].samples) == len(labels or [{}])


def test_no_tgi_name_ends_in_total_and_nothing_says_when_it_was_made(metrics: Metrics) -> None:
    metrics.request(RECORD)
    shown = text(metrics)
    assert re.findall(r"tgi_\w*_total\b", shown) == []
    assert "_created" not in shown
    assert "hanok_generated_tokens_total 4.0\n" in shown


def test_gauges_show_the_engine_at_the_moment_of_the_scrape(metrics: Metrics) -> None:
    found = families(metrics)
    for name, expected in GAUGES.items():
        assert found[name].type == "gauge"
        assert [sample.value for sample in found[name].samples] == [expected], name
    assert "\ntgi_queue_size 9.0\n" in text(metrics, replace(STATS, num_waiting=9))
    assert "\nhanok_cache_occupancy NaN\n" in text(metrics, replace(STATS, total_blocks=0))


def test_counts_of_the_engine_are_counters(metrics: Metrics) -> None:
    for name, expected in {
        "hanok_preemptions": 6,
        "hanok_prefix_hit_tokens": 128,
        "hanok_prefix_query_tokens": 300,
        "hanok_requests_cancelled": 7,
        "hanok_drafted_tokens": 40,
        "hanok_accepted_tokens": 25,
    }.items():
        assert families(metrics)[name].type == "counter"
        assert value(metrics, f"{name}_total") == expected


@pytest.mark.parametrize("name", BOUNDS)
def test_histograms_have_their_bounds_in_every_series(metrics: Metrics, name: str) -> None:
    family = families(metrics)[name]
    assert family.type == "histogram"
    series = bounds(family)
    methods = [(("method", "prefill"),), (("method", "decode"),)]
    assert list(series) == (methods if name in STEP_SECONDS else [()])
    for found in series.values():
        assert found == pytest.approx([*BOUNDS[name], math.inf])


def test_a_request_that_ended_well_is_counted_and_timed(metrics: Metrics) -> None:
    metrics.received()
    metrics.request(RECORD)
    metrics.request(replace(RECORD, route="/", prompt_tokens=2, inter_token_s=()))
    expected = {
        "tgi_request_count": 1,
        "tgi_request_success": 2,
        "tgi_request_duration_sum": 5.2,
        "tgi_request_validation_duration_sum": 0.02,
        "tgi_request_queue_duration_sum": 1.0,
        "tgi_request_inference_duration_sum": 4.0,
        "tgi_request_mean_time_per_token_duration_sum": 1.0,
        "tgi_request_generated_tokens_sum": 8,
        "tgi_request_generated_tokens_count": 2,
        "tgi_request_input_length_sum": 32,
        "tgi_request_max_new_tokens_sum": 100,
        "hanok_time_to_first_token_seconds_sum": 1.4,
        "hanok_inter_token_seconds_sum": 1.0,
        "hanok_inter_token_seconds_count": 3,
        "hanok_queue_seconds_count": 2,
        "hanok_prompt_tokens_total": 32,
        "hanok_cached_prompt_tokens_total": 32,
        "hanok_generated_tokens_total": 8,
    }
    assert {name: value(metrics, name) for name in expected} == pytest.approx(expected)
    assert value(metrics, "hanok_requests_total", outcome="success", route="/generate") == 1


@pytest.mark.parametrize("outcome", COUNTERS["tgi_request_failure"]["err"])
def test_a_request_that_failed_is_counted_by_its_reason(metrics: Metrics, outcome: Outcome) -> None:
    metrics.request(replace(RECORD, outcome=outcome))
    assert value(metrics, "tgi_request_failure", err=outcome) == 1
    assert value(metrics, "tgi_request_success") == 0
    assert value(metrics, "tgi_request_duration_count") == 0
    assert value(metrics, "hanok_requests_total", outcome=outcome, route="/generate") == 1
    was_queued = outcome in ("incomplete", "dropped", "generation")
    for name in ("tgi_request_input_length", "hanok_queue_seconds"):
        assert value(metrics, f"{name}_count") == was_queued
    assert value(metrics, "hanok_generated_tokens_total") == (4 if was_queued else 0)


def test_a_request_without_tokens_has_no_time_per_token(metrics: Metrics) -> None:
    metrics.request(replace(RECORD, generated_tokens=0, first_token_s=None, inter_token_s=()))
    assert value(metrics, "tgi_request_mean_time_per_token_duration_count") == 0
    assert value(metrics, "hanok_time_to_first_token_seconds_count") == 0
    assert value(metrics, "tgi_request_duration_count") == 1


def test_steps_are_counted_by_their_kind(metrics: Metrics) -> None:
    metrics.step(
        "prefill", num_sequences=3, num_tokens=70, forward_s=0.25, total_s=0.375, succeeded=True
    )
    metrics.step(
        "decode", num_sequences=2, num_tokens=2, forward_s=0.5, total_s=0.75, succeeded=True
    )
    metrics.step(
        "decode", num_sequences=2, num_tokens=2, forward_s=9.0, total_s=9.0, succeeded=False
    )
    counts = {
        ("count", "prefill"): 1,
        ("count", "decode"): 2,
        ("success", "decode"): 1,
        ("failure", "decode"): 1,
        ("failure", "prefill"): 0,
    }
    for (kind, method), expected in counts.items():
        assert value(metrics, f"tgi_batch_inference_{kind}", method=method) == expected
    for name, seconds in {"inference": 0.375, "forward": 0.25, "decode": 0.125}.items():
        assert value(metrics, f"tgi_batch_{name}_duration_sum", method="prefill") == seconds
    assert value(metrics, "tgi_batch_inference_duration_sum", method="decode") == 0.75
    assert value(metrics, "tgi_batch_next_size_sum") == 3
    assert value(metrics, "tgi_batch_next_size_count") == 1
    assert value(metrics, "hanok_computed_tokens_total", method="prefill") == 70
    assert value(metrics, "hanok_computed_tokens_total", method="decode") == 2


def test_grammars_are_timed(metrics: Metrics) -> None:
    metrics.grammar(0.125)
    assert value(metrics, "hanok_grammar_compile_seconds_sum") == 0.125


def test_two_servers_share_nothing_and_the_process_is_left_alone(metrics: Metrics) -> None:
    other = Metrics(max_input_tokens=10, max_total_tokens=20)
    metrics.received()
    assert value(other, "tgi_request_count") == 0
    names = {family.name for family in REGISTRY.collect()}
    assert [name for name in names if name.startswith(("tgi_", "hanok_"))] == []


def test_threads_lose_nothing(metrics: Metrics) -> None:
    def work(_: int) -> None:
        for _ in range(200):
            metrics.received()
            metrics.request(RECORD)
            metrics.step(
                "decode", num_sequences=1, num_tokens=1, forward_s=0.5, total_s=1.0, succeeded=True
            )

    with ThreadPoolExecutor(8) as threads:
        done = threads.map(work, range(8))
        assert "tgi_request_count" in text(metrics)
        assert len(list(done)) == 8
    assert value(metrics, "tgi_request_count") == 1600
    assert value(metrics, "hanok_inter_token_seconds_sum") == 1600
    assert value(metrics, "hanok_computed_tokens_total", method="decode") == 1600
    assert value(metrics, "tgi_request_duration_count") == 1600
