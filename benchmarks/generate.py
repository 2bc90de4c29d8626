"""Generation by hanok and by transformers: the same random weights, bfloat16, one prompt, on a CPU.

    python benchmarks/generate.py [--shapes llama-1.1b qwen-0.5b] [--runs 5] [--output FILE.md]

Every run is a cold process with a warm page cache (`worker.py` says what it measures), and the two
engines take turns with a probe of the memory's speed (`measure.py` says how others' load is kept
out). Reported are, as medians with smallest and largest value: decode and prefill in tokens per
second, seconds from the start of the process to the first token, peak memory, the ratio of the
medians with its spread over the rounds, and whether that is what `--asked` demands. A ratio above 1
is in favour of hanok everywhere.

Speed is worth nothing for other texts: both engines have to generate the same tokens in float32 from
a tiny checkpoint, else the exit status is 1. In bfloat16 rounding differs and with it, sooner or
later, a token; how many of the first ones agree is reported.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

import checkpoints
import measure

from hanok.bench.spread import Spread, rounded
from hanok.models.config import ModelConfig
from hanok.models.family import read_config

HERE = Path(__file__).parent
ENGINES = {"hanok": "worker_hanok.py", "transformers": "worker_transformers.py"}
PROBE = "memory"
COMPARED_TOKENS = 64

# What a run is asked for, as ratios of medians (the first token within 0.4 of transformers' time is a
# ratio of 2.5); `--asked prefill=1.5` changes it.
ASKED: Mapping[str, float] = {"decode": 2.0, "prefill": 1.0, "first": 2.5, "peak": 1.0}

# Name in `--asked`, what it is, key of the worker's row, whether more of it is better.
MEASURES = (
    ("decode", "decode, tokens/s", "decode_per_s", True),
    ("prefill", "prefill, tokens/s", "prefill_per_s", True),
    ("ready", "process start to model ready, s", "ready_s", False),
    ("first", "process start to first token, s", "first_token_s", False),
    ("first-peak", "peak memory at the first token, GiB", "first_peak_gib", False),
    ("peak", "peak memory, GiB", "peak_gib", False),
    ("private", "of it private at the end, GiB", "private_gib", False),
)
Rows = Mapping[str, Sequence[measure.Row]]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare generation with transformers.")
    parser.add_argument("--shapes", nargs="+", default=["llama-1.1b", "qwen-0.5b"])
    parser.add_argument(
        "--folder", type=Path, default=checkpoints.DEFAULT_FOLDER, help="where checkpoints are"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens decoded")
    parser.add_argument("--probe-bytes", type=int, help="size of the memory probe")
    parser.add_argument(
        "--asked",
        nargs="*",
        type=demand,
        default=[],
        metavar="NAME=RATIO",
        help=f"NAME of {', '.join(name for name, *_ in MEASURES)}; default {dict(ASKED)}",
    )
    measure.add_common_options(parser, runs=5)
    options = parser.parse_args()
    unknown = set(options.shapes) - set(checkpoints.SHAPES)
    if unknown:
        parser.error(f"unknown shapes: {', '.join(sorted(unknown))}")
    return options


def demand(text: str) -> tuple[str, float]:
    """Read NAME=RATIO."""
    name, _, value = text.partition("=")
    if name not in [item[0] for item in MEASURES]:
        raise argparse.ArgumentTypeError(f"{name!r} is not measured")
    return name, float(value)


def worker_command(engine: str, folder: Path, vocab_size: int, *more: str) -> list[str]:
    """Return the command of one cold process, without the time of its start."""
    script = str(HERE / ENGINES[engine])
    return [sys.executable, script, str(folder), "--vocab", str(vocab_size), *more]


def measure_shape(
    shape: checkpoints.Shape, options: argparse.Namespace, log: Callable[[measure.Row], None]
) -> dict[str, list[measure.Row]]:
    """Return the rows of both engines and of the memory probe."""
    folder = checkpoints.make_checkpoint(shape, options.folder)
    warm_page_cache(folder)
    lengths = ["--context", str(options.context), "--new-tokens", str(options.new_tokens)]
    cold = partial(measure.run_cold, threads=options.threads)
    size = ["--bytes", str(options.probe_bytes)] if options.probe_bytes else []
    commands = {
        engine: worker_command(engine, folder, shape.vocab_size, *lengths) for engine in ENGINES
    }
    commands[PROBE] = [sys.executable, str(HERE / "measure.py"), *size]
    for engine in ENGINES:  # once unmeasured: libraries into the page cache, bytecode onto the disk
        quick = ["--context", "8", "--new-tokens", "1", "--repeats", "1"]
        cold(worker_command(engine, folder, shape.vocab_size, *quick))
    rows = measure.interleave(
        {name: partial(cold, command) for name, command in commands.items()},
        runs=options.runs,
        guard=measure.guard_of(options),
        log=lambda row: log({"shape": shape.name, **row}),
    )
    wrong = {row["threads"] for engine in ENGINES for row in rows[engine]} - {options.threads}
    if wrong:
        raise RuntimeError(f"an engine ran with {wrong} threads instead of {options.threads}")
    return rows


def warm_page_cache(folder: Path) -> None:
    """Read the checkpoint once, so that no engine pays for the disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass


