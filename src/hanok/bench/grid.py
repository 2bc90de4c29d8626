"""Which rows a benchmark has, which it leaves out and why, and what fits its time. No torch, no clock.

The first row of a workload is what the others of that workload are compared with.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hanok.bench.settings import AUTO, Setting, Workload
from hanok.errors import OptionError

MIN_ROUNDS = 3  # fewer say nothing about spread
MAX_ROUNDS = 15
QUALITY_SHARE = 0.2  # of the time, for scoring text
MIN_QUALITY_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRow:
    """One row to be measured."""

    setting: Setting
    workload: Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """One row that is not measured."""

    row: GridRow
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the planner must know of a checkpoint and a machine."""

    max_context: int
    dtype: str
    """What "auto" computes in."""
    attention: Callable[[Setting], str]
    """The name of the backend that "auto" is, where dtype and device are the setting's."""
    why_not_attention: Callable[[Setting], str | None]
    """Why its backend cannot serve the model."""
    why_not_speculation: Callable[[str], str | None]
    why_not_graphs: Callable[[Setting], str | None]
    """Why its passes are not recorded anyway."""
    why_not_load: Callable[[Setting, Workload], str | None]
    """Why there is not enough memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPlan:
    """What is measured, in order, and what is not."""

    rows: tuple[GridRow, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one answer took, and how long its first token."""

    seconds: float
    first_token_s: float


def plan_grid(
    combinations: Iterable[tuple[Setting, Workload]], facts: Facts, reference: Setting | None = None
) -> GridPlan:
    """Return the rows of some combinations, each once, and those that cannot be measured.

    A `reference` comes first in each workload. Raises OptionError when no row is left.
    """
    rows: list[GridRow] = []
    skipped: list[Skipped] = []
    seen: set[GridRow] = set()
    for setting, workload in _with_reference(combinations, reference):
        row = GridRow(setting=_resolved(setting, facts), workload=workload)
        if row in seen:
            continue
        seen.add(row)
        reason = why_not(row, facts)
        if reason is None:
            rows.append(row)
        else:
            skipped.append(Skipped(row=row, reason=reason))
    if not rows:
        reasons = "\n".join(f"  {item.row.setting.label('')}: {item.reason}" for item in skipped)
        raise OptionError(f"no row of the grid can be measured:\n{reasons}")
    order = {workload: index for index, workload in enumerate(_workloads(rows))}
    rows.sort(key=lambda row: order[row.workload])
    return GridPlan(rows=tuple(rows), skipped=tuple(skipped))


def why_not(row: GridRow, facts: Facts) -> str | None:
    """Return why a row cannot be measured, or None."""
    setting, workload = row.setting, row.workload
    if workload.context > facts.max_context:
        return (
            f"{workload.context:,} tokens are more than the model's context of "
            f"{facts.max_context:,}"
        )
    if not setting.cache and setting.cache_dtype != AUTO:
        return "without a cache there is none to keep in " + setting.cache_dtype
    if not setting.cache and setting.speculation != "off":
        return "speculation needs a cache"
    if not setting.cache and not setting.graphs:
        return "without a cache no pass is short enough to be recorded"
    return (
        facts.why_not_attention(setting)
        or (None if setting.graphs else facts.why_not_graphs(setting))
        or facts.why_not_speculation(setting.speculation)
        or facts.why_not_load(setting, workload)
    )


def _with_reference(
    combinations: Iterable[tuple[Setting, Workload]], reference: Setting | None
) -> list[tuple[Setting, Workload]]:
    given = list(combinations)
    if reference is None:
        return given
    workloads = dict.fromkeys(workload for _, workload in given)
    return [*((reference, workload) for workload in workloads), *given]


def _resolved(setting: Setting, facts: Facts) -> Setting:
    """Return a setting with the names that "auto" stands for, so that none is measured twice."""
    if setting.dtype == AUTO:
        setting = replace(setting, dtype=facts.dtype)
    if setting.attention == AUTO:
        setting = replace(setting, attention=facts.attention(setting))
    return setting


def _workloads(rows: Iterable[GridRow]) -> list[Workload]:
    return list(dict.fromkeys(row.workload for row in rows))


def pilot(rows: Sequence[GridRow]) -> GridRow:
    """Return the row that is measured first, for what it says of the others: one with a cache."""
    return next((row for row in rows if row.setting.cache), rows[0])


def estimate_s(row: GridRow, measured: Mapping[GridRow, Timing]) -> float | None:
    """Return about how long a row's answer takes, from what others took; None: nothing is known.

    Prompts are taken to cost by the token, further tokens by the pass; without a cache each pass is a
    prompt. A row of the same setting says most, then one of the same workload.
    """
    if row in measured:
        return measured[row].seconds
    known = [other for other in measured if other.setting.cache]
    if not known:
        return None
    near = max(
        known,
        key=lambda other: (other.setting == row.setting, other.workload == row.workload),
    )
    timing, theirs, ours = measured[near], near.workload, row.workload
    share = ours.prompt_tokens * ours.batch / (theirs.prompt_tokens * theirs.batch)
    first_s = timing.first_token_s * share
    if not row.setting.cache:
        return first_s * ours.new_tokens
    step_s = (timing.seconds - timing.first_token_s) / max(1, theirs.new_tokens - 1)
    return first_s + step_s * (ours.new_tokens - 1)


def why_too_slow(expected_s: float, kept_s: float, left_s: float, budget_s: float) -> str | None:
    """Return why a row does not fit the time, or None.

    `expected_s`: of one answer of it; `kept_s`: of one round of the rows that are kept already.
    """
    needed = expected_s + MIN_ROUNDS * (expected_s + kept_s)
    if needed <= left_s:
        return None
    return (
        f"takes about {expected_s:.2g} s an answer, more than {budget_s:g} s have room for "
        "(--budget)"
    )


def quality_tokens(most: int, s_per_token: float, variants: int, budget_s: float | None) -> int:
    """Return how many tokens to score, so that all variants take a share of the time at most."""
    if budget_s is None:
        return most
    affordable = QUALITY_SHARE * budget_s / (max(s_per_token, 1e-9) * variants)
    return min(most, max(MIN_QUALITY_TOKENS, int(affordable)))


def has_time_for_a_round(
    done: int, round_s: float, left_s: float | None, asked: int | None
) -> bool:
    """Return whether another round is made, `done` being complete.

    The least number may take longer than was expected of it, but no round begins when time is up.
    """
    if asked is not None:
        return done < asked
    if left_s is None or done == 0:
        return done < MIN_ROUNDS
    needed = round_s if done >= MIN_ROUNDS else 0.0
    return done < MAX_ROUNDS and needed <= left_s


def rotated(rows: Sequence[GridRow], round_number: int) -> list[GridRow]:
    """Return the rows of a round: all of them, beginning one further on than the round before."""
    start = round_number % len(rows)
    return [*rows[start:], *rows[:start]]
