"""Loading: plans against what is measured, starts, limits of memory, offload, pipelines.

    python benchmarks/loading.py [--parts predictions start …] [--runs 3] [--output FILE.md]

Every load is a cold process (`worker_loading.py`, `worker.py`). The parts:

predictions  five plans, carried out: planned against measured memory, between steps and at the peak
start        process start to model ready against transformers, warm page cache
packed       int4 quantized at load, with a packed copy kept, and read from it
cold         reading speed of a load with an empty page cache against a plain sequential read
limits       a memory cgroup: int4 under 1.5 GB; a 13 GB checkpoint under 4 GiB; transformers beside it
pipeline     layers on two cores as two devices: utilisation with one group of sequences and with four
plan         `hanok plan` of a 405B config, and whether torch was imported

An empty page cache is asked for with posix_fadvise. Cgroups need root, or a delegated subtree; without,
the part says so. The 7B-shaped checkpoint takes 13 GB of disk.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import measure
from generate import ENGINES, warm_page_cache, worker_command

from hanok.bench.spread import Spread

HERE = Path(__file__).parent
PARTS = ("predictions", "start", "packed", "cold", "limits", "pipeline", "plan")
CGROUPS = Path("/sys/fs/cgroup")
BLOCK_BYTES = 2**23  # of the plain sequential read
GIB = 2**30
ENTER = 'echo $$ > "$0" && exec "$@"'  # a shell that joins a cgroup and becomes the command

INT4_INT8 = {"quant": "int4", "cache_dtype": "int8"}
PLANS: tuple[tuple[str, str, dict[str, Any], int, int], ...] = (
    ("1.1B bf16, 1,024", "llama-1.1b", {"weights": "copied"}, 1024, 1),
    ("1.1B int8, 2,048", "llama-1.1b", {"quant": "int8"}, 2048, 1),
    ("1.1B int4, 4 x 1,024, int8 cache", "llama-1.1b", INT4_INT8, 1024, 4),
    ("0.5B float32, 1,024", "qwen-0.5b", {"dtype": "float32"}, 1024, 1),
    ("1.1B bf16 in 1,500 MiB, 512", "llama-1.1b", {"max_memory": "cpu=1500MiB"}, 512, 1),
)
LLAMA_405B = {
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
NOTE = """Medians (smallest–largest) of cold processes in turn. Memory: what the kernel cannot take back,
and resident pages of the checkpoint's own files, of the whole process. Reading speeds with a page cache
that was emptied of the files (posix_fadvise). At work: the share of the decoding time in which a core
computed. The checkpoints have random weights."""
Rows = dict[str, list[measure.Row]]
Line = tuple[str, object, str, str]
"""What was measured, the measurement, what was asked, whether it is met."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure loading.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    parser.add_argument("--large", default="llama-7b", help="the shape that exceeds its limit")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB that it gets")
    measure.add_common_options(parser, runs=3)
    return parser.parse_args()


