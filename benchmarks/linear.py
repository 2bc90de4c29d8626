"""The products that `dense` chooses among, for bfloat16 weights that have to come from memory.

    python benchmarks/linear.py [--runs 5] [--output FILE.md]

`hanok.models.linear` decides by the processor and the number of tokens how it multiplies; this table
is what that decision rests on. Each product runs through `dense` itself, with the choice forced. There
are so many copies of a weight that they are twice the processor's last cache, and every call takes the
copy that was used longest ago. Contestants take turns; one turn lasts about `--turn` seconds. The chosen
product is bold, the fastest has a star.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import get_args

import measure
import torch
from torch import Tensor

from hanok.bench.spread import Spread, rounded
from hanok.kernels.native import native
from hanok.kernels.processor import has_bfloat16_instructions
from hanok.models import linear

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
SIZES = ((2048, 11264), (2048, 2048), (896, 4864))
PRODUCTS: tuple[linear.Product, ...] = get_args(linear.Product)
GOOD_ENOUGH = 1.1  # a choice is right when nothing is faster by more than this


def products(num_tokens: int) -> tuple[linear.Product, ...]:
    """Return the products that can multiply so many tokens here."""
    kernels = native()
    limits = {"vector": 1, "native": 0 if kernels is None else kernels.dense_tokens}
    return tuple(name for name in PRODUCTS if num_tokens <= limits.get(name, num_tokens))


@contextmanager
def forced(product: linear.Product) -> Iterator[None]:
    """Make `dense` use one product."""
    chosen = linear.choose_product
    linear.choose_product = lambda weight, num_tokens: product
    try:
        yield
    finally:
        linear.choose_product = chosen


def seconds_per_call(
    product: linear.Product, x: Tensor, weights: Iterator[Tensor], num_calls: int
) -> float:
    """Return the mean time of some products, each with the next weight."""
    with forced(product):
        start = time.perf_counter()
        for weight in itertools.islice(weights, num_calls):
            linear.dense(x, weight)
        return (time.perf_counter() - start) / num_calls


@torch.inference_mode()
def measure_tokens(
    x: Tensor, weights: Sequence[Tensor], *, runs: int, turn_s: float, guard: measure.Guard
) -> tuple[dict[str, list[float]], int]:
    """Return each product's seconds per call, and how many rounds were disturbed."""
    names = products(x.shape[0])
    turning = itertools.cycle(weights)
    calls = {}
    for name in names:
        first, second = (seconds_per_call(name, x, turning, 1) for _ in range(2))
        calls[name] = max(1, min(len(weights), int(turn_s / min(first, second))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    disturbed = 0
    for index in range(runs):
        order = names[index % len(names) :] + names[: index % len(names)]

        def one_round(order: Sequence[linear.Product] = order) -> dict[linear.Product, float]:
            return {name: seconds_per_call(name, x, turning, calls[name]) for name in order}

        run = guard.run(one_round)
        disturbed += run.is_disturbed
        for name, value in run.result.items():
            seconds[name].append(value)
    return seconds, disturbed


def copies_of(size: tuple[int, int], total_bytes: int) -> list[Tensor]:
    """Return equal weights (out, in) of `total_bytes` in all, at least two."""
    columns, rows = size
    first = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0.0, 0.02)
    return [first, *(first.clone() for _ in range(max(1, -(-total_bytes // first.nbytes) - 1)))]


def table_row(
    num_tokens: int, weight: Tensor, seconds: Mapping[str, Sequence[float]], chosen: str
) -> list[str]:
    """Return one line: GB/s of weights and GFLOP/s of each product, and how good the choice is."""
    medians = {name: Spread.of(values).median for name, values in seconds.items()}
    fastest = min(medians, key=lambda name: medians[name])
    cells = [str(num_tokens)]
    for name in PRODUCTS:
        if name not in seconds:
            cells.append("–")
            continue
        rates = Spread.of(weight.nbytes / value / 1e9 for value in seconds[name])
        flops = 2 * num_tokens * weight.numel() / medians[name] / 1e9
        text = f"{rates}, {rounded(flops)} GF{' ★' if name == fastest else ''}"
        cells.append(f"**{text}**" if name == chosen else text)
    cells.append(f"{medians[chosen] / medians[fastest]:.2f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the products that dense chooses among.")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--turn", type=float, default=0.2, help="seconds of one turn")
    parser.add_argument(
        "--bytes",
        type=int,
        default=max(2**28, 2 * measure.last_cache_bytes()),
        help="copies of one weight (default: %(default)s, twice the last cache)",
    )
    measure.add_common_options(parser, runs=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    log, guard = measure.log_of(options), measure.guard_of(options)
    parts, slowdowns, all_disturbed = [], [], 0
    for size in SIZES:
        weights, rows = copies_of(size, options.bytes), []
        for num_tokens in options.tokens:
            x = torch.randn(num_tokens, size[0], dtype=torch.bfloat16)
            seconds, disturbed = measure_tokens(
                x, weights, runs=options.runs, turn_s=options.turn, guard=guard
            )
            chosen = linear.choose_product(weights[0], num_tokens)
            all_disturbed += disturbed
            log({"size": size, "tokens": num_tokens, "chosen": chosen, "seconds": seconds})
            rows.append(table_row(num_tokens, weights[0], seconds, chosen))
            slowdowns.append(float(rows[-1][-1]))
        header = ("tokens", *PRODUCTS, "chosen / fastest, time")
        parts.append(
            f"## {size[0]} → {size[1]}, bfloat16, {len(weights)} copies\n\n"
            + measure.table(header, rows)
        )
    right = sum(value <= GOOD_ENOUGH for value in slowdowns)
    explanation = (
        "GB/s of weights, median (smallest–largest) of "
        f"{options.runs} turns, and GFLOP/s. Bold: what `choose_product` picks here, where "
        f"has_bfloat16_instructions() is {has_bfloat16_instructions()}; star: the fastest. In "
        f"{right} of {len(slowdowns)} lines the choice takes at most {GOOD_ENOUGH:g} times as long as "
        f"the fastest. {all_disturbed} of {len(slowdowns) * options.runs} rounds were disturbed by "
        "other programs."
    )
    top = [measure.heading("Linear products", options.threads), explanation]
    measure.publish("\n\n".join([*top, *parts]), options.output)


if __name__ == "__main__":
    main()
