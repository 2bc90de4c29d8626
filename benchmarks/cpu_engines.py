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
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import checkpoints
import generate
import gguf_files
import measure

from hanok.models.config import ModelConfig
from hanok.models.family import read_config

HERE = Path(__file__).parent
PROBE = "memory"
LLAMA_CPP_KINDS = {"bf16": None, "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K_M": "Q4_K_M"}
LLAMA_CPP_HELP = (
    "build llama-bench, llama-batched-bench and llama-quantize of a checkout of llama.cpp, or of "
    "vendor/llama.cpp in what `pip download --no-deps --no-binary :all: llama-cpp-python` fetches "
    "(cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF && cmake "
    "--build build), and give build/bin as --llama-cpp or as $HANOK_LLAMA_CPP"
)
OPENVINO_HELP = (
    "install torch, then openvino-genai and optimum-intel[openvino], into an environment of their own "
    "and give its python as --openvino or as $HANOK_OPENVINO"
)
# Groups of 64 are what optimum-intel's users take; 32 are nearest to the bits of hanok's int4.
INT4_EXPORT = ["--weight-format", "int4", "--ratio", "1.0", "--group-size-fallback", "adjust"]
OPENVINO_EXPORT = {
    "int8": ["--weight-format", "int8"],
    "int4": [*INT4_EXPORT, "--group-size", "64"],
    "int4-32": [*INT4_EXPORT, "--group-size", "32"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How many tokens every engine is given and generates."""

    context: int
    new_tokens: int
    batch_context: int
    batch_new_tokens: int

    def arguments(self) -> list[str]:
        """Return the options of a worker."""
        items = asdict(self).items()
        return [part for name, n in items for part in (f"--{name.replace('_', '-')}", str(n))]


TRIAL = Lengths(context=8, new_tokens=2, batch_context=4, batch_new_tokens=2)
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
class Contestant:
    """One engine at one precision: a cold run, and the bytes of weights that its tokens read each."""

    engine: str
    precision: str
    run: Callable[[Lengths], measure.Row]
    bytes_per_token: int | None = None
    """None where its rows say it."""
    note: str | None = None
    """A sentence for the report."""

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.engine} {self.precision}"


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


def python_contestant(
    engine: str,
    precision: str,
    model: Path,
    options: argparse.Namespace,
    *,
    vocab_size: int,
    python: Path | str = sys.executable,
    bytes_per_token: int | None = None,
) -> Contestant:
    """Return an engine that is a Python library; engine_NAME.py is its worker."""
    script = HERE / f"engine_{engine.lower()}.py"
    command = [str(python), str(script), str(model), "--precision", precision]
    command += ["--vocab", str(vocab_size), "--threads", str(options.threads)]

    def run(lengths: Lengths) -> measure.Row:
        return measure.run_cold([*command, *lengths.arguments()], threads=options.threads)

    return Contestant(engine=engine, precision=precision, run=run, bytes_per_token=bytes_per_token)


def llama_cpp_row(file: Path, options: argparse.Namespace, lengths: Lengths) -> measure.Row:
    """Run llama.cpp's own benchmarks, three cold processes."""
    common = ["-m", file, "-t", options.threads, "-r", 1, "-o", "json"]

    def bench(*more: object) -> measure.Row:
        found = json.loads(output_of([options.llama_cpp / "llama-bench", *common, *more]))
        row: measure.Row = found[0]
        return row

    count, context, new = 8, lengths.batch_context, lengths.batch_new_tokens
    batched = [options.llama_cpp / "llama-batched-bench", "-m", file, "-t", options.threads]
    batched += ["-npp", context, "-ntg", new, "-npl", count]
    batched += ["-c", max(2048, 2 * count * (context + new)), "--output-format", "jsonl"]
    together = first_json_line(batched)
    prefill = bench("-p", lengths.context, "-n", 0)
    return {
        "prefill_per_s": float(prefill["avg_ts"]),
        "decode_per_s": float(
            bench("-p", 0, "-n", lengths.new_tokens, "-d", lengths.context)["avg_ts"]
        ),
        "together_per_s": float(together["speed_tg"]),
        "version": f"commit {prefill['build_commit']}",
    }


def first_json_line(command: Sequence[object], attempts: int = 10) -> measure.Row:
    """Return the first JSON object that a program prints, one a line.

    llama-batched-bench prints through a queue that it does not empty before it ends (common/log.cpp):
    of a tiny model, whose end is quick, the line is often lost. It is then run again.
    """
    for _ in range(attempts):
        for line in output_of(command).splitlines():
            if line.startswith("{"):
                row: measure.Row = json.loads(line)
                return row
    raise RuntimeError(f"{' '.join(map(str, command))} printed no result in {attempts} runs")


def output_of(command: Sequence[object]) -> str:
    """Run a program to its end and return what it printed."""
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-1500:]}")
    return done.stdout


