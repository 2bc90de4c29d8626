"""hanok, llama.cpp and transformers with fewer instructions, on shared cores, and under a quota.

    python benchmarks/machines.py --llama-cpp avx2=FOLDER [--llama-cpp avx512=FOLDER]
        [--sets avx2 avx512] [--shapes llama-1.1b qwen-0.5b bundled] [--runs 3] [--output FILE.md]

Every engine is held to an instruction set: hanok by HANOK_ISA, torch by the variables of its libraries,
llama.cpp by how it was built (LLAMA_CPP_HELP). Conditions: nothing else on the machine; one thread; two
busy loops beside it, where a fair share of two cores is a half; a cgroup's quota of one CPU. Under the
quota hanok is not told its threads, the others have those of the machine. Every run is a cold process;
all take turns with each other and with a probe of the memory's speed (`measure.py`). An engine that is
not there, or fails, is left out, and the report says why. `--quick`: the tiny shape, next to no tokens.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import checkpoints
import generate
import gguf_files
import measure
from engine_contestants import FAILURES, first_json_array, left_out

import hanok
from hanok.bench.spread import Spread
from hanok.models.family import read_config

HERE = Path(__file__).parent
PROBE = "memory"
CGROUPS = Path("/sys/fs/cgroup")
BUSY_LOOP = [sys.executable, "-c", "while True: pass"]
LLAMA_CPP_HELP = (
    "build llama-bench and llama-quantize of llama.cpp once for each instruction set: cmake -B build "
    "-DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF, for avx2 with "
    "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
)
# What keeps torch, oneDNN and MKL to an instruction set.
TORCH_CAPS: Mapping[str, Mapping[str, str]] = {
    "portable": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avxvnni": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {},
}
PRECISIONS = {"bf16": None, "int8": "Q8_0", "int4": "Q4_0"}
QUICK = {
    "shapes": ["tiny"],
    "context": 16,
    "decode_context": 4,
    "new_tokens": 4,
    "runs": 1,
    "patience": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What goes on beside a run, and how many threads it has."""

    name: str
    threads: int | None
    """None: what the engine takes by itself, or those of the machine."""
    busy_loops: int = 0
    quota: float | None = None
    """CPUs that a cgroup allows."""
    has_prompt: bool = False
    """Whether a long prompt is measured too."""
    is_for_all: bool = True
    """Whether every precision is run so, or int8 and what transformers has alone."""


IDLE, ONE_THREAD, BUSY, QUOTA, QUOTA_ONE = (
    Condition(name="idle", threads=2, has_prompt=True),
    Condition(name="one thread", threads=1, has_prompt=True),
    Condition(name="two busy loops", threads=2, busy_loops=2),
    Condition(name="quota of one CPU", threads=None, quota=1.0, is_for_all=False),
    Condition(name="quota, one thread", threads=1, quota=1.0, is_for_all=False),
)
TRIAL = Condition(name="trial", threads=2)
CONDITIONS = (IDLE, ONE_THREAD, BUSY, QUOTA, QUOTA_ONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One engine at one precision under one instruction set."""

    engine: str
    precision: str
    set: str
    command: Callable[[int | None], list[str]]
    """Of a run with so many threads."""
    row: Callable[[list[str], Mapping[str, str], int, bool], measure.Row]
    """(command, environment, threads, with a long prompt) -> what it measured."""
    bytes_per_token: int | None = None

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.engine} {self.precision}"

    def takes(self, condition: Condition) -> bool:
        """Return whether it is run under a condition."""
        if condition == QUOTA_ONE:
            return self.name == "hanok int8"
        if self.engine == "transformers":
            return condition != ONE_THREAD
        return condition.is_for_all or self.precision in ("int8", "Q8_0")


Key = tuple[str, str, str]
"""Instruction set, contestant, condition."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare engines under conditions of other machines."
    )
    parser.add_argument("--shapes", nargs="+", default=["llama-1.1b", "qwen-0.5b", "bundled"])
    parser.add_argument("--sets", nargs="+", choices=list(TORCH_CAPS), default=["avx2", "avx512"])
    parser.add_argument(
        "--conditions", nargs="+", choices=[item.name for item in CONDITIONS], help="default: all"
    )
    parser.add_argument("--engines", nargs="+", default=["hanok", "llama.cpp", "transformers"])
    parser.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--decode-context", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="the tiny shape; no figure counts")
    parser.add_argument(
        "--llama-cpp",
        action="append",
        default=[],
        metavar="SET=FOLDER",
        help="programs that were built for an instruction set",
    )
    measure.add_common_options(parser, runs=3)
    if "--quick" in sys.argv[1:]:
        parser.set_defaults(**QUICK, foreign=float(measure.num_cores()))
    options = parser.parse_args()
    options.llama_cpp = {
        key: Path(folder) for key, _, folder in (item.partition("=") for item in options.llama_cpp)
    }
    return options


