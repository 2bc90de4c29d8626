"""Attention of one new token over a long context, where the cache has to come from memory.

    python benchmarks/attention.py [--runs 7] [--output FILE.md]

The contestants: torch's `scaled_dot_product_attention(enable_gqa=True)` with one query per head, as
it is usually called, and hanok's backends through their `attend`. All of them append the token to the
same `KVCache` first, through the same `LayerState`, so only the attention differs. One sweep goes
through so many layers that their caches are twice the processor's last cache; contestants take turns,
sweep by sweep. The time is that of a layer, GB/s counts the keys and values it reads, and every
contestant's largest error against `reference`, which computes in float32, stands beside its speed.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import measure
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hanok.attention.base import AttentionSpec, ForwardBatch, backends, reference
from hanok.attention.cache import KVCache, LayerState, StateSpec

HEADS = ((32, 4, 64), (14, 2, 64), (32, 8, 128))
CONTEXTS = (512, 4096, 16384)
DTYPES = ("bfloat16", "float32")
USUAL = "usual call"
OURS = ("native", "sdpa", "eager")
ASKED_CONTEXT, ASKED_RATIO = 16384, 10.0
ASKED_OWN_RATIO = 2  # of our kernel over torch's best
Attend = Callable[[Tensor, Tensor, Tensor, LayerState], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the table."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    dtype: str

    @property
    def spec(self) -> AttentionSpec:
        """The layer."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
        )

    @property
    def layer_bytes(self) -> int:
        """Keys and values that one layer reads."""
        itemsize = getattr(torch, self.dtype).itemsize
        return 2 * self.context * self.num_kv_heads * self.head_dim * itemsize

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}×{self.head_dim}, {self.context}, {self.dtype}"


def cases(contexts: Sequence[int], dtypes: Sequence[str]) -> Iterator[Case]:
    for dtype in dtypes:
        for heads, kv_heads, head_dim in HEADS:
            for context in contexts:
                yield Case(
                    num_heads=heads,
                    num_kv_heads=kv_heads,
                    head_dim=head_dim,
                    context=context,
                    dtype=dtype,
                )


def contestants(case: Case) -> dict[str, Attend]:
    """Return what attends, each appending the new token and then scoring all of them."""
    spec, start = case.spec, case.context - 1
    batch = ForwardBatch.of([[0]], past=[start])

    def usual(q: Tensor, k: Tensor, v: Tensor, state: LayerState) -> Tensor:
        keys, values = state.extend((0,), start, k.transpose(0, 1), v.transpose(0, 1))
        output = scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], scale=spec.scale, enable_gqa=True
        )
        return output[0].transpose(0, 1)

    def through(name: str) -> Attend:
        backend = backends()[name]
        return lambda q, k, v, state: backend.attend(q, k, v, spec, batch, state)

    return {USUAL: usual} | {name: through(name) for name in OURS}


def filled_cache(case: Case, num_layers: int) -> KVCache:
    """Return a cache with the same random keys and values in every layer."""
    cache = KVCache(
        [StateSpec(num_kv_heads=case.num_kv_heads, head_dim=case.head_dim)] * num_layers,
        num_sequences=1,
        capacity=case.context,
        dtype=getattr(torch, case.dtype),
        devices=[torch.device("cpu")] * num_layers,
    )
    first = cache.states[0]
    first.keys.normal_()
    first.values.normal_()
    for state in cache.states[1:]:
        state.keys.copy_(first.keys)
        state.values.copy_(first.values)
    return cache


