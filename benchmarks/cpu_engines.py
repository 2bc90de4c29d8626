"""hanok, transformers, llama.cpp and OpenVINO GenAI on a CPU, at equal bits, in one run.

    python benchmarks/cpu_engines.py [--shapes llama-1.1b qwen-0.5b] [--runs 3] [--output FILE.md]
        [--llama-cpp FOLDER] [--openvino PYTHON]

Every run is a cold process with a warm page cache; engines take turns with each other and with a probe
of the memory's speed (`measure.py`). All are given the same random weights and token ids: prefill of
512 tokens, 128 tokens decoded behind them, and 8 sequences decoding together behind 64 tokens each.
A row's share is the bytes of weights that a token reads, times tokens per second, over the probe.
Ratios are of medians, their spread that of the rounds. Every engine but hanok runs once unmeasured
first: one that is not there, or fails, is left out, and the report says why. `--quick` shows in a
minute whether everything is there: the tiny shape and next to no tokens.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import checkpoints
import measure
from engine_contestants import ENGINES, Contestant, Lengths, config_of, contestants

from hanok.bench.spread import Spread

HERE = Path(__file__).parent
PROBE = "memory"
QUICK = {
    "shapes": ["tiny"],
    "context": 16,
    "new_tokens": 4,
    "batch_context": 4,
    "batch_new_tokens": 2,
    "probe_bytes": 2**20,
    "runs": 1,
    "patience": 0.0,
    "foreign": float(measure.num_cores()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A ratio of two contestants that is asked for."""

    what: str
    key: str
    better: str
    worse: str
    asked: float
    worse_key: str | None = None


EQUAL_BITS = (("bf16", "bf16"), ("int8", "Q8_0"), ("int4", "Q4_0"), ("int4", "Q4_K_M"))
DEMANDS = (
    *(
        Demand(
            what=f"decode {ours} / llama.cpp {theirs}",
            key="decode_per_s",
            better=f"hanok {ours}",
            worse=f"llama.cpp {theirs}",
            asked=asked,
        )
        for (ours, theirs), asked in zip(EQUAL_BITS, (1.0, 1.2, 1.1, 1.1), strict=True)
    ),
    *(
        Demand(
            what=f"prefill {ours} / llama.cpp {theirs}",
            key="prefill_per_s",
            better=f"hanok {ours}",
            worse=f"llama.cpp {theirs}",
            asked=asked,
        )
        for (ours, theirs), asked in zip(EQUAL_BITS, (1.25, 2.5, 2.0, 2.0), strict=True)
    ),
    *(
        Demand(
            what=f"{what} {bits} / OpenVINO {theirs}",
            key=f"{what}_per_s",
            better=f"hanok {bits}",
            worse=f"OpenVINO {theirs}",
            asked=asked,
        )
        for bits, theirs in (("int8", "int8"), ("int4", "int4"), ("int4", "int4-32"))
        for what, asked in (("decode", 1.5), ("prefill", 1.0))
    ),
    Demand(
        what="decode int4 / our bf16",
        key="decode_per_s",
        better="hanok int4",
        worse="hanok bf16",
        asked=2.5,
    ),
    Demand(
        what="decode int8 / our bf16",
        key="decode_per_s",
        better="hanok int8",
        worse="hanok bf16",
        asked=1.7,
    ),
    Demand(
        what="decode bf16 / transformers",
        key="decode_per_s",
        better="hanok bf16",
        worse="transformers bf16",
        asked=2.5,
    ),
    Demand(
        what="8 sequences int8 / one",
        key="together_per_s",
        better="hanok int8",
        worse="hanok int8",
        worse_key="decode_per_s",
        asked=3.5,
    ),
    Demand(
        what="8 sequences int8 / llama.cpp Q8_0",
        key="together_per_s",
        better="hanok int8",
        worse="llama.cpp Q8_0",
        asked=1.7,
    ),
)
# Most of what a pass of 4 tokens may take of a pass of 1.
FOUR_TOKENS = {"int8": 1.2, "int4": 1.5, "bf16": 1.4}
QUANTIZE_S = 2.0
EXTRA_GIB = 0.6e9 / 2**30  # beside the quantized weights and the largest tensor in bfloat16
SHARE = 0.8


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare engines on this CPU at equal bits.")
    parser.add_argument("--shapes", nargs="+", default=["llama-1.1b", "qwen-0.5b"])
    parser.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    parser.add_argument(
        "--only", nargs="+", choices=list(ENGINES), help="engines to run (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the tiny shape and few tokens; no figure counts"
    )
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-context", type=int, default=64)
    parser.add_argument("--batch-new-tokens", type=int, default=32)
    parser.add_argument("--probe-bytes", type=int, help="size of the memory probe")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=_path_of("HANOK_LLAMA_CPP"),
        help="folder of its programs (default: $HANOK_LLAMA_CPP)",
    )
    parser.add_argument(
        "--openvino",
        type=Path,
        default=_path_of("HANOK_OPENVINO"),
        help="python that has openvino_genai (default: $HANOK_OPENVINO)",
    )
    measure.add_common_options(parser, runs=3)
    if "--quick" in sys.argv[1:]:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    unknown = set(options.shapes) - set(checkpoints.SHAPES)
    if unknown:
        parser.error(f"unknown shapes: {', '.join(sorted(unknown))}")
    return options