# Conditions


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes computing."""
    loops = [subprocess.Popen(BUSY_LOOP) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def quota_group(cpus: float) -> Iterator[Path]:
    """Make a cgroup that may use so many CPUs, and give the file by which a process joins it.

    Raises OSError where none can be made.
    """
    is_old = (CGROUPS / "cpu").is_dir()
    folder = (CGROUPS / "cpu" if is_old else CGROUPS) / f"hanok-machines-{os.getpid()}"
    folder.mkdir()
    period_us = 100_000
    try:
        if is_old:
            (folder / "cpu.cfs_period_us").write_text(str(period_us))
            (folder / "cpu.cfs_quota_us").write_text(str(round(cpus * period_us)))
        else:
            (folder / "cpu.max").write_text(f"{round(cpus * period_us)} {period_us}")
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def run_under(condition: Condition, contestant: Contestant) -> measure.Row:
    """Run a contestant once under a condition."""
    threads = condition.threads or measure.num_cores()
    environment = TORCH_CAPS[contestant.set] | {"HANOK_ISA": contestant.set}
    # Where hanok finds its threads itself nothing may tell it.
    finds_itself = condition.threads is None and contestant.engine == "hanok"
    command = contestant.command(None if finds_itself else threads)
    told = 0 if finds_itself else threads
    with busy(condition.busy_loops):
        if condition.quota is None:
            return contestant.row(command, environment, told, condition.has_prompt)
        with quota_group(condition.quota) as group:
            joined = ["sh", "-c", f'echo $$ > {group} && exec "$0" "$@"', *command]
            return contestant.row(joined, environment, told, condition.has_prompt)


# Contestants


def worker_row(
    command: list[str], environment: Mapping[str, str], threads: int, has_prompt: bool
) -> measure.Row:
    prefills = ["--prefills", str(int(has_prompt))]
    return measure.run_cold([*command, *prefills], threads=threads, environment=environment)


def worker_command(
    engine: str, precision: str, folder: Path, vocab_size: int, options: argparse.Namespace
) -> Callable[[int | None], list[str]]:
    words = [sys.executable, str(HERE / f"engine_{engine}.py"), str(folder)]
    words += ["--precision", precision, "--vocab", str(vocab_size)]
    words += ["--context", str(options.context), "--decode-context", str(options.decode_context)]
    words += ["--new-tokens", str(options.new_tokens), "--sequences", "0"]
    return lambda threads: [*words, *([] if threads is None else ["--threads", str(threads)])]


def llama_cpp_row(
    options: argparse.Namespace,
    command: list[str],
    environment: Mapping[str, str],
    threads: int,
    has_prompt: bool,
) -> measure.Row:
    """Run llama-bench for tokens behind a short prompt, and for a long one."""
    tokens = ["-p", "0", "-n", str(options.new_tokens), "-d", str(options.decode_context)]
    row: measure.Row = {"decode_per_s": first_json_array([*command, *tokens])["avg_ts"]}
    if has_prompt:
        prompt = ["-p", str(options.context), "-n", "0"]
        row["prefill_per_s"] = first_json_array([*command, *prompt])["avg_ts"]
    return row


def contestants_of(
    set_name: str, folder: Path, options: argparse.Namespace
) -> Iterator[Contestant]:
    """Yield who takes part under an instruction set."""
    _, config = read_config(checkpoints.config_file(folder), str(folder))
    if "hanok" in options.engines:
        for precision in PRECISIONS:
            command = worker_command("hanok", precision, folder, config.vocab_size, options)
            yield Contestant(
                engine="hanok", precision=precision, set=set_name, command=command, row=worker_row
            )
    if "llama.cpp" in options.engines and set_name in options.llama_cpp:
        programs = options.llama_cpp[set_name]
        name = folder.name
        source = gguf_files.write_gguf(folder, options.folder / f"{name}.gguf")
        for kind in PRECISIONS.values():
            file = source
            if kind is not None:
                file = gguf_files.quantized(source, kind, programs, options.threads)
            words = [str(programs / "llama-bench"), "-m", str(file), "-r", "1", "-o", "json"]
            yield Contestant(
                engine="llama.cpp",
                precision=kind or "bf16",
                set=set_name,
                command=lambda threads, words=words: [*words, "-t", str(threads)],
                row=partial(llama_cpp_row, options),
                bytes_per_token=gguf_files.bytes_per_token(file),
            )
    if "transformers" in options.engines:
        # Without instructions for bfloat16 its users compute in float32: bfloat16 takes minutes.
        precision = "bf16" if set_name == "avx512" else "fp32"
        command = worker_command("transformers", precision, folder, config.vocab_size, options)
        yield Contestant(
            engine="transformers",
            precision=precision,
            set=set_name,
            command=command,
            row=worker_row,
        )


def checkpoint_of(shape: str, folder: Path) -> Path:
    """Return the folder of a shape's checkpoint, made unless it is there, or of the bundled model."""
    if shape == "bundled":
        return hanok.BUNDLED
    return checkpoints.make_checkpoint(checkpoints.SHAPES[shape], folder)


