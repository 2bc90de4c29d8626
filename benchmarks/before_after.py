"""Two versions of hanok against each other: an earlier source tree and this one, in turn in one run.

    git worktree add ../before COMMIT       and build its kernels (hatch_build.py), as an install does
    python benchmarks/before_after.py ../before [--shape llama-1.1b] [--runs 5] [--output FILE.md]

Each tree is imported from its `src` by the same Python. For each kind of weights both are loaded in
processes of their own and answer in rounds that begin with another one each time: prompts alone, and
tokens behind them, for one sequence and for eight. Starts, the memory that loading claims and
`hanok --help` are those of cold processes, in turn as well. A ratio is after / before, of the medians,
with the smallest and largest of a round; what is asked of it is beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import measure

from hanok.bench.spread import Spread

TREES = ("before", "after")
KINDS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
PROMPT, TOKENS, LONG_PROMPT = 16, 24, 256
# What a worker runs in either tree: only what both have.
WORKER = """
import json, sys, time
import torch, hanok
path, quant, threads = json.loads(sys.argv[1])
model = hanok.load(path, quant=quant, weights="copied", threads=threads)
print(json.dumps({"peak_bytes": model.report.peak_bytes}), flush=True)
for line in sys.stdin:
    count, prompt, tokens = json.loads(line)
    prompts = [[7 + (index + row) % 900 for index in range(prompt)] for row in range(count)]
    start, first, found = time.perf_counter(), 0.0, [[] for _ in prompts]
    options = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    for event in model.stream(prompts if count > 1 else prompts[0], **options):
        found[event.sequence].append(event.token_id)
        if not first and all(found):
            first = time.perf_counter() - start
    seconds = time.perf_counter() - start
    print(json.dumps({"first": first, "rest": seconds - first, "tokens": found}), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What is asked of a ratio, or of the value after."""

    least: float = 0.0
    most: float = float("inf")
    of_ratio: bool = True

    def verdict(self, ratio: float, after: float) -> str:
        """Say whether it is kept."""
        value = ratio if self.of_ratio else after
        return "yes" if self.least <= value <= self.most else "no"

    def __str__(self) -> str:
        return f"≥ {self.least}" if self.most == float("inf") else f"≤ {self.most}"


SPEED, START, MEMORY = Bound(least=0.98), Bound(most=1.03), Bound(most=1.02)
HELP = Bound(most=0.3, of_ratio=False)


class Tree:
    """One version, by its source tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commit = self._git("rev-parse", "--short", "HEAD") or "no commit"
        if self._git("status", "--porcelain", "--", "src"):
            self.commit += " with changes"
        self.environment = {**os.environ, "PYTHONPATH": str(root / "src")}

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.root), *arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start Python with this tree's package."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, *arguments: str) -> float:
        """Return how long a cold process takes."""
        began = time.perf_counter()
        command = [sys.executable, "-m", "hanok", *arguments]
        subprocess.run(command, env=self.environment, capture_output=True, check=True)
        return time.perf_counter() - began


