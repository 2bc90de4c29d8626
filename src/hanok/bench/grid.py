"""Which rows a benchmark has, which it leaves out and why, and what fits its time. No torch, no clock.

The first row of a workload is what the others of that workload are compared with.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from hanok.bench.settings import AUTO, Load, Setting, Workload
from hanok.errors import OptionError

MIN_ROUNDS = 3  # fewer say nothing about spread
MAX_ROUNDS = 15
QUALITY_SHARE = 0.2  # of the time, for scoring text
MIN_QUALITY_TOKENS = 64
NO_TIME = "no time for it within --budget"
PILOT_SHARE = 0.05  # of the time, for one answer that shows what the others take
# What workloads are made smaller to: fewer tokens say nothing about prompts, or passes after them.
LEAST_PROMPT_TOKENS, LEAST_NEW_TOKENS = 16, 8
# A copy of a process that has imported torch, made and ended, over starting one (measured: 0.05 to 0.1).
COPY_SHARE = 0.1


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
    """In the order of the table; the first of a workload is its reference."""
    core: tuple[GridRow, ...]
    """Those that are to be there however short the time is, left out or not."""
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one answer took, and how long its first token."""

    seconds: float
    first_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of a run besides its answers."""

    process_s: float
    """To start a process and import torch."""
    load_s: float
    """To load a model there."""
    probe_s: float
    """Of the machine's probes, in each round."""