# Measuring and telling


def measure_shape(
    shape: str, options: argparse.Namespace, log: Callable[[measure.Row], None]
) -> str:
    """Return one shape's part of the report."""
    folder = checkpoint_of(shape, options.folder)
    generate.warm_page_cache(folder)
    conditions = [item for item in CONDITIONS if item.name in (options.conditions or item.name)]
    missing = [
        f"llama.cpp is left out under {name}: {LLAMA_CPP_HELP}."
        for name in options.sets
        if "llama.cpp" in options.engines and name not in options.llama_cpp
    ]
    taking_part: list[Contestant] = []
    actions: dict[Key, Callable[[], measure.Row]] = {}
    for name in options.sets:
        for item in contestants_of(name, folder, options):
            mine = [condition for condition in conditions if item.takes(condition)]
            try:
                if item.engine != "hanok":
                    run_under(TRIAL, item)
            except FAILURES as error:
                missing.append(left_out(f"{item.name} ({name})", error))
                continue
            taking_part.append(item)
            for condition in mine:
                actions[name, item.name, condition.name] = partial(run_under, condition, item)
    probe = [sys.executable, str(HERE / "measure.py")]
    probe += ["--bytes", str(2**20)] if options.quick else []
    named = {" · ".join(key): action for key, action in actions.items()}
    named[PROBE] = partial(measure.run_cold, probe, threads=measure.num_cores())
    found = measure.interleave(
        named,
        runs=options.runs,
        guard=measure.guard_of(options),
        log=lambda row: log({"shape": shape, **row}),
    )
    rows = {key: found[" · ".join(key)] for key in actions}
    memory = Spread.of(row["gb_per_s"] for row in found[PROBE])
    log({"shape": shape, "left_out": missing})
    return "\n\n".join(
        [
            f"## {shape}",
            *missing,
            speed_table(taking_part, conditions, rows, memory.median),
            f"The probe reads memory at {memory} GB/s.",
            demands_table(options.sets, rows, taking_part, memory.median),
            f"{measure.count_disturbed(found)} of {sum(map(len, found.values()))} runs were disturbed "
            "by other programs.",
        ]
    )


Rows = Mapping[Key, Sequence[measure.Row]]


def values(rows: Rows, key: Key, what: str) -> list[float] | None:
    """Return what a contestant gave in each round; None where it was not run."""
    return [row[what] for row in rows[key] if what in row] if key in rows else None