class Worker:
    """A loaded model of one tree."""

    def __init__(self, tree: Tree, path: Path, quant: str | None, threads: int) -> None:
        self._process = tree.start("-c", WORKER, json.dumps([str(path), quant, threads]))
        self.peak_bytes: float = self._read()["peak_bytes"]

    def ask(self, count: int, prompt: int, tokens: int) -> dict[str, object]:
        """Return how long a question took, and its tokens."""
        if self._process.stdin is None:
            raise RuntimeError("the process has no input")
        self._process.stdin.write(json.dumps([count, prompt, tokens]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def turns(runs: int) -> list[tuple[str, str]]:
    """Return who goes first in each round."""
    return [TREES if number % 2 == 0 else TREES[::-1] for number in range(runs)]


def measure_kind(
    trees: Mapping[str, Tree], path: Path, quant: str | None, options: argparse.Namespace
) -> tuple[dict[str, dict[str, list[float]]], bool]:
    """Return rates and memory of one kind of weights by tree, and whether all tokens were the same."""
    workers = {name: Worker(tree, path, quant, options.threads) for name, tree in trees.items()}
    questions = {
        "decoding": (1, PROMPT, options.tokens),
        "decoding, 8 sequences": (8, PROMPT, options.tokens),
        "prompt": (1, options.prompt, 1),
        "prompt, 8 sequences": (8, options.prompt // 8, 1),
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in TREES}
    are_equal = True
    try:
        for worker in workers.values():
            worker.ask(1, PROMPT, 3)  # moves what moves, records what is recorded
        for number, order in enumerate(turns(options.runs)):
            for what, (count, prompt, tokens) in questions.items():
                answers = {}
                for name in order:
                    if not number:
                        workers[name].ask(count, prompt, min(tokens, 4))
                    answer = answers[name] = workers[name].ask(count, prompt, tokens)
                    seconds = float(str(answer["rest" if tokens > 1 else "first"]))
                    amount = count * (tokens - 1 if tokens > 1 else prompt)
                    found[name].setdefault(what, []).append(amount / seconds)
                are_equal &= answers["before"]["tokens"] == answers["after"]["tokens"]
    finally:
        for worker in workers.values():
            worker.close()
    for name, worker in workers.items():
        found[name]["memory claimed by loading, MB"] = [worker.peak_bytes / 1e6]
    return found, are_equal


def measure_starts(
    trees: Mapping[str, Tree], path: Path, options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of cold processes by tree."""
    generate = ("generate", str(path), "--max-new-tokens", "1", "--threads", str(options.threads))
    commands = {"start to first token, s": generate, "hanok --help, s": ("--help",)}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in TREES}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompt:
        prompt.write("Once upon a time")
        prompt.flush()
        for what, command in commands.items():
            tail = ("--file", prompt.name) if command is generate else ()
            for number, order in enumerate(turns(options.runs + 1)):
                for name in order:
                    seconds = trees[name].seconds(*command, *tail)
                    if number:  # the first round fills the page cache
                        found[name].setdefault(what, []).append(seconds)
    return found


def rows_of(
    label: str, found: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[tuple[object, ...]]:
    """Return table rows: what, before, after, ratio, asked, kept."""
    rows = []
    for what, before in found["before"].items():
        after = found["after"][what]
        ratio = Spread.of_ratio(after, before)
        bound = SPEED
        if "help" in what:
            bound = HELP
        elif "start" in what:
            bound = START
        elif "memory" in what:
            bound = MEMORY
        middle = Spread.of(after)
        name = f"{label}: {what}" if label else what
        kept = bound.verdict(ratio.median, middle.median)
        rows.append((name, Spread.of(before), middle, ratio, bound, kept))
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Compare two versions of hanok.")
    made.add_argument("before", type=Path, help="the earlier tree, its kernels built")
    made.add_argument("--after", type=Path, default=measure.REPOSITORY, help="default: this tree")
    made.add_argument("--shape", choices=list(checkpoints.SHAPES), default="llama-1.1b")
    made.add_argument("--folder", type=Path, help="where checkpoints are made and kept")
    made.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    made.add_argument("--prompt", type=int, default=LONG_PROMPT, help="tokens of a long prompt")
    made.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a decoding turn")
    made.add_argument("--starts-of", type=Path, help="a checkpoint with a tokenizer for the starts")
    measure.add_common_options(made, runs=5)
    return made


def main() -> None:
    options = parser().parse_args()
    trees = {"before": Tree(options.before), "after": Tree(options.after)}
    log = measure.log_of(options)
    rows: list[tuple[object, ...]] = []
    notes = []
    starts_of = options.starts_of or options.after / "src" / "hanok" / "bundled"
    starts = measure_starts(trees, starts_of, options)
    log({"starts": starts})
    rows += rows_of("", starts)
    with tempfile.TemporaryDirectory() as folder:
        shape = checkpoints.SHAPES[options.shape]
        path = checkpoints.make_checkpoint(shape, options.folder or Path(folder))
        for kind in options.kinds:
            found, are_equal = measure_kind(trees, path, KINDS[kind], options)
            log({"kind": kind, "found": found, "tokens are equal": are_equal})
            rows += rows_of(kind, found)
            notes.append(f"{kind}: tokens {'equal' if are_equal else 'DIFFER'}")
    header = ("tokens/s where nothing else is said", "before", "after", "ratio", "asked", "kept")
    text = [
        measure.heading(f"Before and after, {options.shape}", options.threads),
        f"- Before: {trees['before'].commit}; after: {trees['after'].commit}",
        f"- {options.runs} rounds; {'; '.join(notes)}",
        "",
        measure.table(header, rows),
    ]
    measure.publish("\n".join(text), options.output)


if __name__ == "__main__":
    main()
