"""All that is to be known on a GPU, in one run of less than ten minutes.

    python benchmarks/gpu.py [--budget 540] [--output FILE.md]
    python benchmarks/gpu.py --dry          the same program on a CPU; its figures mean nothing

Five parts, each with a share of the time; what one leaves is for those behind it. What does not fit is
left out, and the report says so. It is written anew after every part, and every single result goes at
once into a file of JSON lines beside it.

1. Every Triton kernel against its reference, on the shapes of Llama 3.1 8B and on odd ones.
2. Contestants: models of that shape with random weights, made on the GPU. Steps recorded as CUDA graphs
   must give the logits of plain ones.
3. Decoding, in rounds in which all take turns, copies within the device among them: bfloat16, int8 and
   int4 with and without CUDA graphs, and transformers; each token to the CPU and back included.
4. Calls of 256 tokens without a cache, in rounds likewise.
5. Steps of LoRA and QLoRA, ours and peft's, in rounds likewise (`gpu_training.py`); the models of the
   other parts are gone by then.

Each row of the first part and each contestant is a process of its own: none breaks another. Bytes read
are those of all weights but the embedding, once for each step; keys and values are not counted.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gpu_interpreter
import gpu_report
import gpu_training
import measure
import torch
from gpu_checks import DRY, REAL, rows, send_row
from gpu_contestants import (
    COPY,
    GPU_SHAPES,
    LLAMA_8B,
    PLAIN,
    SMALLEST,
    TRANSFORMERS,
    Sizes,
    Turn,
    serve,
)
from gpu_parts import (
    Clock,
    Contender,
    Log,
    Start,
    check_kernels,
    make_contestants,
    take_rounds,
)
from gpu_report import Report
from gpu_workers import Worker

SHARES = {"kernels": 0.3, "contestants": 0.25, "decoding": 0.2, "calls": 0.05, "training": 0.2}
DRY_DEFAULTS = {
    "shape": SMALLEST.name,
    "batches": [1, 2],
    "prompt": 3,
    "tokens": 2,
    "call_tokens": 20,
    "copy_bytes": 2**16,
    "train_tokens": 12,
    "product_side": 16,
    "runs": 2,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Check and measure hanok on one GPU.")
    made.add_argument("--budget", type=float, default=540.0, help="seconds (default: %(default)s)")
    made.add_argument("--output", type=Path, help="Markdown file; a .jsonl goes beside it")
    made.add_argument(
        "--note", default="", help="for the report: the commit, where git is not there"
    )
    made.add_argument("--dry", action="store_true", help="small shapes on a CPU, interpreted")
    made.add_argument("--runs", type=int, default=5, help="rounds (default: %(default)s)")
    made.add_argument("--shape", choices=list(GPU_SHAPES), default=LLAMA_8B.name)
    made.add_argument("--quants", nargs="*", default=["int8", "int4"])
    made.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    made.add_argument("--prompt", type=int, default=128, help="tokens before decoding")
    made.add_argument("--tokens", type=int, default=64, help="tokens of one turn")
    made.add_argument("--call-tokens", type=int, default=256, help="tokens of a call")
    made.add_argument("--copy-bytes", type=int, default=2**31, help="size of the copies")
    made.add_argument("--train-tokens", type=int, default=2048, help="tokens of a training step")
    made.add_argument("--product-side", type=int, default=8192, help="rows of the large matrices")
    made.add_argument(
        "--processes", type=int, default=min(12, measure.num_cores()), help="kernels at a time"
    )
    made.add_argument("--without-transformers", action="store_true")
    return made


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; a dry run has other defaults."""
    made = parser()
    if made.parse_args(arguments).dry:
        made.set_defaults(**DRY_DEFAULTS)
    return made.parse_args(arguments)


def turns_of(options: argparse.Namespace) -> dict[str, list[Turn]]:
    """Return the turns of each contestant, those that are likeliest to break a process last."""
    turns = {COPY: [gpu_report.COPY_TURN]}
    for name in (PLAIN, *options.quants, *([] if options.without_transformers else [TRANSFORMERS])):
        turns[name] = [
            *(Turn(contestant=name, kind="decode", batch=batch) for batch in options.batches),
            Turn(contestant=name, kind="call"),
        ]
        if name != TRANSFORMERS:
            turns[name] += [
                Turn(contestant=name, kind="decode", batch=batch, graphs=True)
                for batch in options.batches
            ]
    return turns


def check(options: argparse.Namespace, report: Report, clock: Clock, log: Log) -> list[str]:
    """Do the first part and return what failed."""
    device = "cpu" if options.dry else "cuda"

    def start(row: str) -> Worker:
        return Worker(send_row, row, device, options.dry, is_dry=options.dry)

    grid = DRY if options.dry else REAL
    checked = check_kernels(rows(grid), start, clock, log, options.processes)
    failed = gpu_report.kernel_failures(checked)
    report.add(
        "Kernels against their references",
        clock,
        f"{grid.text} Errors are shares of what is expected and its row's root mean square together.",
        gpu_report.kernel_table(checked),
        gpu_report.bullets([*failed, *gpu_report.kernels_left_out(checked)]),
    )
    return failed