def openvino_model(folder: Path, precision: str, python: Path) -> Path:
    """Return the exported model, made by optimum-intel unless it is there."""
    path = folder.with_name(f"{folder.name}-openvino-{precision}")
    if not (path / "openvino_model.bin").is_file():
        unfinished = path.with_name(f"{path.name}.part")
        program = python.with_name("optimum-cli")
        command = [program, "export", "openvino", "-m", folder]
        command += ["--task", "text-generation-with-past", *OPENVINO_EXPORT[precision], unfinished]
        output_of(command)
        unfinished.replace(path)
    return path


def openvino_bytes_per_token(model: Path) -> int:
    """Return the bytes of an exported model's constants, less an embedding that is only looked up."""
    layers = ElementTree.parse(model / "openvino_model.xml").getroot().iter("layer")
    sizes = {
        layer.attrib["name"]: int(layer.find("data").attrib["size"])
        for layer in layers
        if layer.attrib["type"] == "Const"
    }
    has_head = any("lm_head" in name for name in sizes)
    return sum(size for name, size in sizes.items() if not (has_head and "embed_tokens" in name))


def hanok_contestants(
    shape: checkpoints.Shape, folder: Path, options: argparse.Namespace
) -> list[Contestant]:
    return [
        python_contestant("hanok", precision, folder, options, vocab_size=shape.vocab_size)
        for precision in ("bf16", "int8", "int4", "nf4")
    ]


def transformers_contestants(
    shape: checkpoints.Shape, folder: Path, options: argparse.Namespace
) -> list[Contestant]:
    return [
        python_contestant(
            "transformers",
            "bf16",
            folder,
            options,
            vocab_size=shape.vocab_size,
            bytes_per_token=config_of(shape).num_active_parameters() * 2,
        )
    ]


def llama_cpp_contestants(
    shape: checkpoints.Shape, folder: Path, options: argparse.Namespace
) -> list[Contestant]:
    if options.llama_cpp is None:
        raise RuntimeError(LLAMA_CPP_HELP)
    # Not with_suffix: names of shapes have dots.
    source = gguf_files.write_gguf(folder, folder.with_name(f"{folder.name}.gguf"))
    found = []
    for precision, kind in LLAMA_CPP_KINDS.items():
        file = source
        if kind is not None:
            file = gguf_files.quantized(source, kind, options.llama_cpp, options.threads)
        found.append(
            Contestant(
                engine="llama.cpp",
                precision=precision,
                run=partial(llama_cpp_row, file, options),
                bytes_per_token=gguf_files.bytes_per_token(file),
                note=gguf_files.kinds_sentence(precision, gguf_files.weights_by_kind(file)),
            )
        )
    return found


