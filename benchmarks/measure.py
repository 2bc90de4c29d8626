"""What the benchmarks share: undisturbed runs, interleaving, statistics, and the words around a table.

    python benchmarks/measure.py        prints the machine and the speed of its memory

A number is worth what the machine did beside it. A run therefore starts when the CPU is idle; while
it lasts, the CPU seconds of all other processes (/proc/stat less our own, time stolen from a virtual
machine included) are counted, and a run that lost more than a tenth of a core is repeated. Contestants
take turns, each round begins with another one, and a table shows medians with the smallest and the
largest value. Memory speed is the rate at which torch adds up a tensor much larger than any cache.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from hanok.bench.foreign import ForeignLoad
from hanok.memory.places import cpu_name

REPOSITORY = Path(__file__).parents[1]
DISTRIBUTIONS = ("torch", "transformers", "hanok")
Result = TypeVar("Result")
Row = dict[str, Any]


# Undisturbed runs


@dataclass(frozen=True, slots=True)
class Run(Generic[Result]):
    """What a run gave, and the share of one core that others took meanwhile."""

    result: Result
    foreign: float
    is_disturbed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Waits for an idle CPU before a run, and repeats a run that others disturbed."""

    limit: float = 0.1
    """Share of one core that others may take."""
    patience_s: float = 120.0
    """How long to wait for an idle CPU before running all the same."""
    attempts: int = 3
    sample_s: float = 0.5

    def wait_until_idle(self) -> None:
        """Return when others use less than `limit`, or after `patience_s`."""
        end = time.monotonic() + self.patience_s
        while time.monotonic() < end:
            load = ForeignLoad()
            time.sleep(self.sample_s)
            if (load.cores() or 0.0) <= self.limit:
                return

    def run(self, action: Callable[[], Result]) -> Run[Result]:
        """Return the first undisturbed run, or the least disturbed one of all attempts."""
        best: Run[Result] | None = None
        for _ in range(self.attempts):
            self.wait_until_idle()
            load = ForeignLoad()
            result = action()
            foreign = load.cores() or 0.0
            if best is None or foreign < best.foreign:
                best = Run(result, foreign, foreign > self.limit)
            if not best.is_disturbed:
                break
        assert best is not None
        return best