def float32_tokens(options: argparse.Namespace) -> dict[str, list[int]]:
    """Return what each engine generates in float32 from the tiny checkpoint."""
    shape = checkpoints.SHAPES["tiny"]
    folder = checkpoints.make_checkpoint(shape, options.folder)
    more = ["--dtype", "float32", "--repeats", "1", "--new-tokens", str(COMPARED_TOKENS - 1)]
    return {
        engine: measure.run_cold(
            worker_command(engine, folder, shape.vocab_size, *more), threads=options.threads
        )["tokens"]
        for engine in ENGINES
    }


def common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common, of the COMPARED_TOKENS first."""
    pairs = list(zip(first, second, strict=True))[:COMPARED_TOKENS]
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def comparison_table(rows: Rows, asked: Mapping[str, float]) -> str:
    """Return the table of one shape."""
    lines = []
    for name, label, key, is_more_better in MEASURES:
        ours, theirs = ([row[key] for row in rows[engine]] for engine in ENGINES)
        ratio = Spread.of_ratio(ours, theirs) if is_more_better else Spread.of_ratio(theirs, ours)
        demanded = asked.get(name)
        is_met = "–" if demanded is None else "yes" if ratio.median >= demanded else "no"
        lines.append(
            (
                label,
                Spread.of(ours),
                Spread.of(theirs),
                ratio,
                "–" if demanded is None else f"≥ {demanded:g}",
                is_met,
            )
        )
    return measure.table(("", *ENGINES, "ratio", "asked", "met"), lines)


def decode_bandwidth(rows: Rows, config: ModelConfig) -> str:
    """Say how much of the memory's speed each engine's decode uses."""
    bytes_per_token = config.num_active_parameters() * 2
    memory = Spread.of(row["gb_per_s"] for row in rows[PROBE])
    shares = []
    for engine in ENGINES:
        used = (
            statistics.median(row["decode_per_s"] for row in rows[engine]) * bytes_per_token / 1e9
        )
        shares.append(f"{engine} {rounded(used)} GB/s, {used / memory.median:.0%}")
    return (
        f"A token reads {rounded(bytes_per_token / 1e9)} GB of weights; the probe reads "
        f"memory at {memory} GB/s. Weights read in decode, and as a share of the probe: "
        f"{'; '.join(shares)}."
    )


def bfloat16_agreement(rows: Rows) -> str:
    """Say how many of the first greedy tokens the engines have in common."""
    first, second = (rows[engine][0]["tokens"] for engine in ENGINES)
    compared = min(len(first), COMPARED_TOKENS)
    equal = sum(a == b for a, b in zip(first[:compared], second[:compared], strict=True))
    return (
        f"bfloat16, of the first {compared} greedy tokens: the first "
        f"{common_tokens(first, second)} are the same, {equal} in all."
    )


def section(shape: checkpoints.Shape, rows: Rows, asked: Mapping[str, float]) -> str:
    """Return one shape's part of the report."""
    config = read_config(shape.config(), shape.name)[1]
    engines = {engine: rows[engine] for engine in ENGINES}
    disturbed = measure.count_disturbed(engines)
    return "\n\n".join(
        [
            f"## {shape.name}: {config.num_parameters() / 1e6:.0f} M parameters, bfloat16",
            comparison_table(rows, asked),
            decode_bandwidth(rows, config),
            bfloat16_agreement(rows),
            f"{disturbed} of {sum(map(len, engines.values()))} runs were disturbed by other programs.",
        ]
    )


def float32_agreement(tokens: Mapping[str, Sequence[int]]) -> tuple[str, bool]:
    """Return a sentence, and whether the engines' float32 tokens are the same."""
    first, second = tokens.values()
    common = common_tokens(first, second)
    if list(first) == list(second):
        return f"float32, tiny checkpoint: all {common} greedy tokens are the same.", True
    return f"float32, tiny checkpoint: token {common} DIFFERS between the engines.", False


def method(options: argparse.Namespace) -> str:
    """Say how to read the tables."""
    return (
        f"Median (smallest–largest) of {options.runs} interleaved cold processes each. Decode: "
        f"{options.new_tokens} tokens after a prompt of {options.context}; prefill: that prompt; first "
        "token: after a prompt of 8, interpreter and imports included, page cache warm. Ratios above 1 "
        "favour hanok; the ratio is that of the medians, its spread that of the rounds. transformers: "
        "sdpa attention, default cache, `torch.inference_mode`, a loop of forward passes, which is "
        "less work than `model.generate`."
    )


def main() -> int:
    options = parse_options()
    log = measure.log_of(options)
    sentence, is_same = float32_agreement(float32_tokens(options))
    parts = [measure.heading("Generation", options.threads), method(options), sentence]
    asked = {**ASKED, **dict(options.asked)}
    for name in options.shapes:
        shape = checkpoints.SHAPES[name]
        parts.append(section(shape, measure_shape(shape, options, log), asked))
    log({"shapes": options.shapes, "float32": sentence, "machine": measure.machine_line()})
    measure.publish("\n\n".join(parts), options.output)
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