class Bench:
    """The options of a run and what its parts share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.guard = measure.guard_of(options)
        self.log = measure.log_of(options)
        self.num_disturbed = self.num_runs = 0

    def checkpoint(self, name: str) -> Path:
        """Return the folder of a shape, made if it is not there."""
        return checkpoints.make_checkpoint(checkpoints.SHAPES[name], self.options.folder)

    def command(
        self,
        engine: str,
        name: str,
        options: Mapping[str, Any],
        *,
        context: int = 64,
        batch: int = 1,
        new_tokens: int = 0,
    ) -> list[str]:
        """Return the command of one cold load."""
        numbers = {"--context": context, "--batch": batch, "--new-tokens": new_tokens}
        sizes = [text for key, value in numbers.items() for text in (key, str(value))]
        script = [sys.executable, str(HERE / "worker_loading.py"), engine]
        return [*script, str(self.checkpoint(name)), json.dumps(options), *sizes]

    def cold(self, command: Sequence[str]) -> measure.Row:
        """Run one cold process."""
        return measure.run_cold(command, threads=self.options.threads)

    def interleave(
        self, actions: Mapping[str, Callable[[], measure.Row]], runs: int | None = None
    ) -> Rows:
        """Run all in turn; see `measure.interleave`."""
        rows = measure.interleave(
            actions, runs=runs or self.options.runs, guard=self.guard, log=self.log
        )
        self.num_disturbed += measure.count_disturbed(rows)
        self.num_runs += sum(map(len, rows.values()))
        return rows


def line(what: str, values: Spread, asked: float, *, at_most: bool, unit: str = "") -> Line:
    """Return a line of the table of what was asked."""
    is_met = values.median <= asked if at_most else values.median >= asked
    sign = "≤" if at_most else "≥"
    return what, f"{values}{unit}", f"{sign} {asked:g}{unit}", "yes" if is_met else "no"


def values_of(rows: Sequence[measure.Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows]


def predictions(bench: Bench) -> Iterator[Line]:
    """Plan, load, fill the context, and compare."""
    actions: dict[str, Callable[[], measure.Row]] = {}
    for title, name, options, context, batch in PLANS:
        given = {**options, "context": context, "batch": batch}
        command = bench.command("hanok", name, given, context=context, batch=batch, new_tokens=4)
        # Twice: at the second time no weight lies in its file any more.
        actions[title] = partial(bench.cold, [*command, "--again"])
    for title, rows in bench.interleave(actions).items():
        for what, asked in (("steady", 2.0), ("peak", 8.0)):
            off = [100 * (row[f"planned_{what}"] / row[f"{what}_bytes"] - 1) for row in rows]
            found = Spread.of(off)
            is_met = "yes" if abs(found.median) <= asked else "no"
            gib = rows[0][f"planned_{what}"] / GIB
            text = (
                f"{gib:.2f} GiB planned, {found.median:+.1f} % ({found.low:+.1f}–{found.high:+.1f})"
            )
            yield f"{title}: {what}", text, f"within {asked:g} %", is_met


def start(bench: Bench) -> Iterator[Line]:
    """Time from the process's start to the model being ready."""
    folder, shape = bench.checkpoint("llama-1.1b"), checkpoints.SHAPES["llama-1.1b"]
    quick = ["--context", "8", "--new-tokens", "1", "--repeats", "1"]
    commands = {name: worker_command(name, folder, shape.vocab_size, *quick) for name in ENGINES}
    commands["import torch"] = [sys.executable, "-c", IMPORT_TORCH]
    warm_page_cache(folder)
    for command in commands.values():
        bench.cold(command)
    rows = bench.interleave(
        {name: partial(bench.cold, command) for name, command in commands.items()}, runs=5
    )
    ready = {name: values_of(found, "ready_s") for name, found in rows.items()}
    yield line(
        "process start to model ready, 1.1B bf16, of transformers' time",
        Spread.of_ratio(ready["hanok"], ready["transformers"]),
        0.35,
        at_most=True,
    )
    for name, found in ready.items():
        yield f"— {name}", f"{Spread.of(found)} s", "–", "–"


IMPORT_TORCH = (
    "import json, sys, time, torch; "
    "print(json.dumps({'ready_s': time.time() - float(sys.argv[-1])}))"
)


def packed(bench: Bench) -> Iterator[Line]:
    """The first load quantizes, one keeps a copy, later ones read it."""
    folder = bench.checkpoint("llama-1.1b")
    warm_page_cache(folder)
    with tempfile.TemporaryDirectory(prefix="hanok-packed-", dir=bench.options.folder) as cache:
        plain = bench.command("hanok", "llama-1.1b", {"quant": "int4"})
        kept = bench.command("hanok", "llama-1.1b", {"quant": "int4", "cache_packed": cache})
        writing = bench.cold(kept)
        rows = bench.interleave(
            {"first": partial(bench.cold, plain), "again": partial(bench.cold, kept)}
        )
    first, again = (values_of(rows[name], "load_s") for name in ("first", "again"))
    yield line(
        "1.1B int4 from the packed copy, of the time of quantizing",
        Spread.of_ratio(again, first),
        0.25,
        at_most=True,
    )
    yield "— quantizing at load", f"{Spread.of(first)} s", "–", "–"
    yield "— from the packed copy", f"{Spread.of(again)} s", "–", "–"
    yield "— quantizing, hashing and keeping the copy, once", f"{writing['load_s']:.2f} s", "–", "–"


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its page cache."""
    for file in sorted(folder.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_in_turn(folder: Path) -> measure.Row:
    """Read a folder's weights from the disk as any program would; return bytes per second."""
    forget(folder)
    buffer, total, began = bytearray(BLOCK_BYTES), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return {"bytes_per_s": total / (time.perf_counter() - began)}


