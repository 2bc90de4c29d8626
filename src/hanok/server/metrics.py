"""The server's counters and timers as Prometheus text: TGI's names exactly, and our own (`hanok_`).

TGI's counters lack the `_total` suffix that the client library enforces, and dashboards query them by
these names: their lines are written here, all others by the library. Every series exists from the
start, at zero, so that a rate over it is never missing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from hanok.engine.stats import EngineStats

Outcome = Literal[
    "success", "overloaded", "validation", "template", "incomplete", "dropped", "generation"
]
Method = Literal["prefill", "decode"]

FAILURES = tuple(outcome for outcome in get_args(Outcome) if outcome != "success")
REFUSALS = ("overloaded", "validation", "template")
"""Outcomes of requests that never reached the queue."""
METHODS: tuple[Method, ...] = get_args(Method)
CONCAT_REASONS = ("backpressure", "wait_exceeded", "chunking")

DURATION_BOUNDS = tuple(0.0001 * 1.5**k for k in range(1, 36))
"""Seconds, 0.15 ms to 146 s."""
BATCH_BOUNDS = tuple(2.0**k for k in range(11))
SKIPPED_BOUNDS = tuple(float(count) for count in range(11))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """The figures of one request; times in seconds, 0 for a stage that it did not reach."""

    route: str
    """The path of the route, not of the request: "/v1/chat/completions"."""
    outcome: Outcome
    prompt_tokens: int
    generated_tokens: int
    max_new_tokens: int
    cached_tokens: int
    """Of the prompt, those found in the prefix cache."""
    validation_s: float
    queue_s: float
    inference_s: float
    total_s: float
    first_token_s: float | None
    """From arrival to the first token; None if there was none."""
    inter_token_s: Sequence[float]
    """From each token to the next."""


class Metrics:
    """The counters and histograms of one server; the engine's thread and the event loop may both call.

    `max_input_tokens` and `max_total_tokens` are the limits of a request: 100 equal buckets end there.
    """

    def __init__(self, *, max_input_tokens: int, max_total_tokens: int) -> None:
        self._tgi = _TgiCounters()
        self._registry = CollectorRegistry()
        self._requests = _RequestHistograms(
            self._registry, max_input_tokens=max_input_tokens, max_total_tokens=max_total_tokens
        )
        self._steps = _StepHistograms(self._registry)

    def received(self) -> None:
        """Count a request as it arrives, whatever its outcome."""
        self._tgi.request_count.inc()

    def request(self, record: RequestRecord) -> None:
        """Count a request that has ended. As in TGI, only successful ones are timed."""
        if record.outcome == "success":
            self._tgi.request_success.inc()
        else:
            self._tgi.request_failure.labels(err=record.outcome).inc()
        self._requests.observe(record)

    def step(
        self,
        kind: Method,
        *,
        num_sequences: int,
        num_tokens: int,
        forward_s: float,
        total_s: float,
        succeeded: bool,
        accepted: Sequence[int] = (),
    ) -> None:
        """Count a step of the engine: a decode computes one token of each sequence, a prefill more.

        A step that failed is counted and not timed. `accepted` says for each sequence with guesses how
        many were right.
        """
        for number in accepted:
            self._requests.skipped.observe(number)
        self._tgi.inference_count.labels(method=kind).inc()
        if not succeeded:
            self._tgi.inference_failure.labels(method=kind).inc()
            return
        self._tgi.inference_success.labels(method=kind).inc()
        self._steps.observe(
            kind,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            forward_s=forward_s,
            total_s=total_s,
        )

    def grammar(self, seconds: float) -> None:
        """Time the compilation of one grammar."""
        self._requests.grammar.observe(seconds)

    def render(self, stats: EngineStats) -> tuple[bytes, str]:
        """Return the text for `GET /metrics`, and its content type."""
        body = self._tgi.text() + generate_latest(_Scrape(self._registry, stats))
        return body, CONTENT_TYPE_PLAIN_0_0_4


class _TgiCounters:
    """TGI's counters. The library counts; the names are written without its `_total`."""

    def __init__(self) -> None:
        none = dict[str, Sequence[str]]()
        method = {"method": METHODS}
        self.request_count = _counter("tgi_request_count", "Requests that arrived.", none)
        self.request_success = _counter("tgi_request_success", "Requests that succeeded.", none)
        self.request_failure = _counter(
            "tgi_request_failure", "Requests that failed, by reason.", {"err": FAILURES}
        )
        self.inference_count = _counter("tgi_batch_inference_count", "Steps of the engine.", method)
        self.inference_success = _counter(
            "tgi_batch_inference_success", "Steps that succeeded.", method
        )
        self.inference_failure = _counter(
            "tgi_batch_inference_failure", "Steps that failed.", method
        )
        self.concat = _counter(
            "tgi_batch_concat",
            "Always 0: sequences join the running batch at any step, nothing is concatenated.",
            {"reason": CONCAT_REASONS},
        )

    def text(self) -> bytes:
        lines = []
        for counter in vars(self).values():
            for family in counter.collect():
                lines.append(f"# HELP {family.name} {family.documentation}\n")
                lines.append(f"# TYPE {family.name} counter\n")
                for sample in family.samples:
                    if sample.name.endswith("_total"):
                        labels = ",".join(
                            f'{name}="{value}"' for name, value in sample.labels.items()
                        )
                        braced = f"{{{labels}}}" if labels else ""
                        lines.append(f"{family.name}{braced} {sample.value}\n")
        return "".join(lines).encode()


