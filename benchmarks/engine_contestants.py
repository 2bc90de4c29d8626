"""The engines that benchmarks/cpu_engines.py compares: how each is made ready and run, cold.

An engine that is not there, or fails, is left out with the reason.
"""

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
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
        return first_json_array([options.llama_cpp / "llama-bench", *common, *more])

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


def first_json_array(command: Sequence[object]) -> measure.Row:
    """Return the first object of the JSON array that a program prints."""
    row: measure.Row = json.loads(output_of(command))[0]
    return row


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