def plan_grid(
    combinations: Iterable[tuple[Setting, Workload]],
    facts: Facts,
    reference: Setting | None = None,
    core: Iterable[tuple[Setting, Workload]] = (),
) -> GridPlan:
    """Return the rows of some combinations, each once, and those that cannot be measured.

    A `reference` comes first in each workload; `core` names some of the combinations. Raises
    OptionError when no row is left.
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
    named = (GridRow(setting=_resolved(setting, facts), workload=work) for setting, work in core)
    return GridPlan(
        rows=tuple(rows),
        core=tuple(row for row in dict.fromkeys(named) if row in seen),
        skipped=tuple(skipped),
    )


def why_not(row: GridRow, facts: Facts) -> str | None:
    """Return why a row cannot be measured, or None."""
    setting, workload = row.setting, row.workload
    if workload.context > facts.max_context:
        return f"longer than the model's context ({workload.context:,} of {facts.max_context:,} tokens)"
    if not setting.cache and setting.cache_dtype != AUTO:
        return f"needs a cache to keep in {setting.cache_dtype}"
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


def answer_order(rows: Sequence[GridRow], core: Sequence[GridRow]) -> list[GridRow]:
    """Return the rows as they answer first, so that the last are left out where time is short."""
    return list(dict.fromkeys((pilot(rows), *core, *rows)))


def shrunk(workload: Workload, divisor: int) -> Workload:
    """Return a workload with fewer tokens, no fewer than the least; few tokens stay as they are."""
    return replace(
        workload,
        prompt_tokens=_divided(workload.prompt_tokens, divisor, LEAST_PROMPT_TOKENS),
        new_tokens=_divided(workload.new_tokens, divisor, LEAST_NEW_TOKENS),
    )


def _divided(tokens: int, divisor: int, least: int) -> int:
    return max(min(tokens, least), tokens // divisor)


def shrunk_rows(rows: Iterable[GridRow], divisor: int) -> list[GridRow]:
    """Return rows with smaller workloads; those that become equal are one."""
    return list(dict.fromkeys(replace(row, workload=shrunk(row.workload, divisor)) for row in rows))


def divisors(rows: Iterable[GridRow]) -> list[int]:
    """Return 1, 2, 4 and so on, as long as another one makes a workload smaller."""
    workloads, found = _workloads(rows), [1]
    while any(shrunk(item, found[-1]) != shrunk(item, 2 * found[-1]) for item in workloads):
        found.append(2 * found[-1])
    return found


def estimate_s(row: GridRow, measured: Mapping[GridRow, Timing]) -> float | None:
    """Return about how long a row's answer takes, from what others took; None: nothing is known.

    Prompts are taken to cost by the token, further tokens by the pass; without a cache each pass is a
    prompt. A row of the same setting says most, then one of the same attention, then of the workload.
    """
    if row in measured:
        return measured[row].seconds
    known = [other for other in measured if other.setting.cache]
    if not known:
        return None
    near = max(
        known,
        key=lambda other: (
            other.setting == row.setting,
            other.setting.attention == row.setting.attention,
            other.workload == row.workload,
        ),
    )
    timing, theirs, ours = measured[near], near.workload, row.workload
    share = ours.prompt_tokens * ours.batch / (theirs.prompt_tokens * theirs.batch)
    first_s = timing.first_token_s * share
    if not row.setting.cache:
        return first_s * ours.new_tokens
    step_s = (timing.seconds - timing.first_token_s) / max(1, theirs.new_tokens - 1)
    return first_s + step_s * (ours.new_tokens - 1)


def rows_s(
    rows: Sequence[GridRow],
    measured: Mapping[GridRow, Timing],
    costs: Costs,
    loads: Collection[Load],
) -> float:
    """Return about how long rows take: loads but those of `loads`, first answers, the least rounds."""
    new = {row.setting.load for row in rows}.difference(loads)
    answers = sum(estimate_s(row, measured) or 0.0 for row in rows)
    return (
        len(new) * (costs.process_s + costs.load_s)
        + (1 + MIN_ROUNDS) * answers
        + MIN_ROUNDS * costs.probe_s
    )


def scoring_s(
    rows: Sequence[GridRow], measured: Mapping[GridRow, Timing], tokens: int, budget_s: float
) -> float:
    """Return about how long scoring takes: once for all rows that compute alike, a share at most."""
    alike = {row.setting.numerics: row for row in rows}
    per_token = 0.0
    for row in alike.values():
        one = replace(row, workload=replace(row.workload, new_tokens=1))
        prompt = row.workload.prompt_tokens * row.workload.batch
        per_token += (estimate_s(one, measured) or 0.0) / prompt
    return min(QUALITY_SHARE * budget_s, per_token * tokens)


def peak_s(answer_s: float, costs: Costs) -> float:
    """Return about how long it takes to find the peak of one row, whose answer takes `answer_s`."""
    # The first answer of a process also compiles and claims what later ones find there.
    return COPY_SHARE * costs.process_s + costs.load_s + 1.25 * answer_s


def divisor_that_fits(
    rows: Sequence[GridRow],
    taken_s: Callable[[Sequence[GridRow]], tuple[float, float]],
    left_s: float,
) -> tuple[int, bool]:
    """Return by what workloads are divided so that all rows fit the time, and whether they then do.

    `taken_s` returns how long rows take, and how long their peaks take in addition. Peaks depend little
    on the workloads: where they do not fit either way, they do not make them smaller.
    """
    possible = divisors(rows)
    times = {divisor: taken_s(shrunk_rows(rows, divisor)) for divisor in possible}
    for divisor, (rows_take_s, peaks_take_s) in times.items():
        if rows_take_s + peaks_take_s <= left_s:
            return divisor, True
    for divisor, (rows_take_s, _) in times.items():
        if rows_take_s <= left_s:
            return divisor, True
    return possible[-1], False


def shrink_note(rows: Sequence[GridRow], divisor: int, all_fit: bool, budget_s: float) -> str:
    """Say in one line what workloads were made smaller to, and why."""
    changes = []
    for name, what in (("prompt_tokens", "prompts of {} tokens"), ("new_tokens", "{} new tokens")):
        pairs = {
            getattr(item, name): getattr(shrunk(item, divisor), name) for item in _workloads(rows)
        }
        after = list(pairs.values())
        if after != list(pairs):
            shown = after if len(set(after)) > 1 else after[:1]
            changes.append(f"{what.format(_listed(shown))} instead of {_listed(pairs)}")
    which = "all" if all_fit else "more"
    return (
        f"this model is slow on this machine: {', '.join(changes)}, so that {which} rows fit into "
        f"{budget_s:g} s (--budget)"
    )


def _listed(numbers: Iterable[int]) -> str:
    *first, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(first)} and {last}" if first else last


def why_too_slow(
    expected_s: float, *, load_s: float, kept_s: float, left_s: float, rounds: int
) -> str | None:
    """Return why a row does not fit the time, or None.

    `expected_s`: of one answer of it; `load_s`: until its model is there; `kept_s`: of one round of the
    rows that are kept already; `rounds`: how many there must be time for.
    """
    needed = load_s + expected_s + rounds * (expected_s + kept_s)
    if needed <= left_s:
        return None
    loading = f" and its load {load_s:.2g} s" if load_s else ""
    return f"{NO_TIME} (an answer takes about {expected_s:.2g} s{loading})"


def scored(most: int, s_per_token: Sequence[float], allowed_s: float | None) -> tuple[int, int]:
    """Return how many tokens are scored, and for how many variants, of `s_per_token` each.

    The first variant is the reference, without which the others say nothing. Fewer tokens go before
    fewer variants; (0, 0) where not even two have time for `MIN_QUALITY_TOKENS`.
    """
    if allowed_s is None or not s_per_token:
        return most, len(s_per_token)
    affordable = int(allowed_s / max(1e-9, sum(s_per_token)))
    least = min(most, MIN_QUALITY_TOKENS)
    if affordable >= least:
        return min(most, affordable), len(s_per_token)
    count = sum(total * least <= allowed_s for total in accumulate(s_per_token))
    return (least, count) if count > 1 else (0, 0)


def has_time_for_a_round(
    done: int, round_s: float, *, left_s: float | None, later_s: float, asked: int | None
) -> bool:
    """Return whether another round is made, `done` being complete.

    `later_s`: what comes after the rounds, for which rounds beyond the least number leave time. One
    round is always made; without a budget (`left_s` is None), as many as `asked`.
    """
    most = asked or (MIN_ROUNDS if left_s is None else MAX_ROUNDS)
    if done == 0 or done >= most or left_s is None:
        return done < most
    return round_s + (later_s if done >= MIN_ROUNDS else 0.0) <= left_s


def rotated(rows: Sequence[GridRow], round_number: int) -> list[GridRow]:
    """Return the rows of a round: all of them, beginning one further on than the round before."""
    start = round_number % len(rows)
    return [*rows[start:], *rows[:start]]
