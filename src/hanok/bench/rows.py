"""From what was measured of each row to the figures of a report."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hanok.bench.grid import GridRow
from hanok.bench.intervals import Interval, level_of_each, paired_ratio
from hanok.bench.report import Difference, Probe, Quality, Row, Sample
from hanok.bench.settings import Load
from hanok.bench.spread import Spread
from hanok.models.config import ModelConfig


@dataclass(slots=True, kw_only=True)
class Measured:
    """What is known of one row so far."""

    warm_up: Sample
    token_ids: list[list[int]]
    proposed: int | None
    accepted: int | None
    peak_bytes: int | None = None
    peak_device_bytes: int | None = None
    samples: list[Sample] = field(default_factory=list)
    difference: Difference | None = None
    quality: Quality | None = None


def finished_rows(
    rows: Sequence[tuple[GridRow, Measured]],
    config: ModelConfig,
    weights_read: Mapping[Load, tuple[int, str]],
    best: Probe,
    label: Callable[[GridRow], str],
) -> tuple[list[Row], float]:
    """Return the rows of a report, and the certainty that each comparison was asked for.

    `weights_read`: of each load, the bytes of weights that a pass reads, and what it computes in. The
    first row of a workload is what its others are compared with.
    """
    first: dict[object, Measured] = {}
    for row, measured in rows:
        first.setdefault(row.workload, measured)
    level = level_of_each(len(rows) - len(first))
    made = []
    for row, measured in rows:
        reference = first[row.workload]
        seconds = Spread.of(item.seconds for item in measured.samples)
        first_s = statistics.median(item.first_token_s for item in measured.samples)
        is_reference = measured is reference
        ratio = Interval(value=1.0, low=1.0, high=1.0)
        if not is_reference:
            ratio = paired_ratio(
                [item.seconds for item in reference.samples],
                [item.seconds for item in measured.samples],
                level,
            )
        rate = _tokens_per_s(row, measured.samples)
        made.append(
            Row(
                setting=row.setting,
                workload=row.workload,
                label=label(row),
                is_reference=is_reference,
                samples=tuple(measured.samples),
                warmup_s=measured.warm_up.seconds,
                seconds=seconds.median,
                seconds_min=seconds.low,
                seconds_max=seconds.high,
                s_per_token=seconds.median / (row.workload.new_tokens * row.workload.batch),
                tokens_per_s=rate,
                first_token_s=first_s,
                ratio=ratio,
                verdict=ratio.verdict,
                peak_bytes=measured.peak_bytes,
                peak_device_bytes=measured.peak_device_bytes,
                bandwidth_share=bandwidth_share(
                    row, rate, weights_read[row.setting.load], config, best
                ),
                flop_share=prompt_flops(row, config) / first_s / (best.gflop_per_s * 1e9),
                is_same_text=measured.difference is None,
                difference=measured.difference,
                quality=measured.quality,
                proposed=measured.proposed,
                accepted=measured.accepted,
            )
        )
    return made, level


def _tokens_per_s(row: GridRow, samples: Sequence[Sample]) -> float | None:
    """Return the median rate after the first token; None for single tokens."""
    count = (row.workload.new_tokens - 1) * row.workload.batch
    if count == 0:
        return None
    return statistics.median(count / (item.seconds - item.first_token_s) for item in samples)


def bandwidth_share(
    row: GridRow,
    tokens_per_s: float | None,
    weights_read: tuple[int, str],
    config: ModelConfig,
    best: Probe,
) -> float | None:
    """Return what decoding reads per second over what memory can give.

    A pass over one token of each sequence reads the weights once, and what is kept of those before
    it. Not said of passes that take several tokens: with speculation, or without a cache.
    """
    if tokens_per_s is None or not row.setting.cache or row.setting.speculation != "off":
        return None
    weight_bytes, dtype = weights_read
    workload, kept = row.workload, row.setting.cache_dtype
    seen = workload.prompt_tokens + workload.new_tokens // 2
    cached = config.kv_cache_bytes(seen, dtype if kept == "auto" else kept)
    per_pass = weight_bytes + cached * workload.batch
    return per_pass * tokens_per_s / workload.batch / (best.gb_per_s * 1e9)


def prompt_flops(row: GridRow, config: ModelConfig) -> float:
    """Return what computing the prompts takes; a token sees half of its prompt on average."""
    tokens = row.workload.prompt_tokens
    return float(config.flops_per_token(max(1, tokens // 2))) * tokens * row.workload.batch