def run_cold(
    command: Sequence[str],
    *,
    threads: int,
    timeout_s: float = 1800.0,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Row:
    """Run a command in a process of its own and return its last line of output, a JSON object.

    `threads`: 0 lets it find its threads itself. The wall clock at its start is added as the last
    argument, so that it can tell how long it took to get somewhere, the interpreter's start included.
    """
    told = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    variables = {
        **os.environ,
        **environment,
        **told,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [*command, repr(time.time())],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=variables,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(
            f"{shlex.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    row: Row = json.loads(lines[-1])
    return row


def interleave(
    actions: Mapping[str, Callable[[], Row]],
    *,
    runs: int,
    guard: Guard,
    log: Callable[[Row], None] = lambda row: None,
    done: int = 0,
    budget_s: float = math.inf,
) -> dict[str, list[Row]]:
    """Run all actions `runs` times in turn and return what each gave; a round begins one further on.

    Each row gets "foreign" and "is_disturbed"; rows of one index belong to one round. The first `done`
    rounds were run before. A round but the first of these begins only if one as long as the longest so
    far would end within the budget.
    """
    names = list(actions)
    rows: dict[str, list[Row]] = {name: [] for name in names}
    end, longest = time.monotonic() + budget_s, 0.0
    for index in range(done, runs):
        began = time.monotonic()
        if index > done and began + longest > end:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            run = guard.run(actions[name])
            row = run.result | {"foreign": round(run.foreign, 3), "is_disturbed": run.is_disturbed}
            rows[name].append(row)
            log({"name": name, "round": index, "at": time.time(), **row})
        longest = max(longest, time.monotonic() - began)
    return rows


def count_disturbed(rows: Mapping[str, Sequence[Row]]) -> int:
    """Return how many of the kept runs were disturbed."""
    return sum(row["is_disturbed"] for found in rows.values() for row in found)


def json_lines(path: Path | None) -> Callable[[Row], None]:
    """Return what appends a row to a file of JSON lines; without a path, what does nothing."""

    def append(row: Row) -> None:
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return append


# Statistics and tables


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    if any(len(row) != len(header) for row in cells):
        raise ValueError("every row of a table needs a cell for each column")
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " | ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    rule = " | ".join(
        "-" * (width - 1) + ":" if index else "-" * width for index, width in enumerate(widths)
    )
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


# The machine and the versions


def machine_line() -> str:
    """Return processor, cores, what it can do with bfloat16, caches, memory and kernel."""
    info = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
        if ":" in line
    )
    flags = info.get("flags", info.get("Features", "")).split()
    can = [f"{flag} {'yes' if flag in flags else 'no'}" for flag in ("avx512_bf16", "amx_bf16")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cpu_name()}, {num_cores()} cores, {', '.join(can)}, L3 {last_cache_bytes() / 2**20:.0f} MiB, "
        f"{memory:.0f} GiB of memory, Linux {platform.release()}"
    )


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def last_cache_bytes() -> int:
    """Return the size of the largest cache of the first core; 32 MiB where Linux does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [text.read_text().strip() for text in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in found), default=32 * 2**20)


def versions_line() -> str:
    """Return the versions of Python, torch, transformers and hanok, its commit included."""
    parts = [f"Python {platform.python_version()}"]
    for name in DISTRIBUTIONS:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{name} not installed")
    commit = git("rev-parse", "--short", "HEAD")
    changed = " with changes" if git("status", "--porcelain", "--", "src") else ""
    return ", ".join(parts) + (f" at {commit}{changed}" if commit else "")


def git(*arguments: str) -> str:
    """Return what git says about this repository, nothing where there is none."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def heading(title: str, threads: int) -> str:
    """Return the top of a report: what was run, when, where and with what."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return "\n".join(
        [
            f"# {title}",
            "",
            f"- Date: {datetime.now().astimezone().date().isoformat()}",
            f"- Command: `{command}`",
            f"- Machine: {machine_line()}",
            f"- Versions: {versions_line()}",
            f"- Threads: {threads}",
        ]
    )


def publish(text: str, output: Path | None) -> None:
    """Print a report, and write it to a file when there is one."""
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


# Options that all programs have


def add_common_options(parser: argparse.ArgumentParser, *, runs: int) -> None:
    """Add what every benchmark takes: runs, threads, the guard's limits, where results go."""
    parser.add_argument("--runs", type=int, default=runs, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=num_cores(), help="default: all cores")
    parser.add_argument("--output", type=Path, help="Markdown file; a .jsonl goes beside it")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds to wait for an idle CPU"
    )
    parser.add_argument(
        "--foreign", type=float, default=0.1, help="share of a core that other processes may use"
    )


def guard_of(options: argparse.Namespace) -> Guard:
    """Return the guard that the options ask for."""
    return Guard(limit=options.foreign, patience_s=options.patience)


def log_of(options: argparse.Namespace) -> Callable[[Row], None]:
    """Return the log beside the report; it is begun anew."""
    path = options.output.with_suffix(".jsonl") if options.output else None
    if path is not None:
        path.unlink(missing_ok=True)
    return json_lines(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the machine and its memory's speed.")
    parser.add_argument("--bytes", type=int, help="size of the tensor that is added up")
    parser.add_argument("spawned", nargs="?", help="ignored: when the process was started")
    options = parser.parse_args()
    print(machine_line())
    print(versions_line())
    import torch

    from hanok.bench.bandwidth import read_probe

    probe = read_probe(torch.device("cpu"), options.bytes or max(2**30, 4 * last_cache_bytes()))
    print(json.dumps({"gb_per_s": probe.best_per_s() / 1e9}))


if __name__ == "__main__":
    main()