class _RequestHistograms:
    """Observed when a request ends."""

    def __init__(
        self, registry: CollectorRegistry, *, max_input_tokens: int, max_total_tokens: int
    ) -> None:
        def seconds(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=DURATION_BOUNDS, registry=registry)

        def tokens(name: str, text: str, largest: int) -> Histogram:
            bounds = tuple(largest / 100 * (k + 1) for k in range(100))
            return Histogram(name, text, buckets=bounds, registry=registry)

        self.duration = seconds("tgi_request_duration", "Seconds of a request.")
        self.validation = seconds("tgi_request_validation_duration", "Seconds of validating it.")
        self.queue = seconds("tgi_request_queue_duration", "Seconds that it waited.")
        self.inference = seconds("tgi_request_inference_duration", "Seconds of computing it.")
        self.mean_per_token = seconds(
            "tgi_request_mean_time_per_token_duration", "Seconds of computing it, per new token."
        )
        self.generated = tokens(
            "tgi_request_generated_tokens", "New tokens of a request.", max_total_tokens
        )
        self.input_length = tokens(
            "tgi_request_input_length", "Prompt tokens of a request.", max_input_tokens
        )
        self.max_new_tokens = tokens(
            "tgi_request_max_new_tokens", "New tokens that a request asked for.", max_total_tokens
        )
        self.skipped = Histogram(
            "tgi_request_skipped_tokens",
            "Guessed tokens of a sequence's step that were right.",
            buckets=SKIPPED_BOUNDS,
            registry=registry,
        )
        self.first_token = seconds(
            "hanok_time_to_first_token_seconds", "From arrival to the first token."
        )
        self.inter_token = seconds("hanok_inter_token_seconds", "From one token to the next.")
        self.our_queue = seconds(
            "hanok_queue_seconds", "Wait of every request that was queued, failed ones included."
        )
        self.grammar = seconds("hanok_grammar_compile_seconds", "Seconds of compiling a grammar.")
        self.requests = Counter(
            "hanok_requests",
            "Requests that ended, by route and outcome.",
            ("route", "outcome"),
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "hanok_prompt_tokens", "Prompt tokens of requests that were queued.", registry=registry
        )
        self.cached_tokens = Counter(
            "hanok_cached_prompt_tokens",
            "Of these, tokens that their requests found in the prefix cache.",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "hanok_generated_tokens",
            "New tokens of all requests, failed ones included.",
            registry=registry,
        )

    def observe(self, record: RequestRecord) -> None:
        self.requests.labels(route=record.route, outcome=record.outcome).inc()
        if record.outcome in REFUSALS:
            return
        self.input_length.observe(record.prompt_tokens)
        self.max_new_tokens.observe(record.max_new_tokens)
        self.our_queue.observe(record.queue_s)
        self.prompt_tokens.inc(record.prompt_tokens)
        self.cached_tokens.inc(record.cached_tokens)
        self.generated_tokens.inc(record.generated_tokens)
        if record.first_token_s is not None:
            self.first_token.observe(record.first_token_s)
        for seconds in record.inter_token_s:
            self.inter_token.observe(seconds)
        if record.outcome != "success":
            return
        self.duration.observe(record.total_s)
        self.validation.observe(record.validation_s)
        self.queue.observe(record.queue_s)
        self.inference.observe(record.inference_s)
        self.generated.observe(record.generated_tokens)
        if record.generated_tokens:
            self.mean_per_token.observe(record.inference_s / record.generated_tokens)