def cold(bench: Bench) -> Iterator[Line]:
    """Loads with an empty page cache."""
    folder = bench.checkpoint("llama-1.1b")
    command = bench.command("hanok", "llama-1.1b", {"weights": "copied"})
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    def load() -> measure.Row:
        forget(folder)
        row = bench.cold(command)
        return row | {"bytes_per_s": num_bytes / row["load_s"]}

    rows = bench.interleave({"load": load, "read": partial(read_in_turn, folder)}, runs=5)
    speeds = {name: values_of(found, "bytes_per_s") for name, found in rows.items()}
    yield line(
        "1.1B from an empty page cache, bytes per second of a plain sequential read's",
        Spread.of_ratio(speeds["load"], speeds["read"]),
        0.8,
        at_most=False,
    )
    for name, found in speeds.items():
        spread = Spread.of([value / 1e9 for value in found])
        yield f"— {name}", f"{spread} GB/s", "–", "–"


@contextmanager
def cgroup(limit_bytes: int) -> Iterator[Path]:
    """Make a memory cgroup, version 1 or 2; provide the file that a process joins it by."""
    is_old = (CGROUPS / "memory").is_dir()
    folder = (CGROUPS / "memory" if is_old else CGROUPS) / f"hanok-{os.getpid()}"
    folder.mkdir()
    try:
        limit = "memory.limit_in_bytes" if is_old else "memory.max"
        (folder / limit).write_text(str(limit_bytes))
        yield folder / ("tasks" if is_old else "cgroup.procs")
    finally:
        folder.rmdir()


def within(bench: Bench, limit_bytes: int, command: Sequence[str]) -> measure.Row:
    """Run a command in a cgroup of its own; a kill is a result too."""
    with cgroup(limit_bytes) as tasks:
        try:
            return bench.cold(["sh", "-c", ENTER, str(tasks), *command])
        except RuntimeError as error:
            return {"failed": str(error).partition("\n")[0].rpartition("ended with ")[2]}