def starting(target: Callable[..., None], options: argparse.Namespace) -> Start:
    """Return what starts the process of a contestant."""
    sizes = Sizes(
        shape=options.shape,
        prompt=options.prompt,
        tokens=options.tokens,
        call_tokens=options.call_tokens,
        copy_bytes=options.copy_bytes,
        train_tokens=options.train_tokens,
        product_side=options.product_side,
    )
    device = "cpu" if options.dry else "cuda"
    return lambda name: Worker(target, name, sizes, device, is_dry=options.dry)


def make(
    options: argparse.Namespace,
    turns: Mapping[str, Sequence[Turn]],
    report: Report,
    clock: Clock,
) -> list[Contender]:
    """Do the second part."""
    contenders = make_contestants(turns, starting(serve, options), clock)
    report.add(
        "Contestants",
        clock,
        f"{options.shape} with random weights. Recorded steps are compared with plain ones.",
        gpu_report.contestant_table(contenders),
        gpu_report.bullets(gpu_report.notes(contenders)),
    )
    return contenders


def measure_rounds(
    options: argparse.Namespace,
    turns: Mapping[str, Sequence[Turn]],
    contenders: Sequence[Contender],
    report: Report,
    clock: Clock,
    log: Log,
) -> None:
    """Do the third and the fourth part, and compare with what was asked for."""
    sizes = {item.name: item.bytes_per_step for item in contenders}
    listed = [turn for items in turns.values() for turn in items]
    decoding = [turn for turn in listed if turn.kind != "call"]
    calling = [turn for turn in listed if turn.kind == "call"]
    about = (
        f"Tokens/s are medians (smallest–largest) of rounds of {options.tokens} tokens behind "
        f"{options.prompt}, ratios those of the medians (smallest–largest within a round)."
    )
    part = clock.part("decoding", SHARES)
    decoded = take_rounds(contenders, decoding, options.runs, part, log)
    report.add(
        "Decoding",
        part,
        about,
        gpu_report.copy_line(decoded),
        gpu_report.decode_table(decoding, decoded, sizes),
        gpu_report.bullets(gpu_report.rounds_left_out(decoding, decoded, options.runs)),
    )
    part = clock.part("calls", SHARES)
    called = take_rounds(contenders, calling, options.runs, part, log)
    report.add(
        f"Calls of {options.call_tokens} tokens",
        part,
        gpu_report.call_table(calling, called),
        gpu_report.bullets(gpu_report.rounds_left_out(calling, called, options.runs)),
    )
    asked = gpu_report.asked_table(decoded, called, min(options.batches), sizes)
    report.add("What was asked for", None, asked, gpu_report.bullets(gpu_report.notes(contenders)))


def measure_training(
    options: argparse.Namespace, report: Report, clock: Clock, log: Log
) -> list[str]:
    """Do the fifth part and return what failed."""
    turns = gpu_training.turns_of()
    learners = make_contestants(turns, starting(gpu_training.serve, options), clock)
    listed = [turn for items in turns.values() for turn in items]
    try:
        rounds = take_rounds(learners, listed, options.runs, clock, log)
    finally:
        for item in learners:
            item.worker.end()
    absent = filter(None, map(gpu_training.why_not, (*gpu_training.OURS, *gpu_training.THEIRS)))
    report.add(
        "Training",
        clock,
        f"{options.shape} with random weights, {options.train_tokens} tokens a step, adapters of rank "
        f"{gpu_training.RANK} on all linear products, activations computed again.",
        gpu_training.products_line(turns, rounds),
        gpu_training.training_table(turns, rounds, GPU_SHAPES[options.shape]),
        gpu_report.bullets(
            [
                *absent,
                *gpu_report.notes(learners),
                *gpu_report.rounds_left_out(listed, rounds, options.runs),
            ]
        ),
    )
    return gpu_report.contestant_failures(learners)


def run(options: argparse.Namespace) -> list[str]:
    """Do all parts and return what failed."""
    clock, log = Clock(options.budget), measure.log_of(options)
    report = Report(options.output, note=options.note, is_dry=options.dry)
    failed = check(options, report, clock.part("kernels", SHARES), log)
    turns = turns_of(options)
    contenders = make(options, turns, report, clock.part("contestants", SHARES))
    try:
        measure_rounds(options, turns, contenders, report, clock, log)
    finally:
        for item in contenders:
            item.worker.end()
    failed += measure_training(options, report, clock.part("training", SHARES), log)
    return failed + gpu_report.contestant_failures(contenders)


def main() -> None:
    options = options_of(sys.argv[1:])
    if options.dry:
        gpu_interpreter.choose_interpreter()
    elif not torch.cuda.is_available():
        raise SystemExit(
            "no GPU: torch finds no CUDA device. This program measures one; --dry tries it without."
        )
    failed = run(options)
    if failed:
        raise SystemExit(f"something FAILED, see the report: {len(failed)} lines")


if __name__ == "__main__":
    main()
