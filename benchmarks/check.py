"""`hanok check` of a checkpoint against plain reading of the same files.

    python benchmarks/check.py [--quick] [--shape llama-1.1b] [--runs 9] [--output FILE.md]

Plain reading is one thread's `readinto` of each file, in order, into one buffer of 4 MiB. Both run in
one process, in turn: with the files in the page cache, and after the kernel was asked to drop them
(posix_fadvise; what a virtual disk keeps elsewhere it keeps). The whole command, interpreter and
imports included, is timed in a process of its own. Memory is what the process holds itself beyond what
it held before.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import measure
from tokens import Watch, make_subject

from hanok.bench.spread import Spread
from hanok.check.folder import check_folder
from hanok.check.options import CheckOptions

BUFFER_BYTES = 4 * 2**20
READ, CHECK, HEADERS = "plain reading", "check", "check --no-values"
COMMAND = "the command, whole process"


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def read_plainly(folder: Path) -> None:
    """Read every file once."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for file in files_of(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the files' pages."""
    os.sync()
    for file in files_of(folder):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(folder: Path, *, values: bool, threads: int) -> None:
    """Check a folder that must be sound."""
    report = check_folder(folder, CheckOptions(values=values, threads=threads))
    if report.count("error") or report.count("warning"):
        raise RuntimeError(f"{folder} is not sound: {report.findings}")


def timed(action: Callable[[], object], prepare: Callable[[], object]) -> Callable[[], measure.Row]:
    """Return what runs an action once and gives its seconds and its memory beyond what was there."""

    def run() -> measure.Row:
        prepare()
        watch = Watch()
        before = watch.stop()
        watch = Watch()
        began = time.perf_counter()
        action()
        seconds = time.perf_counter() - began
        return {"s": seconds, "grown_bytes": max(0, watch.stop() - before)}

    return run


def actions_of(folder: Path, threads: int) -> dict[str, Callable[[], measure.Row]]:
    """Return the contestants by name: each with cached pages and without."""
    command = [sys.executable, "-m", "hanok", "check", str(folder), "--threads", str(threads)]
    plain: dict[str, Callable[[], object]] = {
        READ: lambda: read_plainly(folder),
        CHECK: lambda: check(folder, values=True, threads=threads),
        HEADERS: lambda: check(folder, values=False, threads=threads),
        COMMAND: lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL),
    }
    cached = {
        f"{name}, cached": timed(action, lambda: read_plainly(folder))
        for name, action in plain.items()
    }
    cold = {
        f"{name}, from disk": timed(action, lambda: drop_pages(folder))
        for name, action in plain.items()
        if name in (READ, CHECK)
    }
    return cached | cold


def table(rows: dict[str, list[measure.Row]], num_bytes: int) -> str:
    """Return seconds, bytes per second, and the ratio to plain reading in the same state."""
    lines: list[tuple[object, ...]] = []
    for name, found in rows.items():
        seconds = [row["s"] for row in found]
        reading = [row["s"] for row in rows[f"{READ}, {name.rpartition(', ')[2]}"]]
        lines.append(
            (
                name,
                Spread.of(seconds),
                Spread.of([num_bytes / 1e9 / item for item in seconds]),
                Spread.of_ratio(seconds, reading),
                Spread.of([row["grown_bytes"] / 1e6 for row in found]),
            )
        )
    return measure.table(("", "s", "GB/s", "/ plain reading", "memory, MB"), lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--shape", choices=list(checkpoints.SHAPES), default="llama-1.1b")
    made.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    made.add_argument("--quick", action="store_true", help="a tiny shape, two runs: does it run?")
    measure.add_common_options(made, runs=9)
    return made


def main() -> None:
    options = parser().parse_args()
    if options.quick:
        options.shape, options.runs, options.patience = "tiny", 2, 0.0
    folder = make_subject(checkpoints.SHAPES[options.shape], options.folder)
    num_bytes = sum(file.stat().st_size for file in files_of(folder))
    check(folder, values=True, threads=options.threads)
    rows = measure.interleave(
        actions_of(folder, options.threads),
        runs=options.runs,
        guard=measure.guard_of(options),
        log=measure.log_of(options),
    )
    text = [
        measure.heading(
            f"hanok check, {options.shape}: {num_bytes / 1e6:,.0f} MB", options.threads
        ),
        f"- Disturbed by other programs: {measure.count_disturbed(rows)} of "
        f"{len(rows) * options.runs}",
        "",
        table(rows, num_bytes),
    ]
    measure.publish("\n".join(text), options.output)


if __name__ == "__main__":
    main()