def speed_table(
    taking_part: Sequence[Contestant],
    conditions: Sequence[Condition],
    rows: Rows,
    gb_per_s: float,
) -> str:
    """Return tokens per second of each contestant under each condition."""
    lines = []
    for item in taking_part:
        key = (item.set, item.name, IDLE.name)
        prompt = values(rows, key, "prefill_per_s")
        cells: list[object] = [Spread.of(prompt) if prompt else "–"]
        for condition in conditions:
            decode = values(rows, (item.set, item.name, condition.name), "decode_per_s")
            cells.append(Spread.of(decode) if decode else "–")
        cells.append(share_of_memory(item, rows, gb_per_s))
        lines.append((f"{item.set}: {item.name}", *cells))
    header = ("tokens/s", "prefill", *(f"decode, {item.name}" for item in conditions), "share")
    return measure.table(header, lines)


def share_of_memory(item: Contestant, rows: Rows, gb_per_s: float) -> str:
    """Return how much of the memory's speed decoding alone on the machine uses."""
    key = (item.set, item.name, IDLE.name)
    if key not in rows:
        return "–"
    size = item.bytes_per_token or rows[key][0].get("bytes_per_token")
    if not size:
        return "–"
    decode = Spread.of(row["decode_per_s"] for row in rows[key]).median
    return f"{decode * size / 1e9 / gb_per_s:.0%}"


def demands_table(
    sets: Sequence[str], rows: Rows, taking_part: Sequence[Contestant], gb_per_s: float
) -> str:
    """Return what is asked, what was measured, and whether that is enough."""
    lines: list[tuple[object, ...]] = []

    def compare(what: str, better: Key, worse: Key, field: str, asked: float) -> None:
        first, second = values(rows, better, field), values(rows, worse, field)
        if first is None or second is None:
            return
        ratio = Spread.of_ratio(first, second)
        lines.append((what, ratio, f"≥ {asked:g}", "yes" if ratio.median >= asked else "no"))

    for name in sets:
        for ours, kind in PRECISIONS.items():
            hanok_name, theirs = f"hanok {ours}", f"llama.cpp {kind or 'bf16'}"
            prompt, decode = (1.25, 1.0) if ours == "bf16" else (1.5, 1.1)
            for condition in (IDLE, ONE_THREAD):
                keys = (name, hanok_name, condition.name), (name, theirs, condition.name)
                where = f"{name}, {condition.name}"
                pair = f"{ours} / {kind or 'llama.cpp'}"
                compare(f"{where}: prefill, {pair}", *keys, "prefill_per_s", prompt)
                compare(f"{where}: decode, {pair}", *keys, "decode_per_s", decode)
            keys = (name, hanok_name, BUSY.name), (name, hanok_name, IDLE.name)
            compare(f"{name}: {ours} beside two busy loops / idle", *keys, "decode_per_s", 0.4)
            keys = (name, hanok_name, QUOTA.name), (name, hanok_name, QUOTA_ONE.name)
            compare(f"{name}: {ours}, quota / one thread", *keys, "decode_per_s", 0.9)
    for item in taking_part:
        if item.engine == "hanok" and (item.set, item.name, IDLE.name) in rows:
            share = share_of_memory(item, rows, gb_per_s)
            if share != "–":
                met = "yes" if int(share.rstrip("%")) >= 80 else "no"
                what = f"{item.set}: {item.precision}, share of the memory's speed"
                lines.append((what, share, "≥ 80%", met))
    return measure.table(("", "measured", "asked", "met"), lines)


def method(options: argparse.Namespace) -> str:
    """Say how to read the tables."""
    return (
        f"Median (smallest–largest) of {options.runs} interleaved cold processes. Prefill: "
        f"{options.context} tokens, alone on the machine; decode: {options.new_tokens} tokens behind "
        f"{options.decode_context}. Share: bytes of weights that a token reads, times tokens per "
        "second, over the probe. "
        "Ratios are of medians, their spread that of the rounds. transformers: fused attention, in "
        "float32 where the processor has no instructions for bfloat16. An instruction set below this "
        "machine's is simulated: hanok by HANOK_ISA, torch by its libraries' variables, llama.cpp by "
        "its build; caches and memory stay this machine's."
    )


def main() -> None:
    options = parse_options()
    log = measure.log_of(options)
    parts = [measure.heading("Other machines than this one", measure.num_cores()), method(options)]
    for shape in options.shapes:
        parts.append(measure_shape(shape, options, log))
        if options.output is not None:  # what there is, should a later shape fail
            options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    log({"machine": measure.machine_line(), "at": time.time()})
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