def _path_of(variable: str) -> Path | None:
    return Path(os.environ[variable]) if os.environ.get(variable) else None


def lengths_of(options: argparse.Namespace) -> Lengths:
    """Return how much the options ask for."""
    return Lengths(
        context=options.context,
        new_tokens=options.new_tokens,
        batch_context=options.batch_context,
        batch_new_tokens=options.batch_new_tokens,
    )


def measure_shape(
    shape: checkpoints.Shape, options: argparse.Namespace, log: Callable[[measure.Row], None]
) -> str:
    """Return one shape's part of the report."""
    taking_part, missing = contestants(shape, options)
    size = ["--bytes", str(options.probe_bytes)] if options.probe_bytes else []
    probe = [sys.executable, str(HERE / "measure.py"), *size]
    actions = {item.name: partial(item.run, lengths_of(options)) for item in taking_part}
    actions[PROBE] = partial(measure.run_cold, probe, threads=options.threads)
    rows = measure.interleave(
        actions,
        runs=options.runs,
        guard=measure.guard_of(options),
        log=lambda row: log({"shape": shape.name, **row}),
    )
    disturbed = measure.count_disturbed(rows)
    memory = Spread.of(row["gb_per_s"] for row in rows[PROBE])
    log({"shape": shape.name, "left_out": missing})
    return "\n\n".join(
        [
            f"## {shape.name}",
            *missing,
            engines_table(taking_part, rows),
            f"The probe reads memory at {memory} GB/s. {cache_sentence(shape, options)}",
            *versions(taking_part, rows),
            *(item.note for item in taking_part if item.note),
            demands_table(taking_part, rows),
            f"{disturbed} of {sum(map(len, rows.values()))} runs were disturbed by other programs.",
        ]
    )


Rows = Mapping[str, Sequence[measure.Row]]


def cache_sentence(shape: checkpoints.Shape, options: argparse.Namespace) -> str:
    """Say what a token reads beside weights."""
    middle = options.context + options.new_tokens // 2
    size = config_of(shape).kv_cache_bytes(middle, "bfloat16")
    return (
        f"Halfway through the decode a token also reads {size / 1e6:.1f} MB of keys and "
        "values in 16 bits (OpenVINO keeps them in 8), which no share counts."
    )


def versions(taking_part: Sequence[Contestant], rows: Rows) -> list[str]:
    """Return one sentence about the engines that have an environment of their own."""
    found = {
        item.engine: rows[item.name][0]["version"]
        for item in taking_part
        if "version" in rows[item.name][0]
    }
    names = ", ".join(f"{engine} {version}" for engine, version in found.items())
    return [f"Engines of their own environment: {names}."] if found else []


def engines_table(taking_part: Sequence[Contestant], rows: Rows) -> str:
    """Return what each engine did."""
    probe = Spread.of(row["gb_per_s"] for row in rows[PROBE]).median
    lines = []
    for item in taking_part:
        found = rows[item.name]
        size = item.bytes_per_token or found[0].get("bytes_per_token")
        rate = share = read = "–"
        if size:
            speed = Spread.of(row["decode_per_s"] for row in found).median * size / 1e9
            read, rate, share = f"{size / 1e9:.2f}", f"{speed:.1f}", f"{speed / probe:.0%}"
        lines.append(
            (
                item.name,
                *(
                    Spread.of(row[key] for row in found)
                    for key in ("prefill_per_s", "decode_per_s", "together_per_s")
                ),
                read,
                rate,
                share,
            )
        )
    header = ("tokens/s", "prefill", "decode", "8 sequences", "GB a token", "GB/s", "share")
    return measure.table(header, lines)