def openvino_contestants(
    shape: checkpoints.Shape, folder: Path, options: argparse.Namespace
) -> list[Contestant]:
    if options.openvino is None:
        raise RuntimeError(OPENVINO_HELP)
    found = []
    for precision in OPENVINO_EXPORT:
        model = openvino_model(folder, precision, options.openvino)
        found.append(
            python_contestant(
                "OpenVINO",
                precision,
                model,
                options,
                vocab_size=shape.vocab_size,
                python=options.openvino,
                bytes_per_token=openvino_bytes_per_token(model),
            )
        )
    return found


ENGINES = {
    "hanok": hanok_contestants,
    "transformers": transformers_contestants,
    "llama.cpp": llama_cpp_contestants,
    "OpenVINO": openvino_contestants,
}
FAILURES = (RuntimeError, OSError, subprocess.TimeoutExpired)


def contestants(
    shape: checkpoints.Shape, options: argparse.Namespace
) -> tuple[list[Contestant], list[str]]:
    """Return who takes part, and a sentence for each that is left out."""
    folder = checkpoints.make_checkpoint(shape, options.folder)
    generate.warm_page_cache(folder)
    found, missing = [], []
    for engine in options.only or ENGINES:
        try:
            items = ENGINES[engine](shape, folder, options)
        except FAILURES as error:
            missing.append(left_out(engine, error))
            continue
        able, unable = tried(items)
        found += able
        missing += unable
    return found, missing


def tried(items: Iterable[Contestant]) -> tuple[list[Contestant], list[str]]:
    """Run each once, unmeasured; return those that can, and a sentence for each that cannot.

    The trial also reads an engine's files and libraries into the page cache. hanok is not tried: a
    report without it is none, so its failure ends the program.
    """
    able, unable = [], []
    for item in items:
        try:
            if item.engine != "hanok":
                item.run(TRIAL)
        except FAILURES as error:
            unable.append(left_out(item.name, error))
        else:
            able.append(item)
    return able, unable


def left_out(name: str, error: Exception) -> str:
    """Say who does not take part, and why: the last line of an error is what went wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{name} is left out: {lines[-1].strip().rstrip('.')}."


def config_of(shape: checkpoints.Shape) -> ModelConfig:
    """Return what hanok reads in the shape's config."""
    return read_config(shape.config(), shape.name)[1]


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
    memory = measure.Spread.of(row["gb_per_s"] for row in rows[PROBE])
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
    probe = measure.Spread.of(row["gb_per_s"] for row in rows[PROBE]).median
    lines = []
    for item in taking_part:
        found = rows[item.name]
        size = item.bytes_per_token or found[0].get("bytes_per_token")
        rate = share = read = "–"
        if size:
            speed = measure.Spread.of(row["decode_per_s"] for row in found).median * size / 1e9
            read, rate, share = f"{size / 1e9:.2f}", f"{speed:.1f}", f"{speed / probe:.0%}"
        lines.append(
            (
                item.name,
                *(
                    measure.Spread.of(row[key] for row in found)
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
        found = measure.ratio(better, worse)
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
    share = measure.ratio(speeds, [row["gb_per_s"] for row in probe])
    lines: list[tuple[object, ...]] = [
        (
            f"{precision}: share of the memory's speed",
            share,
            f"≥ {SHARE:g}",
            "yes" if share.median >= SHARE else "no",
        )
    ]
    if precision in FOUR_TOKENS:
        four = measure.Spread.of(row["four_tokens"] for row in found)
        limit = FOUR_TOKENS[precision]
        is_met = "yes" if four.median <= limit else "no"
        lines.append((f"{precision}: a pass of 4 tokens / of 1", four, f"≤ {limit:g}", is_met))
    if precision in ("int8", "int4"):
        load = measure.Spread.of(row["load_s"] for row in found)
        is_met = "yes" if load.median <= QUANTIZE_S else "no"
        lines.append((f"{precision}: quantizing at load, s", load, f"≤ {QUANTIZE_S:g}", is_met))
        peak = measure.Spread.of(row["load_gib"] for row in found)
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
