"""What sizes in multiples of 8 and of 64 bring on this machine: products and attention around one size.

Sizes a little off a multiple of 64 take turns with it. A time is divided by the FLOP of its size and by
the same figure of the multiple of 64, so that 1 means: the odd size costs only what it adds. Where the
time is bounded, a few rows show what a call would take, and groups that take too long are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from statistics import median

import torch
from torch import Tensor

from hanok.attention.base import AUTO_ORDER, backends, why_not_table
from hanok.bench.attention import (
    TRIED_QUERIES,
    AttentionCase,
    Conditions,
    Tensors,
    around_the_ring,
)
from hanok.bench.grid import NO_TIME
from hanok.bench.spread import Spread
from hanok.bench.turns import Deadline, Timer, take_turns
from hanok.errors import DeadlineError, OptionError
from hanok.models.linear import dense

DEFAULT_SIZE = 2048
OFFSETS = (-64, -8, -1, 0, 1, 8, 64)
NUM_BACKENDS = 2  # the first of those that "auto" would take
CALLS = 3  # of a size: two to warm up, and one round at the least
ALIGNED_ITEMS = 64  # weights of odd sizes begin where torch would have put them


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRow:
    """One size of a group."""

    size: int
    seconds: Spread
    per_flop: Spread
    """Time per FLOP over that of the base in the same rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sizes that were measured in turns, and what they show."""

    what: str
    base: int
    rows: tuple[SizeRow, ...]
    finding: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplesReport:
    """All groups of one machine and dtype."""

    device: str
    dtype: str
    threads: int
    rounds: int
    groups: tuple[Group, ...]
    left_out: tuple[str, ...]
    """Groups that there was no time for."""


@torch.inference_mode()
def measure_multiples(
    size: int,
    tokens: Sequence[int],
    shape: AttentionCase,
    conditions: Conditions,
    *,
    progress: Callable[[str], None] = lambda what: None,
) -> MultiplesReport:
    """Measure products of square weights around `size`, and attention around the shape's head_dim.

    `tokens` are rows of the product and queries of attention, each a separate group.
    Raises OptionError when `size` is not a multiple of 64.
    """
    if size < 64 or size % 64:
        raise OptionError(f"the size is {size}; it must be a multiple of 64, such as 2048.")
    reasons = why_not_table(shape.spec, conditions.device, shape.torch_dtype)
    names = [name for name in AUTO_ORDER if reasons[name] is None][:NUM_BACKENDS]
    parts: list[tuple[str, Callable[[str, Deadline], Group]]] = []
    for count in tokens:
        what = f"linear, {_counted(count, 'token')}"
        parts.append((what, partial(_products, size, count, shape, conditions)))
    for count in tokens:
        for name in names:
            what = f"head_dim, {name}, {_counted(count, 'query', 'queries')} over {shape.keys} keys"
            case = replace(shape, queries=count)
            parts.append((what, partial(_heads, name, case, conditions)))
    deadline, groups, left_out = Deadline(conditions.budget_s), [], []
    for number, (what, measure) in enumerate(parts):
        progress(what)
        try:
            groups.append(measure(what, Deadline(deadline.left_s(len(parts) - number))))
        except DeadlineError as error:
            left_out.append(f"{what}: {error}")
    return MultiplesReport(
        device=str(conditions.device),
        dtype=shape.dtype,
        threads=torch.get_num_threads(),
        rounds=conditions.rounds,
        groups=tuple(groups),
        left_out=tuple(left_out),
    )


def around(base: int) -> list[int]:
    """Return sizes a little off a multiple of 64, and its neighbours."""
    return [base + offset for offset in OFFSETS if base + offset > 0]


def group_of(
    what: str, base: int, seconds: Mapping[int, Sequence[float]], flop: Mapping[int, int]
) -> Group:
    """Return the rows and the finding of times that were taken in the same rounds."""
    costs = {size: [value / flop[size] for value in values] for size, values in seconds.items()}
    rows = tuple(
        SizeRow(
            size=size,
            seconds=Spread.of(seconds[size]),
            per_flop=Spread.of_ratio(costs[size], costs[base]),
        )
        for size in seconds
    )
    return Group(what=what, base=base, rows=rows, finding=finding(what, base, costs))


def finding(what: str, base: int, costs: Mapping[int, Sequence[float]]) -> str:
    """Say what the kinds of sizes cost, and no more than their spread allows.

    A kind's cost in a round is the median of its sizes.
    """
    eights = [size for size in costs if size % 8 == 0 and size % 64]
    others = [size for size in costs if size % 8]
    parts = [
        f"{name} {_compared(_kind(costs, sizes), costs[base])}"
        for name, sizes in (
            ("other multiples of 8", eights),
            ("sizes that are no multiple of 8", others),
        )
        if sizes
    ]
    return f"{what}: next to {base}, {' and '.join(parts)}."


def _kind(costs: Mapping[int, Sequence[float]], sizes: Sequence[int]) -> list[float]:
    return [median(values) for values in zip(*(costs[size] for size in sizes), strict=True)]


def _compared(costs: Sequence[float], base: Sequence[float]) -> str:
    ratio = Spread.of_ratio(costs, base)
    low, high = sorted(abs(value - 1) for value in (ratio.low, ratio.high))
    found = f"{abs(ratio.median - 1):.0%} ({low:.0%} to {high:.0%})"
    if ratio.low > 1:
        return f"take {found} longer per FLOP"
    if ratio.high < 1:
        return f"take {found} less time per FLOP"
    return f"cost the same within the spread ({ratio.low:.2f} to {ratio.high:.2f} times)"


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one}" if count == 1 else f"{count} {many or one + 's'}"


def _timed(
    actions: Mapping[int, Callable[[], object]], conditions: Conditions, deadline: Deadline
) -> dict[int, list[float]]:
    timers = {
        str(size): Timer(
            action=action, device=conditions.device, min_sample_s=conditions.min_sample_s
        )
        for size, action in actions.items()
    }
    for timer in timers.values():
        timer.warm_up()
    found = take_turns(timers, conditions.rounds, conditions.run_round, deadline.left_s())
    return {int(size): values for size, values in found.items()}


def _check_time(
    few: Callable[[], object], times: float, sizes: int, conditions: Conditions, deadline: Deadline
) -> None:
    """Raise DeadlineError where calls that take `times` as long as `few` do not fit."""
    left_s = deadline.left_s()
    if left_s is None:
        return
    timer = Timer(action=few, device=conditions.device)
    timer()
    call_s = timer() * times
    if call_s * sizes * CALLS > left_s:
        raise DeadlineError(f"{NO_TIME} (a call would take about {call_s:.2g} s)")


def _products(
    base: int,
    tokens: int,
    shape: AttentionCase,
    conditions: Conditions,
    what: str,
    deadline: Deadline,
) -> Group:
    """Measure `dense` as models call it; all sizes go round the same memory."""
    dtype, device = shape.torch_dtype, conditions.device
    sizes = around(base)
    items = max(2 * _aligned(max(sizes)), conditions.ring_bytes // dtype.itemsize)
    memory = torch.empty(items, dtype=dtype, device=device)
    pattern = torch.randn(2**16, generator=torch.Generator(device).manual_seed(0), device=device)
    for start in range(0, items, len(pattern)):
        part = memory[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])

    def action(size: int, tokens: int) -> Callable[[], Tensor]:
        step = _aligned(size)
        weights = cycle(
            memory[start : start + size * size].view(size, size)
            for start in range(0, items - step + 1, step)
        )
        x = memory[: tokens * size].view(tokens, size).clone()
        return lambda: dense(x, next(weights))

    tried = min(TRIED_QUERIES, tokens)
    _check_time(action(base, tried), tokens / tried, len(sizes), conditions, deadline)
    seconds = _timed({size: action(size, tokens) for size in sizes}, conditions, deadline)
    return group_of(what, base, seconds, {size: 2 * tokens * size * size for size in sizes})


def _aligned(size: int) -> int:
    return -(-size * size // ALIGNED_ITEMS) * ALIGNED_ITEMS


def _heads(
    name: str, case: AttentionCase, conditions: Conditions, what: str, deadline: Deadline
) -> Group:
    base = -(-case.head_dim // 64) * 64
    cases = {size: replace(case, head_dim=size) for size in around(base)}
    # All are in memory at once, and share what one would have.
    share = replace(conditions, ring_bytes=conditions.ring_bytes // len(cases))
    tensors = {size: Tensors.of(item, share) for size, item in cases.items()}
    tried = min(TRIED_QUERIES, case.queries)
    few = around_the_ring(backends()[name], cases[base].spec, tensors[base].last(tried))
    _check_time(few, case.queries / tried, len(cases), conditions, deadline)
    actions = {
        size: around_the_ring(backends()[name], item.spec, tensors[size])
        for size, item in cases.items()
    }
    seconds = _timed(actions, conditions, deadline)
    return group_of(what, base, seconds, {size: item.flop for size, item in cases.items()})
