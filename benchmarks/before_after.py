"""Two versions of hanok against each other: an earlier source tree and this one, in turn in one run.

    git worktree add ../before COMMIT       and build its kernels (hatch_build.py), as an install does
    python benchmarks/before_after.py ../before [--quick] [--runs 5] [--budget 540] [--output FILE.md]

Each tree is imported from its `src` by the same Python. Every figure comes from a new process in every
round, and only one process runs at a time: where a process finds its memory changes its speed, for as
long as it lasts, so rounds of one pair of processes would agree with each other and not with the next
pair. In a round both trees run what is measured one directly after the other; who is first alternates.
No round begins that would not end within the budget.

A ratio is after / before within a round, with the interval that holds it with 95 % (Student's t on
logarithms). A bound is kept when the whole interval is within it, missed when the whole interval is
outside it, and open otherwise: more rounds, or an idle machine, may decide.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
import measure

from hanok.bench.intervals import LEVEL, Interval, paired_ratio
from hanok.bench.spread import Spread

TREES = ("before", "after")
KINDS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
PROMPT, TOKENS, LONG_PROMPT = 16, 32, 256
FIRST = "start to first token"
# What a process runs in either tree: only what both have. Prompts differ, so that none is kept from the
# one before it; the first of each pair of questions makes what a first pass of its size makes.
WORKER = """
import json, random, sys, time
import hanok
asked, spawned = json.loads(sys.argv[1]), float(sys.argv[2])
model = hanok.load(
    asked["path"], quant=asked["quant"], weights="copied", threads=asked["threads"]
)
turn = 0
def ask(count, length, tokens):
    global turn
    turn += 1
    numbers = random.Random(turn)
    prompts = [[numbers.randrange(3, asked["vocab"]) for _ in range(length)] for _ in range(count)]
    options = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    start, first, found = time.perf_counter(), 0.0, [[] for _ in prompts]
    for event in model.stream(prompts if count > 1 else prompts[0], **options):
        found[event.sequence].append(event.token_id)
        if not first and all(found):
            first = time.perf_counter() - start
    return first, time.perf_counter() - start - first, found
ask(1, 8, 1)
row = {
    "module": hanok.__file__,
    "first_token_s": time.time() - spawned,
    "peak_bytes": model.report.peak_bytes,
    "questions": [],
    "tokens": [],
}
for count, length, tokens in asked["questions"]:
    ask(count, length, min(tokens, 4))
    first, rest, found = ask(count, length, tokens)
    row["questions"].append([first, rest])
    row["tokens"].append(found)
print(json.dumps(row))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What is asked of a ratio, or of the value after."""

    least: float = 0.0
    most: float = math.inf
    of_ratio: bool = True

    def verdict(self, low: float, high: float) -> str:
        """Say whether a value that lies from `low` to `high` keeps it."""
        if self.least <= low and high <= self.most:
            return "yes"
        return "no" if high < self.least or low > self.most else "open"

    def __str__(self) -> str:
        bound = f"≥ {self.least}" if self.most == math.inf else f"≤ {self.most}"
        return bound if self.of_ratio else f"{bound} s"


SPEED, START, MEMORY = Bound(least=0.98), Bound(most=1.03), Bound(most=1.02)
HELP = Bound(most=0.3, of_ratio=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a loaded model is asked: prefill by the first token, decoding by those after it."""

    name: str
    num_sequences: int
    prompt: int
    tokens: int

    def tokens_per_s(self, first_s: float, rest_s: float) -> float:
        """Return the rate of prefill where one token is generated, otherwise that of decoding."""
        if self.tokens == 1:
            return self.num_sequences * self.prompt / first_s
        return self.num_sequences * (self.tokens - 1) / rest_s


@dataclass(slots=True, kw_only=True)
class Figure:
    """One row of the table: what both trees gave in each round."""

    bound: Bound
    values: dict[str, list[float]] = field(default_factory=lambda: {tree: [] for tree in TREES})

    def ratio(self) -> Interval:
        """Return after / before; nothing is known of it where one of them is zero."""
        before, after = self.values["before"], self.values["after"]
        if not all((*before, *after)):
            equal = before == after
            return Interval(value=1.0, low=1.0, high=1.0) if equal else UNKNOWN
        return paired_ratio(after, before, LEVEL)

    def cells(self) -> tuple[object, ...]:
        """Return before, after, ratio, what is asked and whether it is kept."""
        before, after = (Spread.of(self.values[tree]) for tree in TREES)
        found = self.ratio()
        high = math.inf if found.high is None else found.high
        low_high = (found.low, high) if self.bound.of_ratio else (after.low, after.high)
        verdict = self.bound.verdict(*low_high)
        return before, after, interval_text(found), self.bound, verdict


