"""Attention of one new token over a long context, where the cache has to come from memory.

    python benchmarks/attention.py [--runs 7] [--output FILE.md]

`hanok bench attention` (hanok/bench/attention.py) with a contestant more: torch's
`scaled_dot_product_attention(enable_gqa=True)` with one query per head, as it is usually called. It
appends the token to the same cache as hanok's backends, so only the attention differs. Calls go round
caches that are twice the processor's last cache; a round that other programs disturbed is repeated.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence

import measure
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hanok.attention.base import AttentionSpec, ForwardBatch
from hanok.attention.cache import LayerState
from hanok.bench.attention import (
    AttentionCase,
    AttentionReport,
    CaseResult,
    Conditions,
    measure_attention,
)
from hanok.bench.spread import Spread, rounded

HEADS = ((32, 4, 64), (14, 2, 64), (32, 8, 128))
CONTEXTS = (512, 4096, 16384)
DTYPES = ("bfloat16", "float32")
USUAL = "usual call"
OURS = ("native", "sdpa", "eager")
ASKED_CONTEXT, ASKED_RATIO = 16384, 10.0
ASKED_OWN_RATIO = 2  # of our kernel over torch's best


class UsualCall:
    """torch's fused attention, one query for each head."""

    name = USUAL
    summary = "scaled_dot_product_attention(enable_gqa=True)"
    recorded_on = None

    def why_not(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return None: it is given nothing that it cannot do."""
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        batch: ForwardBatch,
        state: LayerState | None,
    ) -> Tensor:
        """Append the token and score all."""
        assert state is not None
        past = batch.host.key_lengths[0] - 1
        keys, values = state.extend((0,), past, k.transpose(0, 1), v.transpose(0, 1))
        output = scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], scale=spec.scale, enable_gqa=True
        )
        return output[0].transpose(0, 1)


def cases(contexts: Sequence[int], dtypes: Sequence[str]) -> Iterator[AttentionCase]:
    for dtype in dtypes:
        for heads, kv_heads, head_dim in HEADS:
            for context in contexts:
                yield AttentionCase(
                    num_heads=heads,
                    num_kv_heads=kv_heads,
                    head_dim=head_dim,
                    keys=context,
                    dtype=dtype,
                )


def name_of(case: AttentionCase) -> str:
    return f"{case.num_heads}/{case.num_kv_heads}×{case.head_dim}, {case.keys}, {case.dtype}"


class Rounds:
    """Repeats rounds that other programs disturbed, and counts those that stayed so."""

    def __init__(self, guard: measure.Guard) -> None:
        self.guard = guard
        self.disturbed = 0

    def __call__(self, one_round: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the least disturbed of several attempts."""
        run = self.guard.run(one_round)
        self.disturbed += run.is_disturbed
        return run.result


def measured(
    case: AttentionCase, *, ring_bytes: int, runs: int, rounds: Rounds, min_sample_s: float = 0.02
) -> AttentionReport:
    """Measure one line of the table."""
    conditions = Conditions(
        device=torch.device("cpu"),
        rounds=runs,
        ring_bytes=ring_bytes,
        min_sample_s=min_sample_s,
        run_round=rounds,
        others={USUAL: UsualCall()},
        gb_per_s=1.0,  # the table has no shares
        gflop_per_s=1.0,
    )
    return measure_attention([case], conditions)


def table_row(result: CaseResult) -> list[str]:
    """Return one line: microseconds of all, then ratios, what is asked, GB/s and errors."""
    found = {name: result.measured[name] for name in (USUAL, *OURS)}
    spreads = {name: Spread.of(row.samples) for name, row in found.items()}
    cells = [name_of(result.case)]
    cells += [
        str(Spread(*(1e6 * value for value in (s.median, s.low, s.high)))) for s in spreads.values()
    ]
    usual = found[USUAL].samples
    ratios = {name: Spread.of_ratio(usual, found[name].samples) for name in OURS}
    cells += [str(ratios[name]) for name in OURS]
    own = Spread.of_ratio(found["sdpa"].samples, found["native"].samples)
    cells.append(str(own))
    is_asked = result.case.keys == ASKED_CONTEXT and result.case.dtype == "bfloat16"
    is_met = "yes" if ratios["sdpa"].median >= ASKED_RATIO else "no"
    is_own_met = "yes" if own.median >= ASKED_OWN_RATIO else "no"
    asked = f"≥ {ASKED_RATIO:g}: {is_met}, ≥ {ASKED_OWN_RATIO:g}: {is_own_met}"
    cells.append(asked if is_asked else "–")
    cells.append(" / ".join(rounded(row.gb_per_s) for row in found.values()))
    cells.append(" / ".join(f"{row.max_error:.1g}" for row in found.values()))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure attention in decode.")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument(
        "--bytes",
        type=int,
        default=max(2**28, 2 * measure.last_cache_bytes()),
        help="caches that calls go round (default: %(default)s, twice the last cache)",
    )
    measure.add_common_options(parser, runs=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    log, rows, rounds = measure.log_of(options), [], Rounds(measure.guard_of(options))
    for case in cases(options.contexts, options.dtypes):
        report = measured(case, ring_bytes=options.bytes, runs=options.runs, rounds=rounds)
        log(report.as_object())
        rows.append(table_row(report.results[0]))
    names = (USUAL, *OURS)
    header = ["heads/KV×dim, context, dtype", *(f"{name}, µs" for name in names)]
    header += [*(f"{USUAL} / {name}" for name in OURS), "sdpa / native"]
    header += ["asked of sdpa, of native over sdpa"]
    header += ["GB/s, in this order", "largest error, in this order"]
    explanation = (
        f"One token's attention in one layer, appending to the cache included: median "
        f"(smallest–largest) of {options.runs} rounds over {options.bytes / 2**20:.0f} MiB of caches, "
        f"in turns. {rounds.disturbed} of {len(rows) * options.runs} rounds were disturbed by other "
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