def limits(bench: Bench) -> Iterator[Line]:
    """Loads and generation inside memory cgroups."""
    try:
        with cgroup(GIB):
            pass
    except OSError as error:
        yield "memory cgroups", f"cannot be made here: {error}", "works", "–"
        return
    small = {"context": 64, "quant": "int4"}
    command = bench.command("hanok", "llama-1.1b", small, new_tokens=16)
    forget(bench.checkpoint("llama-1.1b"))
    free, bound = bench.cold(command), within(bench, 1_500_000_000, command)
    yield described("2.2 GB loaded as int4 under 1.5 GB", bound, free)
    other = bench.command("transformers", "llama-1.1b", {}, new_tokens=4)
    found = within(bench, 1_500_000_000, other)
    yield described("— transformers, 2.2 GB in bf16 under 1.5 GB", found)
    name, limit = bench.options.large, int(bench.options.limit * GIB)
    folder = bench.checkpoint(name)
    command = bench.command("hanok", name, {"context": 64}, new_tokens=4)
    free = bench.cold(command)
    forget(folder)
    bound = within(bench, limit, command)
    title = f"under {limit / GIB:g} GiB"
    yield described(f"{name}, what does not fit read from disk, {title}", bound, free)
    with tempfile.TemporaryDirectory(dir=bench.options.folder) as offload:
        offloading = {"max_memory": {"cpu": limit // 2}, "offload_folder": offload}
        for what, options in (("as it comes", {}), ("offloading to disk", offloading)):
            forget(folder)
            other = bench.command("transformers", name, options, new_tokens=4)
            yield described(f"— transformers, {what}, {title}", within(bench, limit, other))
    if "failed" in bound:
        return
    rows = bench.interleave(
        {
            "offload": lambda: forget(folder) or within(bench, limit, command),
            "read": partial(read_in_turn, folder),
        },
        runs=min(3, bench.options.runs),
    )
    streamed = [row["streamed_bytes"] * row["decoded"] / row["decode_s"] for row in rows["offload"]]
    read = values_of(rows["read"], "bytes_per_s")
    yield line(
        "offloaded decode, bytes of weights per second of a plain sequential read's",
        Spread.of_ratio(streamed, read),
        0.7,
        at_most=False,
    )
    yield "— offload", f"{Spread.of([value / 1e9 for value in streamed])} GB/s", "–", "–"
    yield "— read", f"{Spread.of([value / 1e9 for value in read])} GB/s", "–", "–"


def described(what: str, row: measure.Row, unlimited: measure.Row | None = None) -> Line:
    """Return the line of a load under a limit."""
    if "failed" in row:
        return what, f"failed: {row['failed']}", "works", "no" if unlimited else "–"
    text = f"peak {row['peak_bytes'] / GIB:.2f} GiB"
    if row.get("decode_s"):
        text += f", {row['decoded'] / row['decode_s']:.2f} tokens/s"
    if unlimited is None:
        return what, text, "–", "–"
    is_same = row["tokens"] == unlimited["tokens"]
    text += ", same tokens" if is_same else ", OTHER TOKENS"
    return what, text, "works, same tokens", "yes" if is_same else "no"


def pipeline(bench: Bench) -> Iterator[Line]:
    """Two cores as two devices."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        yield "two logical devices", "this machine has one core", "≥ 0.75 each", "–"
        return
    limits = {f"core:{core}": "8GiB" for core in cores}
    given = {
        "device_map": "auto",
        "max_memory": limits,
        "context": 288,
        "batch": 4,
        "weights": "copied",
    }
    commands = {
        depth: bench.command(
            "hanok",
            "llama-1.1b",
            {**given, "pipeline_depth": depth},
            context=288,
            batch=4,
            new_tokens=33,
        )
        for depth in (1, 2, 4)
    }
    rows = bench.interleave(
        {str(depth): partial(bench.cold, command) for depth, command in commands.items()}
    )
    for depth, found in rows.items():
        formula = int(depth) / (int(depth) + len(cores) - 1)
        for index, core in enumerate(cores):
            busy = Spread.of([row["busy"][index] for row in found])
            what = (
                f"core {core} at work, 4 sequences in groups: {depth} (m/(m+p−1) = {formula:.2f})"
            )
            if depth == "4":
                yield line(what, busy, 0.75, at_most=False)
            else:
                yield what, busy, "≤ 0.5" if depth == "1" else "–", "–"
    for what, key in (("prompts, tokens/s", "prefill_s"), ("decoding, tokens/s", "decode_s")):
        speed = {name: [1 / row[key] for row in found] for name, found in rows.items()}
        for depth in ("2", "4"):
            found_ratio = Spread.of_ratio(speed[depth], speed["1"])
            yield f"— {what}, in groups: {depth} / 1", found_ratio, "–", "–"
    same = {json.dumps(row["tokens"]) for found in rows.values() for row in found}
    yield "— tokens of all", "the same" if len(same) == 1 else "DIFFER", "the same", "–"


def plan(bench: Bench) -> Iterator[Line]:
    """The verb itself, with nothing cached."""
    code = (
        "import sys, time; from hanok.cli.main import main\n"
        "try: main(sys.argv[1:-1])\n"
        "except SystemExit: pass\n"
        "import json; print(json.dumps({'torch': 'torch' in sys.modules, "
        "'seconds': time.time() - float(sys.argv[-1])}))"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_405B))
        rates = ["--cache-folder", folder]
        command = [
            sys.executable,
            "-c",
            code,
            "plan",
            folder,
            *["--device", "name=h100"] * 8,
            *rates,
        ]
        bench.cold(command)
        rows = bench.interleave({"plan": partial(bench.cold, command)}, runs=5)["plan"]
    yield line(
        "`hanok plan` of a 405B config, rates known",
        Spread.of(values_of(rows, "seconds")),
        1.0,
        at_most=True,
        unit=" s",
    )
    has_torch = any(row["torch"] for row in rows)
    yield (
        "— torch",
        "imported" if has_torch else "not imported",
        "not imported",
        ("no" if has_torch else "yes"),
    )


def main() -> None:
    options = parse_options()
    bench = Bench(options)
    parts: dict[str, Callable[[Bench], Iterator[Line]]] = {
        "predictions": predictions,
        "start": start,
        "packed": packed,
        "cold": cold,
        "limits": limits,
        "pipeline": pipeline,
        "plan": plan,
    }
    text = [measure.heading("Loading", options.threads), NOTE]
    for name in options.parts:
        lines = list(parts[name](bench))
        text += [f"## {name}", measure.table(("", "measured", "asked", "met"), lines)]
        print("\n\n".join(text[-2:]), flush=True, file=sys.stderr)
    text.append(f"{bench.num_disturbed} of {bench.num_runs} runs were disturbed by other programs.")
    measure.publish("\n\n".join(text), options.output)


if __name__ == "__main__":
    main()