UNKNOWN = Interval(value=math.nan, low=0.0, high=None)


def interval_text(found: Interval) -> str:
    """Return a ratio and what it lies between."""
    if found.high is None:
        return f"{found.value:.3f} (one round)" if found.value == found.value else "unknown"
    return f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"


class Tree:
    """One version, by its source tree."""

    def __init__(self, root: Path) -> None:
        self.source = root.resolve() / "src"
        self._root = root
        self.commit = self._git("rev-parse", "--short", "HEAD") or "no commit"
        if self._git("status", "--porcelain", "--", "src"):
            self.commit += " with changes"

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self._root), *arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    def load_and_ask(self, asked: Mapping[str, object], threads: int) -> measure.Row:
        """Return what a new process gives; RuntimeError if it imported another tree's package."""
        command = [sys.executable, "-c", WORKER, json.dumps(asked)]
        row = measure.run_cold(
            command, threads=threads, environment={"PYTHONPATH": str(self.source)}
        )
        if not Path(row["module"]).is_relative_to(self.source):
            raise RuntimeError(f"{row['module']} was imported in place of {self.source}")
        return row

    def seconds(self, *arguments: str) -> float:
        """Return how long a command line takes in a new process."""
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "hanok", *arguments],
            env={**os.environ, "PYTHONPATH": str(self.source)},
            capture_output=True,
            check=True,
        )
        return time.perf_counter() - began


def rounds(
    runs: int, budget_s: float, clock: Callable[[], float] = time.perf_counter
) -> Iterator[tuple[str, str]]:
    """Yield who goes first in each round, the first round always.

    A later one begins only if one as long as the longest so far would end within the budget.
    """
    began, longest = clock(), 0.0
    for number in range(runs):
        start = clock()
        if number and start - began + longest > budget_s:
            return
        yield TREES if number % 2 == 0 else TREES[::-1]
        longest = max(longest, clock() - start)


class Comparison:
    """The figures of all rounds, and what is to be said of them."""

    def __init__(
        self, trees: Mapping[str, Tree], guard: measure.Guard, log: Callable[[measure.Row], None]
    ) -> None:
        self.figures: dict[str, Figure] = {}
        self.are_equal: dict[str, bool] = {}
        self.num_disturbed = self.num_processes = self.num_rounds = 0
        self._trees, self._guard, self._log = trees, guard, log

    def add(self, name: str, bound: Bound, tree: str, value: float) -> None:
        """Take the value of one round."""
        self.figures.setdefault(name, Figure(bound=bound)).values[tree].append(value)

    def run_round(self, order: Sequence[str], options: argparse.Namespace, path: Path) -> None:
        """Run everything once in each tree."""
        for name, arguments, bound in command_lines(options):
            for tree in order:
                self.add(name, bound, tree, self._seconds(tree, name, arguments))
        for kind in options.kinds:
            self._run_kind(kind, order, options, path)
        self.num_rounds += 1

    def _seconds(self, tree: str, name: str, arguments: Sequence[str]) -> float:
        row = self._run(tree, name, lambda: {"seconds": self._trees[tree].seconds(*arguments)})
        return float(row["seconds"])

    def _run_kind(
        self, kind: str, order: Sequence[str], options: argparse.Namespace, path: Path
    ) -> None:
        asked_of = questions(options)
        asked = {
            "path": str(path),
            "quant": KINDS[kind],
            "threads": options.threads,
            "vocab": checkpoints.SHAPES[options.shape].vocab_size,
            "questions": [(item.num_sequences, item.prompt, item.tokens) for item in asked_of],
        }
        tokens = {}
        for tree in order:
            row = self._run(
                tree, kind, lambda tree=tree: self._trees[tree].load_and_ask(asked, options.threads)
            )
            for question, (first_s, rest_s) in zip(asked_of, row["questions"], strict=True):
                rate = question.tokens_per_s(first_s, rest_s)
                self.add(f"{kind}: {question.name}, tokens/s", SPEED, tree, rate)
            self.add(f"{kind}: {FIRST}, weights copied, s", START, tree, row["first_token_s"])
            self.add(f"{kind}: peak of loading, MB", MEMORY, tree, row["peak_bytes"] / 1e6)
            tokens[tree] = row["tokens"]
        is_equal = tokens["before"] == tokens["after"]
        self.are_equal[kind] = self.are_equal.get(kind, True) and is_equal

    def _run(self, tree: str, what: str, action: Callable[[], measure.Row]) -> measure.Row:
        run = self._guard.run(action)
        self.num_processes += 1
        self.num_disturbed += run.is_disturbed
        found = {key: value for key, value in run.result.items() if key != "tokens"}
        load = {"foreign": round(run.foreign, 3), "is_disturbed": run.is_disturbed}
        self._log({"tree": tree, "what": what, "round": self.num_rounds, **found, **load})
        return run.result

    def notes(self) -> str:
        """Return the lines above the table."""
        tokens = (
            f"{kind} {'equal' if same else 'DIFFER'}" for kind, same in self.are_equal.items()
        )
        commits = "; ".join(f"{name}: {tree.commit}" for name, tree in self._trees.items())
        return "\n".join(
            [
                f"- Trees: {commits}",
                f"- Rounds: {self.num_rounds}; tokens: {', '.join(tokens) or 'not compared'}",
                f"- Disturbed by other programs: {self.num_disturbed} of {self.num_processes} "
                "processes",
            ]
        )

    def table(self) -> str:
        """Return all figures with what is asked of them."""
        header = ("", "before", "after", f"after / before ({LEVEL:.0%})", "asked", "kept")
        return measure.table(
            header, [(name, *figure.cells()) for name, figure in self.figures.items()]
        )