@torch.inference_mode()
def measure_case(
    case: Case, *, total_bytes: int, runs: int, guard: measure.Guard
) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Return each contestant's seconds per layer, its error, and how many rounds were disturbed."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    cache = filled_cache(case, max(2, -(-total_bytes // case.layer_bytes)))
    q = torch.randn(1, case.num_heads, case.head_dim, dtype=dtype)
    k, v = (torch.randn(1, case.num_kv_heads, case.head_dim, dtype=dtype) for _ in range(2))
    attends = contestants(case)
    errors = {name: error(attend, q, k, v, cache, case) for name, attend in attends.items()}
    names = list(attends)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    disturbed = 0
    for index in range(runs):
        order = names[index % len(names) :] + names[: index % len(names)]

        def one_round(order: Sequence[str] = order) -> dict[str, float]:
            return {name: sweep(attends[name], q, k, v, cache) for name in order}

        run = guard.run(one_round)
        disturbed += run.is_disturbed
        for name, value in run.result.items():
            seconds[name].append(value)
    return seconds, errors, disturbed


def sweep(attend: Attend, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> float:
    """Return the seconds per layer of one pass through all layers."""
    start = time.perf_counter()
    for state in cache.states:
        attend(q, k, v, state)
    return (time.perf_counter() - start) / len(cache.states)


def error(attend: Attend, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, case: Case) -> float:
    """Return the largest difference to `reference` in the first layer."""
    state = cache.states[0]
    output = attend(q, k, v, state)
    expected = reference(q, state.keys[0], state.values[0], case.spec)
    return float((output.float() - expected).abs().max())


def table_row(
    case: Case, seconds: Mapping[str, Sequence[float]], errors: Mapping[str, float]
) -> list[str]:
    """Return one line: microseconds of all, then ratio, what is asked, GB/s and errors."""
    cells = [str(case)]
    cells += [str(measure.Spread.of(value * 1e6 for value in seconds[name])) for name in seconds]
    ratios = {name: measure.ratio(seconds[USUAL], seconds[name]) for name in OURS}
    cells += [str(ratios[name]) for name in OURS]
    own = measure.ratio(seconds["sdpa"], seconds["native"])
    cells.append(str(own))
    is_asked = case.context == ASKED_CONTEXT and case.dtype == "bfloat16"
    is_met = "yes" if ratios["sdpa"].median >= ASKED_RATIO else "no"
    is_own_met = "yes" if own.median >= ASKED_OWN_RATIO else "no"
    asked = f"≥ {ASKED_RATIO:g}: {is_met}, ≥ {ASKED_OWN_RATIO:g}: {is_own_met}"
    cells.append(asked if is_asked else "–")
    medians = [measure.Spread.of(seconds[name]).median for name in seconds]
    cells.append(" / ".join(measure.rounded(case.layer_bytes / m / 1e9) for m in medians))
    cells.append(" / ".join(f"{errors[name]:.1g}" for name in seconds))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure attention in decode.")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument(
        "--bytes",
        type=int,
        default=max(2**28, 2 * measure.last_cache_bytes()),
        help="caches that one sweep reads (default: %(default)s, twice the last cache)",
    )
    measure.add_common_options(parser, runs=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    log, rows, all_disturbed = measure.log_of(options), [], 0
    for case in cases(options.contexts, options.dtypes):
        seconds, errors, disturbed = measure_case(
            case, total_bytes=options.bytes, runs=options.runs, guard=measure.guard_of(options)
        )
        all_disturbed += disturbed
        log({"case": str(case), "seconds": seconds, "errors": errors, "disturbed": disturbed})
        rows.append(table_row(case, seconds, errors))
    names = (USUAL, *OURS)
    header = ["heads/KV×dim, context, dtype", *(f"{name}, µs" for name in names)]
    header += [*(f"{USUAL} / {name}" for name in OURS), "sdpa / native"]
    header += ["asked of sdpa, of native over sdpa"]
    header += ["GB/s, in this order", "largest error, in this order"]
    explanation = (
        f"One token's attention in one layer, appending to the cache included: median "
        f"(smallest–largest) of {options.runs} sweeps over {options.bytes / 2**20:.0f} MiB of caches, "
        f"in turns. {all_disturbed} of {len(rows) * options.runs} rounds were disturbed by other "
        "programs."
    )
    parts = [
        measure.heading("Attention in decode", options.threads),
        explanation,
        measure.table(header, rows),
    ]
    measure.publish("\n\n".join(parts), options.output)


if __name__ == "__main__":
    main()
