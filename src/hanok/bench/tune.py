"""The fastest setting of a report that keeps its bounds, and why each of the others is not it. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hanok.bench.report import Report, Row
from hanok.bench.settings import AUTO, Axes, Setting
from hanok.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a setting must keep."""

    max_kl: float
    """Mean KL divergence from the reference, in nats a token."""
    min_same_top1: float
    """Share of tokens whose likeliest continuation is the reference's."""
    max_memory: int | None
    """Bytes at the peak; None: what fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One setting with all that was measured of it."""

    setting: Setting
    label: str
    rows: tuple[Row, ...]
    speed: float
    """Times as fast as the reference: the geometric mean over the workloads."""
    excluded: str | None
    """Why it is not taken, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen among all, the fastest first."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    not_told_apart: tuple[str, ...]
    """Settings that keep the bounds and are not shown to be slower."""


def tune_axes() -> tuple[Axes, ...]:
    """Return the settings that are tried where no grid is given."""
    return (
        Axes(quant=("none", "int8", "int4", "nf4", "fp8", "int8-outlier"), new_tokens=(64,)),
        Axes(quant=("none", "int8", "int4"), speculation=("ngram", "draft"), new_tokens=(64,)),
        Axes(quant=("none", "int8", "int4"), cache_dtype=("int8",), new_tokens=(64,)),
        Axes(dtype=("bfloat16", "float16", "float32"), new_tokens=(64,)),
        Axes(attention=("sdpa", "sdpa_flash", "eager", "triton"), new_tokens=(64,)),
    )


def reference_setting() -> Setting:
    """Return the reference for quality: the unmodified checkpoint."""
    return Setting()


def choose(report: Report, bounds: Bounds) -> Choice:
    """Return the fastest setting within the bounds; OptionError if there is none."""
    if not report.quality_tokens:
        raise OptionError(
            "quality was not measured, so no bound on it can be kept. Give more time (--budget) or "
            "tokens to score (--quality-tokens), and a checkpoint with a tokenizer."
        )
    candidates = sorted(_candidates(report, bounds), key=lambda item: -item.speed)
    chosen = next((item for item in candidates if item.excluded is None), None)
    if chosen is None:
        reasons = "\n".join(f"  {item.label}: {item.excluded}" for item in candidates)
        raise OptionError(f"no setting keeps the bounds:\n{reasons}")
    equals = [
        item.label
        for item in candidates
        if item.excluded is None and item is not chosen and _may_be_as_fast(item, chosen)
    ]
    return Choice(chosen=chosen, candidates=tuple(candidates), not_told_apart=tuple(equals))


def _candidates(report: Report, bounds: Bounds) -> list[Candidate]:
    workloads = list(dict.fromkeys(row.workload for row in report.rows))
    found: dict[Setting, list[Row]] = {}
    for row in report.rows:
        found.setdefault(row.setting, []).append(row)
    made = []
    for setting, rows in found.items():
        speed = math.exp(sum(math.log(row.ratio.value) for row in rows) / len(rows))
        missing = len(workloads) - len(rows)
        reason = f"was not measured with {missing} of the workloads" if missing else None
        made.append(
            Candidate(
                setting=setting,
                label=rows[0].label,
                rows=tuple(rows),
                speed=speed,
                excluded=reason or why_not(setting, rows, bounds),
            )
        )
    return made


def why_not(setting: Setting, rows: Sequence[Row], bounds: Bounds) -> str | None:
    """Return which bound a setting breaks, or None."""
    if not setting.cache:
        return "keeps no cache, which only shows what one saves"
    quality = rows[0].quality
    if quality is None:
        return "its quality was not measured"
    if quality.kl_mean is None:
        return "its quality is NaN"
    if quality.kl_mean > bounds.max_kl:
        return f"KL divergence {quality.kl_mean:.2g} is above {bounds.max_kl:g}"
    if quality.same_top1 < bounds.min_same_top1:
        return f"same top token {quality.same_top1:.2%} is below {bounds.min_same_top1:.2%}"
    if bounds.max_memory is not None:
        known = [row.peak_device_bytes or row.peak_bytes for row in rows]
        peaks = [item for item in known if item is not None]
        if len(peaks) < len(known):
            return "there was no time to find its peak of memory (--budget)"
        if max(peaks) > bounds.max_memory:
            return f"peak of {max(peaks) / 2**20:,.0f} MiB is above {bounds.max_memory / 2**20:,.0f} MiB"
    return None


def _may_be_as_fast(other: Candidate, chosen: Candidate) -> bool:
    """Return whether the intervals of two settings meet in each workload."""
    pairs = zip(other.rows, chosen.rows, strict=True)
    return all(one.ratio.high is None or one.ratio.high >= two.ratio.low for one, two in pairs)


def options_of(setting: Setting) -> dict[str, str]:
    """Return the options of a verb that loads and generates, by name, that ask for a setting."""
    found = {"attention": setting.attention, "dtype": setting.dtype}
    if setting.load.recipe is not None:
        found["quant"] = setting.quant
    if setting.cache_dtype != AUTO:
        found["cache_dtype"] = setting.cache_dtype
    if setting.device_map != AUTO:
        found["device_map"] = setting.device_map
    if not setting.graphs:
        found["graphs"] = "false"
    if setting.speculation != "off":
        found["speculate"] = setting.speculation
    return found