def questions(options: argparse.Namespace) -> list[Question]:
    """Return what each loaded model is asked."""
    return [
        Question(
            name=f"{what} of {count} sequence{'s'[: count > 1]}",
            num_sequences=count,
            prompt=prompt // (count if what == "prefill" else 1),
            tokens=tokens,
        )
        for what, prompt, tokens in (
            ("decode", PROMPT, options.tokens),
            ("prefill", options.prompt, 1),
        )
        for count in (1, 8)
    ]


def command_lines(options: argparse.Namespace) -> list[tuple[str, tuple[str, ...], Bound]]:
    """Return the command lines whose whole time counts, with their bounds."""
    limits = ("--max-new-tokens", "1", "--threads", str(options.threads))
    generate = ("generate", str(options.starts_of), "Once upon a time", *limits)
    return [
        ("hanok --help, s", ("--help",), HELP),
        (f"hanok generate: {FIRST}, s", generate, START),
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Compare two versions of hanok.")
    made.add_argument("before", type=Path, help="the earlier tree, its kernels built")
    made.add_argument("--after", type=Path, default=measure.REPOSITORY, help="default: this tree")
    made.add_argument("--shape", choices=list(checkpoints.SHAPES), default="llama-1.1b")
    made.add_argument("--folder", type=Path, help="where checkpoints are made and kept")
    made.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    made.add_argument("--prompt", type=int, default=LONG_PROMPT, help="tokens of a prefill")
    made.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each sequence, decoded")
    made.add_argument("--starts-of", type=Path, help="what hanok generate loads (default: bundled)")
    made.add_argument("--budget", type=float, default=540.0, help="seconds of all rounds together")
    made.add_argument("--quick", action="store_true", help="a tiny shape, two rounds: does it run?")
    measure.add_common_options(made, runs=5)
    made.set_defaults(patience=10.0)
    return made


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, those of --quick filled in."""
    options = parser().parse_args(arguments)
    if options.quick:
        options.shape, options.runs, options.tokens, options.prompt = "tiny", 2, 8, 32
        options.patience = 0.0
    options.starts_of = options.starts_of or options.after / "src" / "hanok" / "bundled"
    return options


def main() -> None:
    options = options_of()
    trees = {"before": Tree(options.before), "after": Tree(options.after)}
    # One attempt: a disturbed process is counted, and repeating it would cost another round.
    guard = measure.Guard(limit=options.foreign, patience_s=options.patience, attempts=1)
    comparison = Comparison(trees, guard, measure.log_of(options))
    with tempfile.TemporaryDirectory() as folder:
        shape = checkpoints.SHAPES[options.shape]
        path = checkpoints.make_checkpoint(shape, options.folder or Path(folder))
        for tree in trees.values():  # compiles its modules and fills the page cache
            for _, arguments, _ in command_lines(options):
                tree.seconds(*arguments)
        for order in rounds(options.runs, options.budget):
            comparison.run_round(order, options, path)
    text = [
        measure.heading(f"Before and after, {options.shape}", options.threads),
        comparison.notes(),
        "",
        comparison.table(),
    ]
    measure.publish("\n".join(text), options.output)


if __name__ == "__main__":
    main()
