"""Attention backends side by side: time, memory and error of each, on shapes that the caller names.

Every backend appends the new tokens to the same caches through `Backend.attend` and is compared with
`reference` in float64 over the keys and values before they were rounded to the cache's dtype. Caches
come from memory as in a model: calls go round a ring of layers whose caches are larger than those of
processors. Backends take turns (`turns.py`); what a first call costs is left out. Where the time is
bounded, a few queries show what a call would take, and the backends that take most are left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, cycle, product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hanok.attention.base import AttentionSpec, Backend, ForwardBatch, backends, reference
from hanok.attention.cache import LayerState
from hanok.attention.state import KeysAndValues
from hanok.bench.bandwidth import gflop_per_s, read_gb_per_s
from hanok.bench.grid import NO_TIME
from hanok.bench.growth import free_bytes, peak_growth_bytes
from hanok.bench.turns import (
    MIN_SAMPLE_S,
    Deadline,
    RunRound,
    Spread,
    Timer,
    run_plainly,
    take_turns,
)
from hanok.errors import OptionError

RING_BYTES = 2**29
FLOAT_BYTES = 4
TRIED_QUERIES = 16  # of each sequence, to learn what a backend claims before all are computed
CALLS = 5  # of a backend: two for error and memory, two to warm up, and one round at the least
REFERENCE_ROWS = 128  # queries of one KV head scored at a time: at 16,384 keys 16 MiB for each head
DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = ("auto", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """What is computed: `queries` new tokens of each sequence, the last of its `keys`."""

    batch: int = 1
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 64
    queries: int = 1
    keys: int = 4096
    dtype: str = "bfloat16"
    cache_dtype: str = "auto"
    """auto: as `dtype`; int8: with a scale for each token and head."""
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        sizes = ("batch", "num_heads", "num_kv_heads", "head_dim", "queries", "keys")
        for name in sizes:
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise OptionError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads evenly. Choose a "
                "number of KV heads that divides the number of heads."
            )
        if self.queries > self.keys:
            raise OptionError(
                f"{self.queries} queries are more than {self.keys} keys: the queries are the last "
                "of the keys' tokens. Ask for more keys or fewer queries."
            )
        if self.window is not None and self.window < 1:
            raise OptionError(f"window is {self.window}; it must be at least 1.")
        if self.softcap is not None and self.softcap <= 0:
            raise OptionError(f"softcap is {self.softcap:g}; it must be greater than 0.")
        for name, known in (("dtype", DTYPES), ("cache_dtype", CACHE_DTYPES)):
            if getattr(self, name) not in known:
                raise OptionError(
                    f"{name} {getattr(self, name)!r} is unknown. Choose one of: {', '.join(known)}."
                )

    @property
    def spec(self) -> AttentionSpec:
        """The layer."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            window=self.window,
            softcap=self.softcap,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """What queries, keys and values are computed in."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def kept_dtype(self) -> torch.dtype:
        """What the cache holds."""
        return torch.int8 if self.cache_dtype == "int8" else self.torch_dtype

    @property
    def cache_bytes(self) -> int:
        """Bytes of one layer's keys and values."""
        return self._kept_bytes(self.keys)

    @property
    def moved_bytes(self) -> int:
        """What has to be moved at least: keys and values that are seen, queries and results."""
        window = self.window or self.keys
        seen = min(self.keys, window + self.queries - 1)
        heads = 2 * self.batch * self.queries * self.num_heads * self.head_dim
        return self._kept_bytes(seen) + heads * self.torch_dtype.itemsize

    @property
    def flop(self) -> int:
        """Two products over the keys that each query sees; a masked score counts nothing."""
        window, past = self.window or self.keys, self.keys - self.queries
        pairs = sum(min(window, past + index + 1) for index in range(self.queries))
        return 4 * self.batch * self.num_heads * self.head_dim * pairs

    def _kept_bytes(self, keys: int) -> int:
        return self.batch * self.kept.nbytes(keys, str(self.kept_dtype).removeprefix("torch."))

    @property
    def kept(self) -> KeysAndValues:
        """What the cache holds of a sequence."""
        return KeysAndValues(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one backend did. Shares are of the machine's measured limits."""

    samples: tuple[float, ...]
    """Seconds of a call, one for each round."""
    seconds: Spread
    ratio: Spread
    """Time of the first backend over this one's: above 1 it is faster."""
    gb_per_s: float
    bandwidth_share: float
    gflop_per_s: float
    flop_share: float
    extra_bytes: int | None
    """The most that the process grew by during a call; None where the system does not tell."""
    max_error: float
    relative_error: float
    """Root mean square of the error over that of the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One case: what was measured, and why other backends were not."""

    case: AttentionCase
    measured: Mapping[str, Measured]
    not_measured: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionReport:
    """All cases, and the limits that shares refer to."""

    device: str
    threads: int
    rounds: int
    ring_bytes: int
    gb_per_s: float
    gflop_per_s: float
    results: tuple[CaseResult, ...]

    def as_object(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        found = {name: getattr(self, name) for name in self.__slots__ if name != "results"}
        found["results"] = [
            {
                "case": asdict(result.case),
                "measured": {name: asdict(row) for name, row in result.measured.items()},
                "not_measured": dict(result.not_measured),
            }
            for result in self.results
        ]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How it is measured."""

    device: torch.device
    rounds: int = 7
    ring_bytes: int = RING_BYTES
    """Caches that calls go round, so that they come from memory."""
    min_sample_s: float = MIN_SAMPLE_S
    run_round: RunRound = run_plainly
    others: Mapping[str, Backend] = field(default_factory=lambda: MappingProxyType({}))
    """Contestants besides the registered backends; they come first."""
    gb_per_s: float | None = None
    """The memory's speed, for shares; None: measured."""
    gflop_per_s: float | None = None
    """The rate of products in the dtype; None: measured."""
    free_bytes: int | None = None
    """What a call may claim; None: what the system has left when it is made."""
    budget_s: float | None = None
    """How long all of it may take; None: as long as it does."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise OptionError(f"rounds is {self.rounds}; it must be at least 1.")
        if self.budget_s is not None and self.budget_s <= 0:
            raise OptionError(f"the budget is {self.budget_s:g} s; it must be more than 0.")

    def left_bytes(self) -> int:
        """Return what may still be claimed now."""
        return free_bytes(self.device) if self.free_bytes is None else self.free_bytes


def grid(
    queries: Sequence[int], keys: Sequence[int], shape: AttentionCase
) -> tuple[list[AttentionCase], list[str]]:
    """Return the cases of all lengths, and which combinations are left out and why.

    Raises OptionError when there are no others.
    """
    pairs = list(product(queries, keys))
    left_out = [f"{new} queries over {all_keys} keys" for new, all_keys in pairs if new > all_keys]
    if len(left_out) == len(pairs):
        raise OptionError(
            f"there is nothing to measure: {', '.join(left_out)}. Queries are the last of the "
            "keys' tokens; ask for more keys or fewer queries."
        )
    cases = [
        replace(shape, queries=new, keys=all_keys) for new, all_keys in pairs if new <= all_keys
    ]
    return cases, [f"{text}: the queries are the last of the keys' tokens" for text in left_out]


@torch.inference_mode()
def measure_attention(
    cases: Sequence[AttentionCase],
    conditions: Conditions,
    *,
    progress: Callable[[AttentionCase], None] = lambda case: None,
) -> AttentionReport:
    """Measure every backend that fits on every case."""
    deadline = Deadline(conditions.budget_s)
    limit_gb = conditions.gb_per_s or read_gb_per_s(conditions.device)
    limit_gflop = conditions.gflop_per_s or gflop_per_s(conditions.device, cases[0].torch_dtype)
    results = []
    for number, case in enumerate(cases):
        progress(case)
        share = Deadline(deadline.left_s(len(cases) - number))
        results.append(_measure_case(case, conditions, (limit_gb, limit_gflop), share))
    return AttentionReport(
        device=str(conditions.device),
        threads=torch.get_num_threads(),
        rounds=conditions.rounds,
        ring_bytes=conditions.ring_bytes,
        gb_per_s=limit_gb,
        gflop_per_s=limit_gflop,
        results=tuple(results),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """The inputs of one case: exact keys and values, and a ring of layers that hold them.

    q, k, v: (tokens, heads, head_dim), packed. keys, values: (batch, kv_heads, keys, head_dim).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    batch: ForwardBatch
    states: Sequence[LayerState]

    @classmethod
    def of(cls, case: AttentionCase, conditions: Conditions) -> "Tensors":
        """Draw them; the same case has the same."""
        device, dtype = conditions.device, case.torch_dtype
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        q = draw(case.batch * case.queries, case.num_heads, case.head_dim)
        keys, values = (
            draw(case.batch, case.num_kv_heads, case.keys, case.head_dim) for _ in range(2)
        )
        num_layers = _num_layers(case, conditions)
        states = [
            LayerState.claim(case.kept, case.batch, case.keys, case.kept_dtype, device)
            for _ in range(num_layers)
        ]
        for slot in range(case.batch):
            states[0].extend((slot,), 0, keys[slot], values[slot])
        for state in states[1:]:
            _copy(states[0], state)
        past = case.keys - case.queries
        new_k, new_v = (
            whole[:, :, past:].transpose(1, 2).reshape(-1, case.num_kv_heads, case.head_dim)
            for whole in (keys, values)
        )
        batch = ForwardBatch.of(
            [[0] * case.queries] * case.batch, past=[past] * case.batch, device=device
        )
        return cls(q=q, k=new_k, v=new_v, keys=keys, values=values, batch=batch, states=states)

    def last(self, queries: int) -> "Tensors":
        """Return the same with the last so many queries of each sequence."""
        num_sequences, _, num_keys, head_dim = self.keys.shape
        q, k, v = (
            whole.view(num_sequences, -1, whole.shape[1], head_dim)[:, -queries:].flatten(0, 1)
            for whole in (self.q, self.k, self.v)
        )
        batch = ForwardBatch.of(
            [[0] * queries] * num_sequences,
            past=[num_keys - queries] * num_sequences,
            device=self.q.device,
        )
        return replace(self, q=q, k=k, v=v, batch=batch)

    def expected(self, spec: AttentionSpec) -> Tensor:
        """Return the exact result in float64, a few queries of one KV head at a time."""
        group = spec.num_heads // spec.num_kv_heads
        part = AttentionSpec(
            num_heads=group,
            num_kv_heads=1,
            head_dim=spec.head_dim,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )
        num_sequences, _, num_keys, _ = self.keys.shape
        queries = self.q.view(num_sequences, -1, spec.num_heads, spec.head_dim)
        result = torch.empty_like(queries, dtype=torch.float64)
        time = queries.shape[1]
        parts = product(range(num_sequences), range(spec.num_kv_heads), _rows(time))
        for slot, head, (start, end) in parts:
            heads, last = slice(head * group, (head + 1) * group), num_keys - (time - end)
            result[slot, start:end, heads] = reference(
                queries[slot, start:end, heads],
                self.keys[slot, head : head + 1, :last],
                self.values[slot, head : head + 1, :last],
                part,
                torch.float64,
            )
        return result.view(self.q.shape)


def _num_layers(case: AttentionCase, conditions: Conditions) -> int:
    return max(2, -(-conditions.ring_bytes // case.cache_bytes))


def _check_fits(case: AttentionCase, conditions: Conditions) -> None:
    """Raise OptionError where the inputs alone would not fit: the ring, and what it is drawn from."""
    drawn = case.batch * case.num_kv_heads * case.keys * case.head_dim
    needed = _num_layers(case, conditions) * case.cache_bytes + 4 * drawn * FLOAT_BYTES
    free = conditions.left_bytes()
    if needed > free:
        raise OptionError(
            f"{case.batch} x {case.keys} keys take {needed / 2**30:.2f} GiB, and "
            f"{free / 2**30:.2f} GiB are free. Ask for fewer keys, fewer sequences or a smaller ring."
        )


def _copy(source: LayerState, target: LayerState) -> None:
    target.keys.copy_(source.keys)
    target.values.copy_(source.values)
    if source.key_scale is not None and target.key_scale is not None:
        target.key_scale.copy_(source.key_scale)
    if source.value_scale is not None and target.value_scale is not None:
        target.value_scale.copy_(source.value_scale)


def _rows(time: int) -> Iterator[tuple[int, int]]:
    for start in range(0, time, REFERENCE_ROWS):
        yield start, min(start + REFERENCE_ROWS, time)


def _measure_case(
    case: AttentionCase, conditions: Conditions, limits: tuple[float, float], deadline: Deadline
) -> CaseResult:
    """Measure one case; `limits` are the machine's GB/s and GFLOP/s."""
    left_s = deadline.left_s()
    if left_s is not None and left_s <= 0:
        names = (*conditions.others, *backends())
        return CaseResult(case=case, measured={}, not_measured=dict.fromkeys(names, NO_TIME))
    _check_fits(case, conditions)
    tensors = Tensors.of(case, conditions)
    attends, not_measured = _contestants(case, tensors, conditions, deadline)
    if not attends:
        return CaseResult(case=case, measured={}, not_measured=not_measured)
    expected = tensors.expected(case.spec)
    timers: dict[str, Timer] = {}
    extra: dict[str, int | None] = {}
    errors: dict[str, tuple[float, float]] = {}
    for name, attend in attends.items():
        try:
            errors[name] = _errors(attend(), expected)
            extra[name] = peak_growth_bytes(attend, conditions.device)
        except RuntimeError as error:
            not_measured[name] = _failed(error)
            continue
        timers[name] = Timer(
            action=attend, device=conditions.device, min_sample_s=conditions.min_sample_s
        )
        timers[name].warm_up()
    seconds = take_turns(timers, conditions.rounds, conditions.run_round, deadline.left_s())
    measured = {}
    for name, found in seconds.items():
        spread = Spread.of(found)
        gb, gflop = case.moved_bytes / spread.median / 1e9, case.flop / spread.median / 1e9
        measured[name] = Measured(
            samples=tuple(found),
            seconds=spread,
            ratio=Spread.of_ratio(next(iter(seconds.values())), found),
            gb_per_s=gb,
            bandwidth_share=gb / limits[0],
            gflop_per_s=gflop,
            flop_share=gflop / limits[1],
            extra_bytes=extra[name],
            max_error=errors[name][0],
            relative_error=errors[name][1],
        )
    return CaseResult(case=case, measured=measured, not_measured=not_measured)


def _contestants(
    case: AttentionCase, tensors: Tensors, conditions: Conditions, deadline: Deadline
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Return what attends with each backend that fits, in memory and time too, and why others do not."""
    attends: dict[str, Callable[[], Tensor]] = {}
    calls_s: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, backend in {**conditions.others, **backends()}.items():
        reason = backend.why_not(case.spec, conditions.device, case.torch_dtype)
        if reason is None:
            try:
                reason, calls_s[name] = _tried(backend, case, tensors, conditions)
            except RuntimeError as error:
                reason = _failed(error)
        if reason is None:
            attends[name] = around_the_ring(backend, case.spec, tensors)
        else:
            reasons[name] = reason
    left_s = deadline.left_s()
    if left_s is not None:  # for the exact result too
        tried = min(TRIED_QUERIES, case.queries)
        few = tensors.last(tried)
        exact = Timer(action=lambda: few.expected(case.spec), device=conditions.device)
        left_s -= exact() * case.queries / tried
    fits = fitting({name: calls_s[name] for name in attends}, left_s)
    for name in attends:
        if name not in fits:
            reasons[name] = f"{NO_TIME} (a call would take about {calls_s[name]:.2g} s)"
    return {name: attend for name, attend in attends.items() if name in fits}, reasons


def fitting(calls_s: Mapping[str, float], left_s: float | None) -> set[str]:
    """Return the contestants that fit the time, the fastest first, by what one call of each takes."""
    names = sorted(calls_s, key=lambda name: calls_s[name])
    if left_s is None:
        return set(names)
    ends = accumulate(CALLS * calls_s[name] for name in names)
    return {name for name, end_s in zip(names, ends, strict=True) if end_s <= left_s}


def _failed(error: RuntimeError) -> str:
    return f"failed: {str(error).strip().splitlines()[0]}"


def _tried(
    backend: Backend, case: AttentionCase, tensors: Tensors, conditions: Conditions
) -> tuple[str | None, float]:
    """Return why a call would not fit into memory, or None, and about how many seconds it would take.

    Both by a few queries: nothing that a backend claims grows faster than with their number.
    """
    tried = min(TRIED_QUERIES, case.queries)
    few = Timer(
        action=around_the_ring(backend, case.spec, tensors.last(tried)), device=conditions.device
    )
    few()
    claimed = peak_growth_bytes(few, conditions.device)
    call_s = few() * case.queries / tried
    if claimed is None:
        return None, call_s
    needed = claimed * case.queries // tried
    free = conditions.left_bytes()
    if needed <= free:
        return None, call_s
    reason = f"would claim about {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free"
    return reason, call_s


def around_the_ring(
    backend: Backend, spec: AttentionSpec, tensors: Tensors
) -> Callable[[], Tensor]:
    """Return what attends in one layer after another. The new tokens are in the caches already."""
    states = cycle(tensors.states)
    q, k, v, batch = tensors.q, tensors.k, tensors.v, tensors.batch
    return lambda: backend.attend(q, k, v, spec, batch, next(states))


def _errors(output: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest error, and the root mean square of it over that of the result."""
    difference = output.double() - expected
    return float(difference.abs().max()), float(difference.norm() / expected.norm())