def demands_table(taking_part: Sequence[Contestant], rows: Rows) -> str:
    """Return what was asked, what was measured, and whether that is enough."""
    lines: list[tuple[object, ...]] = []
    for demand in DEMANDS:
        if demand.better not in rows or demand.worse not in rows:
            lines.append((demand.what, "not measured", f"≥ {demand.asked:g}", "–"))
            continue
        better = [row[demand.key] for row in rows[demand.better]]
        worse = [row[demand.worse_key or demand.key] for row in rows[demand.worse]]
        found = Spread.of_ratio(better, worse)
        is_met = found.median >= demand.asked
        lines.append((demand.what, found, f"≥ {demand.asked:g}", "yes" if is_met else "no"))
    for item in taking_part:
        if item.engine == "hanok":
            lines += own_demands(item.precision, rows[item.name], rows[PROBE])
    return measure.table(("", "measured", "asked", "met"), lines)


def own_demands(
    precision: str, found: Sequence[measure.Row], probe: Sequence[measure.Row]
) -> list[tuple[object, ...]]:
    """Return the lines of what is asked of one precision alone."""
    speeds = [row["decode_per_s"] * row["bytes_per_token"] / 1e9 for row in found]
    share = Spread.of_ratio(speeds, [row["gb_per_s"] for row in probe])
    lines: list[tuple[object, ...]] = [
        (
            f"{precision}: share of the memory's speed",
            share,
            f"≥ {SHARE:g}",
            "yes" if share.median >= SHARE else "no",
        )
    ]
    if precision in FOUR_TOKENS:
        four = Spread.of(row["four_tokens"] for row in found)
        limit = FOUR_TOKENS[precision]
        is_met = "yes" if four.median <= limit else "no"
        lines.append((f"{precision}: a pass of 4 tokens / of 1", four, f"≤ {limit:g}", is_met))
    if precision in ("int8", "int4"):
        load = Spread.of(row["load_s"] for row in found)
        is_met = "yes" if load.median <= QUANTIZE_S else "no"
        lines.append((f"{precision}: quantizing at load, s", load, f"≤ {QUANTIZE_S:g}", is_met))
        peak = Spread.of(row["load_gib"] for row in found)
        limit_gib = found[0]["weights_gib"] + found[0]["largest_tensor_gib"] + EXTRA_GIB
        is_met = "yes" if peak.median <= limit_gib else "no"
        what = f"{precision}: peak memory of loading, GiB"
        lines.append((what, peak, f"≤ {limit_gib:.2f}", is_met))
    return lines


def method(options: argparse.Namespace) -> str:
    """Say how to read the tables."""
    return (
        f"Median (smallest–largest) of {options.runs} interleaved cold processes. Prefill: "
        f"{options.context} tokens; decode: {options.new_tokens} tokens behind them; 8 sequences: "
        f"{options.batch_new_tokens} tokens each behind {options.batch_context}, tokens per second in "
        "all. GB a token: the weights that one token reads. Ratios are of medians, their spread that "
        "of the rounds. llama.cpp: llama-bench and llama-batched-bench with their defaults; "
        "OpenVINO: LLMPipeline with its defaults, weights exported by optimum-intel (int8 per channel, "
        "int4 in groups of 64, int4-32 of 32); transformers: bfloat16, fused attention, "
        "`torch.inference_mode`. Peak memory of loading: above what the process had before, and at most "
        "the quantized weights, the largest tensor in bfloat16 and 0.6 GB."
    )


def main() -> None:
    options = parse_options()
    log = measure.log_of(options)
    parts = [measure.heading("Engines on a CPU at equal bits", options.threads), method(options)]
    for name in options.shapes:
        parts.append(measure_shape(checkpoints.SHAPES[name], options, log))
    log({"machine": measure.machine_line(), "at": time.time()})
    measure.publish("\n\n".join(parts), options.output)


if __name__ == "__main__":
    main()