class _StepHistograms:
    """Observed at each step of the engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def seconds(name: str, text: str) -> Histogram:
            histogram = Histogram(
                name, text, ("method",), buckets=DURATION_BOUNDS, registry=registry
            )
            for method in METHODS:
                histogram.labels(method=method)
            return histogram

        self.next_size = Histogram(
            "tgi_batch_next_size",
            "Sequences of a batch with a prefill.",
            buckets=BATCH_BOUNDS,
            registry=registry,
        )
        self.inference = seconds("tgi_batch_inference_duration", "Seconds of a step.")
        self.forward = seconds("tgi_batch_forward_duration", "Seconds of its forward pass.")
        self.decode = seconds("tgi_batch_decode_duration", "Seconds of all else in it.")
        self.filter = seconds(
            "tgi_batch_filter_duration", "Never observed: part of the step's other work."
        )
        self.concat = seconds(
            "tgi_batch_concat_duration", "Never observed: nothing is concatenated."
        )
        self.tokens = _counter(
            "hanok_computed_tokens", "Tokens computed.", {"method": METHODS}, registry
        )

    def observe(
        self, kind: Method, *, num_sequences: int, num_tokens: int, forward_s: float, total_s: float
    ) -> None:
        if kind == "prefill":
            self.next_size.observe(num_sequences)
        self.inference.labels(method=kind).observe(total_s)
        self.forward.labels(method=kind).observe(forward_s)
        self.decode.labels(method=kind).observe(total_s - forward_s)
        self.tokens.labels(method=kind).inc(num_tokens)


class _Scrape:
    """What one scrape returns: the registry's families, and the engine's current numbers."""

    def __init__(self, registry: CollectorRegistry, stats: EngineStats) -> None:
        self._registry = registry
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            # One more gauge per series, useless since the start of the process is known.
            family.samples = [item for item in family.samples if not item.name.endswith("_created")]
            yield family
        for name, (value, text) in _gauges(self._stats).items():
            yield GaugeMetricFamily(name, text, value=value)
        for name, (value, text) in _engine_counters(self._stats).items():
            yield CounterMetricFamily(name, text, value=value)


def _gauges(stats: EngineStats) -> Mapping[str, tuple[float, str]]:
    held, total = stats.used_blocks * stats.block_size, stats.total_blocks * stats.block_size
    occupancy = stats.used_blocks / stats.total_blocks if stats.total_blocks else math.nan
    return {
        "tgi_queue_size": (stats.num_waiting, "Requests that wait."),
        "tgi_batch_current_size": (stats.num_running, "Sequences in the batch."),
        "tgi_batch_current_max_tokens": (held, "Tokens that the batch has room for in its blocks."),
        "tgi_batch_max_total_tokens": (total, "Tokens that all blocks have room for."),
        "hanok_requests_waiting": (stats.num_waiting, "Requests that wait."),
        "hanok_requests_running": (stats.num_running, "Sequences in the batch."),
        "hanok_waiting_tokens": (stats.waiting_tokens, "Prompt tokens that wait."),
        "hanok_cache_used_blocks": (stats.used_blocks, "Blocks that running sequences hold."),
        "hanok_cache_cached_blocks": (
            stats.cached_blocks,
            "Blocks without a sequence, kept for prompts with the same prefix.",
        ),
        "hanok_cache_total_blocks": (stats.total_blocks, "Blocks of the cache."),
        "hanok_cache_block_size": (stats.block_size, "Tokens of a block."),
        "hanok_cache_occupancy": (occupancy, "Share of the blocks that running sequences hold."),
        "hanok_most_tokens_after_abort": (
            stats.most_tokens_after_abort,
            "The most new tokens of a request that came when it was already given up.",
        ),
    }


def _engine_counters(stats: EngineStats) -> Mapping[str, tuple[float, str]]:
    return {
        "hanok_preemptions": (
            stats.preemptions,
            "Sequences that gave their blocks back and were computed again.",
        ),
        "hanok_prefix_hit_tokens": (
            stats.prefix_hit_tokens,
            "Prompt tokens found in the prefix cache.",
        ),
        "hanok_prefix_query_tokens": (
            stats.prefix_query_tokens,
            "Prompt tokens looked for in the prefix cache.",
        ),
        "hanok_requests_cancelled": (
            stats.cancelled,
            "Requests that ended because their client left or their time was up.",
        ),
        "hanok_drafted_tokens": (
            stats.drafted_tokens,
            "Tokens that were guessed ahead and checked.",
        ),
        "hanok_accepted_tokens": (
            stats.accepted_tokens,
            "Of these, tokens that were right: as many passes were saved.",
        ),
    }


def _counter(
    name: str,
    text: str,
    labels: Mapping[str, Sequence[str]],
    registry: CollectorRegistry | None = None,
) -> Counter:
    """Return a counter whose series (of at most one label) all exist, at 0."""
    counter = Counter(name, text, tuple(labels), registry=registry)
    for label, values in labels.items():
        for value in values:
            counter.labels(**{label: value})
    return counter
