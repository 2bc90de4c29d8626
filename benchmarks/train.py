"""hanok's training against peft, trl and transformers' Trainer on this CPU: time, memory, plans.

    python benchmarks/train.py [--output FILE.md] [--rows NAME …] [--runs 5] [--budget 1200]
        [--chat FILE] [--tokenizer FOLDER] [--trl-python PYTHON] [--again] [--quick]

A row of the report is a question with its contestants, which take turns: each run is a cold process,
with steps that are not measured and steps that are. Every result is appended to FILE.jsonl at once, and
FILE.md is written anew from it after every row. What is there is not measured again: the program can be
ended and started again, and be given one row at a time; `--again` forgets what the named rows have. No
round of a row begins that would not end within its budget, and a process is ended after --limit seconds.

The model is the shape of Qwen2 0.5B with random weights (`checkpoints.py`), adapters have rank 8 on all
linear products, and each step is one pack of 512 tokens, unless a row says otherwise. Tokens are counted
without padding. `products` are the products of a step alone, by torch (`train_products.py`).

peft and transformers are imported by this Python. trl has many dependencies and may be in an environment
of its own, which --trl-python names:

    python -m venv trl && trl/bin/pip install torch transformers peft trl

The row `chat` reads conversations in Alpaca's format from --chat, and a tokenizer from --tokenizer (the
bundled one by default); without a chat template there, the bundled one is used. `full` trains all
weights of the bundled model on the texts of `corpus/harbour.py`.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import checkpoints
import generate
import measure
from before_after import Bound, interval_text
from corpus import harbour
from train_worker import Asked

from hanok.bench.intervals import LEVEL, paired_ratio
from hanok.bench.spread import Spread
from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.package import BUNDLED

HERE = Path(__file__).parent
SHAPE = "qwen-0.5b"
CHAT_DOCUMENTS, CHAT_PACK = 24, 1024  # trl's default length
FULL_DOCUMENTS = 640
ADDED_TOKENS = 8  # transformers adds one for padding
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json")
TOKENIZER_FILES += ("merges.txt", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
AVX2 = {  # as in the Makefile
    "HANOK_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
FAILURES = (RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError)
KEYS = {
    "tokens_per_s": "tokens/s",
    "tokens_per_cpu_s": "tokens per processor second",
    "peak_gib": "peak memory",
    "steps_peak_gib": "peak memory of the steps alone",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A program that trains, and what it is asked."""

    name: str
    program: str
    settings: Mapping[str, object] = field(default_factory=dict)
    """Fields of `train_worker.Asked`."""
    model: str = SHAPE
    """A shape, "chat" for that with a tokenizer, or "bundled"."""
    is_of_trl: bool = False
    """Whether it runs in the environment of --trl-python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of the ratio of two contestants."""

    first: str
    second: str
    bound: Bound
    key: str = "tokens_per_s"

    def __str__(self) -> str:
        return f"{KEYS[self.key]}: {self.first} / {self.second}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A question: its contestants take turns."""

    about: str
    contestants: tuple[Contestant, ...]
    demands: tuple[Demand, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    plans: bool = False
    """Whether the planned memory is compared with each contestant's."""


def ours(name: str, *, model: str = SHAPE, **settings: object) -> Contestant:
    return Contestant(
        name=f"hanok {name}", program="train_hanok.py", settings=settings, model=model
    )


def rows() -> dict[str, Row]:
    """Return every row by its name."""
    peft = Contestant(name="peft float32", program="train_peft.py")
    products = Contestant(name="products float32", program="train_products.py")
    masked = {"target_share": 0.4}
    chat = {"pack_tokens": CHAT_PACK, "steps": None}
    full = {"is_full": True, "pack_tokens": 1024, "warmup": 5, "steps": 40}
    trl = partial(Contestant, program="train_trl.py", model="chat", is_of_trl=True)
    nf4 = (ours("bfloat16", dtype="bfloat16"), ours("nf4", dtype="bfloat16", quant="nf4"))

    def demand(first: str, second: str, key: str = "tokens_per_s", **bound: float) -> Demand:
        return Demand(first=first, second=second, key=key, bound=Bound(**bound))

    def of_nf4(least: float) -> tuple[Demand, ...]:
        return (
            demand("hanok nf4", "hanok bfloat16", "peak_gib", most=0.55),
            demand("hanok nf4", "hanok bfloat16", least=least),
        )

    return {
        "all-targets": Row(
            about="Every token is a target. The share of the products is what the machine can do at "
            "best on these very shapes, forward and backward.",
            contestants=(products, peft, ours("float32")),
            demands=(
                demand("hanok float32", "peft float32", least=1.15),
                demand("hanok float32", "peft float32", "tokens_per_cpu_s", least=1.15),
                demand("hanok float32", "products float32", least=0.85),
            ),
        ),
        "masked": Row(
            about="The last 40 % of the tokens are targets.",
            contestants=(
                Contestant(name="peft float32", program="train_peft.py", settings=masked),
                ours("float32", **masked),
            ),
            demands=(demand("hanok float32", "peft float32", least=1.4),),
        ),
        "int8": Row(
            about="The base in int8, forward by integer kernels, on a processor with VNNI.",
            contestants=(peft, ours("int8", quant="int8")),
            demands=(
                demand("hanok int8", "peft float32", least=1.6),
                demand("hanok int8", "peft float32", "peak_gib", most=0.65),
            ),
        ),
        "bfloat16": Row(
            about="The base stored in bfloat16.",
            contestants=(peft, ours("bfloat16", dtype="bfloat16")),
            demands=(demand("hanok bfloat16", "peft float32", "peak_gib", most=0.65),),
        ),
        "chat": Row(
            about=f"{CHAT_DOCUMENTS} conversations, one epoch, documents of up to {CHAT_PACK} tokens; "
            "the answers are targets. hanok packs them; trl pads batches of 8, its default. Documented: "
            "mixed precision in bfloat16 and activations computed again, trl's defaults; float32: "
            "neither.",
            contestants=(
                trl(name="trl documented", settings={**chat, "dtype": "documented"}),
                trl(name="trl float32", settings=chat),
                ours("float32", model="chat", **chat),
            ),
            demands=(
                demand("hanok float32", "trl documented", least=2.2),
                demand("hanok float32", "trl float32", least=2.2),
            ),
        ),
        "nf4": Row(
            about="The base in nf4 against the base in bfloat16, both ours.",
            contestants=nf4,
            demands=of_nf4(0.8),
        ),
        "nf4-avx2": Row(
            about="The same without AVX-512.",
            contestants=nf4,
            demands=of_nf4(0.65),
            environment=AVX2,
        ),
        "full": Row(
            about="All weights of the bundled model learn, in float32, from short texts. hanok packs "
            "them; the Trainer pads batches of 8, its default.",
            contestants=(
                Contestant(
                    name="Trainer", program="train_trainer.py", settings=full, model="bundled"
                ),
                ours("full", model="bundled", **full),
            ),
            demands=(demand("hanok full", "Trainer", least=2.0),),
        ),
        "plan": Row(
            about="What `hanok plan` says a training takes, and what its process took at the most.",
            contestants=(
                ours("float32"),
                ours("bfloat16", dtype="bfloat16"),
                ours("int8", quant="int8", pack_tokens=1024),
                ours(
                    "nf4, checkpointing", dtype="bfloat16", quant="nf4", gradient_checkpointing=True
                ),
                ours("full", model="bundled", **full),
            ),
            plans=True,
        ),
    }


PLAN_BOUND = Bound(least=0.95, most=1.05)


# Models and data


class Material:
    """Checkpoints and rows of text, made when they are needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._folder: Path = options.folder

    def model(self, name: str) -> Path:
        """Return the folder of a contestant's model."""
        if name == "bundled":
            return BUNDLED
        shape = checkpoints.SHAPES[self._options.shape]
        if name == "chat":
            found = self._with_tokenizer(shape)
        else:
            found = checkpoints.make_checkpoint(shape, self._folder)
        generate.warm_page_cache(found)
        return found

    def rows(self, name: str) -> Path | None:
        """Return the file of rows that a contestant with this model learns from; None: random ids."""
        if name == "bundled":
            texts = [{"text": text} for text in harbour.texts(FULL_DOCUMENTS, seed=1)]
            return self._written("texts.jsonl", texts)
        if name != "chat":
            return None
        if self._options.chat is None:
            raise RuntimeError("no conversations: name a file in Alpaca's format by --chat")
        found = json.loads(self._options.chat.read_text(encoding="utf-8"))
        chosen = random.Random(0).sample(found, min(len(found), self._options.chat_documents))
        return self._written("chat.jsonl", [conversation(item) for item in chosen])

    def _written(self, name: str, items: Sequence[Mapping[str, object]]) -> Path:
        path = self._folder / name
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        return path

    def _with_tokenizer(self, shape: checkpoints.Shape) -> Path:
        source: Path = self._options.tokenizer
        size = open_tokenizer(source).vocab_size + ADDED_TOKENS
        if size > shape.vocab_size:  # of the tiny shape
            shape = replace(shape, name=f"{shape.name}-{size}", vocab_size=size)
        checkpoint = checkpoints.make_checkpoint(shape, self._folder)
        folder = checkpoint.with_name(f"{checkpoint.name}-{source.name}")
        folder.mkdir(exist_ok=True)
        files = [path for name in TOKENIZER_FILES if (path := source / name).is_file()]
        if not any(has_template(path) for path in files):
            files.append(BUNDLED / "chat_template.jinja")
        for path in files:
            shutil.copyfile(path, folder / path.name)
        for path in checkpoint.iterdir():
            if not (folder / path.name).exists():
                os.link(path, folder / path.name)
        return folder


def has_template(path: Path) -> bool:
    """Return whether a tokenizer's file has a chat template."""
    if path.name == "tokenizer_config.json":
        return bool(json.loads(path.read_text()).get("chat_template"))
    return path.name == "chat_template.jinja"


def conversation(row: Mapping[str, str]) -> dict[str, object]:
    """Return one of Alpaca's rows as a prompt and a completion, both lists of messages."""
    question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


# Measuring


def asked_of(item: Contestant, material: Material, options: argparse.Namespace) -> Asked:
    """Return what a contestant's process is asked."""
    of_shape = {"pack_tokens": options.pack, "steps": options.steps}
    found = {**(of_shape if item.model == SHAPE else {}), **item.settings}
    path = material.rows(item.model)
    return Asked(
        model=str(material.model(item.model)),
        threads=options.threads,
        rows=None if path is None else str(path),
        **found,  # type: ignore[arg-type]  # fields of Asked
    )


def action_of(
    item: Contestant, row: Row, material: Material, options: argparse.Namespace
) -> Callable[[], measure.Row]:
    """Return what runs a contestant in a process; RuntimeError where it cannot take part."""
    python = sys.executable
    if item.is_of_trl:
        if options.trl_python is None:
            raise RuntimeError("no trl: name a Python that has it by --trl-python")
        python = str(options.trl_python)
    asked = asked_of(item, material, options)
    command = [python, str(HERE / item.program), json.dumps(asdict(asked))]

    def run() -> measure.Row:
        return measure.run_cold(
            command, threads=options.threads, timeout_s=options.limit, environment=row.environment
        )

    return run


class Results:
    """What has been measured, in a file of JSON lines: sessions, results, failures."""

    def __init__(self, path: Path, session: measure.Row) -> None:
        self.path = path
        self._write = measure.json_lines(path)
        self._session: measure.Row | None = session

    def append(self, line: measure.Row) -> None:
        """Add a line; before the first one, what session it belongs to."""
        if self._session is not None:
            self._write(self._session)
            self._session = None
        self._write(line)

    def lines(self) -> list[measure.Row]:
        """Return all lines."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def rounds(self, name: str, row: Row) -> dict[str, list[measure.Row]]:
        """Return what each contestant of a row gave, in the rounds that all ended."""
        found: dict[int, dict[str, measure.Row]] = {}
        for line in self.lines():
            if line.get("row") == name and "round" in line:
                found.setdefault(line["round"], {})[line["name"]] = line
        names = [item.name for item in row.contestants]
        whole = [found[index] for index in sorted(found) if set(found[index]) >= set(names)]
        return {item: [line[item] for line in whole] for item in names}

    def failure(self, name: str) -> str | None:
        """Return why the last try of a row ended before its rounds did."""
        tries = [line for line in self.lines() if line.get("row") == name]
        return tries[-1].get("failed") if tries else None

    def forget(self, names: Sequence[str]) -> None:
        """Drop the results of some rows."""
        kept = [line for line in self.lines() if line.get("row") not in names]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def measure_row(
    name: str, row: Row, material: Material, results: Results, options: argparse.Namespace
) -> None:
    """Measure the rounds of a row that are not there yet; what fails is noted."""
    done = len(next(iter(results.rounds(name, row).values())))
    if done >= options.runs:
        return

    def log(line: measure.Row) -> None:
        results.append({"row": name, **line})

    try:
        actions = {item.name: action_of(item, row, material, options) for item in row.contestants}
        measure.interleave(
            actions,
            runs=options.runs,
            guard=guard_of(options),
            log=log,
            done=done,
            budget_s=options.budget,
        )
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        log({"failed": lines[-1].strip(), "said": str(error)[-2000:], "at": time.time()})


def guard_of(options: argparse.Namespace) -> measure.Guard:
    """Return a guard that notes disturbed runs: repeating one would cost minutes."""
    return measure.Guard(limit=options.foreign, patience_s=options.patience, attempts=1)


# The report


def report(results: Results, options: argparse.Namespace) -> str:
    """Return the page about all that has been measured."""
    parts = [
        measure.heading("Training on a CPU", options.threads),
        sessions(results.lines()),
        method(),
    ]
    for name, row in rows().items():
        rounds, failure = results.rounds(name, row), results.failure(name)
        found = [f"## {name}", row.about]
        if any(rounds.values()):
            found += [contestants_table(rounds), demands_table(row, rounds), notes(row, rounds)]
        elif failure is None:
            continue
        if failure is not None:
            found.append(f"Not measured to the end: {failure}")
        parts += found
    return "\n\n".join(filter(None, parts))


def sessions(lines: Sequence[measure.Row]) -> str:
    """Return where and with what the results were measured."""
    found = [line for line in lines if "session" in line]
    told = {
        f"- Measured on: {line['machine']}; {line['versions']}; {line['threads']} threads": None
        for line in found
    }
    return "\n".join(told)


def method() -> str:
    return (
        "Each run is a process of its own; those of a round follow one another, and each round begins "
        "with another one. Rates are those of all measured steps of a process together; cells are the "
        "median (smallest–largest) of the rounds, ratios those within rounds, with the interval that "
        f"holds them with {LEVEL:.0%} (Student's t on logarithms). A demand is met when the whole "
        "interval keeps it, and open when a part of it does. Peaks are resident pages, files' included: "
        "of the process, and of its steps after the model was loaded."
    )


def contestants_table(rounds: Mapping[str, Sequence[measure.Row]]) -> str:
    """Return what each contestant of a row did."""
    header = (
        *("", "tokens/s", "tokens per processor s", "peak, GiB", "of the steps, GiB"),
        *("tokens a step", "targets a step", "steps", "first loss", "last loss"),
    )
    lines = []
    for name, found in rounds.items():
        spreads = [
            Spread.of(row[key] for row in found)
            for key in ("tokens_per_s", "tokens_per_cpu_s", "peak_gib", "steps_peak_gib")
        ]
        row = found[-1]
        losses = (f"{row['first_loss']:.4f}", f"{row['last_loss']:.4f}")
        lines.append(
            (
                name,
                *spreads,
                f"{row['tokens_per_step']:.0f}",
                f"{row['targets_per_step']:.0f}",
                row["num_steps"],
                *(losses if row["first_loss"] else ("–", "–")),
            )
        )
    return measure.table(header, lines)


def demands_table(row: Row, rounds: Mapping[str, Sequence[measure.Row]]) -> str:
    """Return what is asked of a row, what was measured, and whether that is enough."""
    lines: list[tuple[object, ...]] = []
    for demand in row.demands:
        first, second = (
            [item[demand.key] for item in rounds[name]] for name in (demand.first, demand.second)
        )
        found = paired_ratio(first, second, LEVEL)
        high = math.inf if found.high is None else found.high
        verdict = demand.bound.verdict(found.low, high)
        lines.append((demand, interval_text(found), f"{demand.bound} ×", verdict))
    for name, found_rows in rounds.items() if row.plans else ():
        spread = Spread.of(item["peak_gib"] / item["planned_gib"] for item in found_rows)
        what = f"{name}: measured / planned ({found_rows[-1]['planned_gib']:.2f} GiB)"
        verdict = PLAN_BOUND.verdict(spread.low, spread.high)
        lines.append((what, spread, f"{PLAN_BOUND.least} to {PLAN_BOUND.most}", verdict))
    return measure.table(("", f"measured ({LEVEL:.0%})", "asked", "met"), lines) if lines else ""


def notes(row: Row, rounds: Mapping[str, Sequence[measure.Row]]) -> str:
    """Return what else belongs to a row's figures."""
    found = [item for items in rounds.values() for item in items]
    disturbed = sum(item["is_disturbed"] for item in found)
    told = [
        f"{len(found) // len(rounds)} rounds; {disturbed} of {len(found)} runs were disturbed by "
        "other programs."
    ]
    for name, items in rounds.items():
        last = items[-1]
        if "gflop_per_step" in last:
            rate = last["gflop_per_step"] / last["tokens_per_step"] * last["tokens_per_s"]
            told.append(f"{name}: {last['gflop_per_step']:.0f} GFLOP a step, {rate:.0f} GFLOP/s.")
    told += sorted({item[key] for item in found for key in ("version",) if key in item})
    told += sorted({f"hanok's kernels: {item['kernels']}" for item in found if "kernels" in item})
    if row.environment:
        told.append(f"Set: {' '.join(f'{key}={value}' for key, value in row.environment.items())}")
    return "\n".join(f"- {line}" for line in told)


# The program


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Compare trainings on this CPU.")
    made.add_argument("--rows", nargs="*", choices=list(rows()), help="default: all")
    made.add_argument("--again", action="store_true", help="forget what these rows have")
    made.add_argument("--budget", type=float, default=1200.0, help="seconds of each row's rounds")
    made.add_argument("--limit", type=float, default=1800.0, help="seconds of a process")
    made.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    made.add_argument("--shape", choices=list(checkpoints.SHAPES), default=SHAPE)
    made.add_argument("--pack", type=int, default=512, help="tokens of a step")
    made.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    made.add_argument("--chat", type=Path, help="conversations in Alpaca's format")
    made.add_argument("--chat-documents", type=int, default=CHAT_DOCUMENTS)
    made.add_argument(
        "--tokenizer", type=Path, default=BUNDLED, help="folder of the chat's tokenizer"
    )
    made.add_argument("--trl-python", type=Path, help="a Python that has trl")
    made.add_argument("--quick", action="store_true", help="a tiny shape, two rounds: does it run?")
    measure.add_common_options(made, runs=5)
    made.set_defaults(output=checkpoints.DEFAULT_FOLDER / "train.md")
    return made


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, those of --quick filled in."""
    made = parser()
    if made.parse_args(arguments).quick:
        cores = float(measure.num_cores())
        made.set_defaults(shape="tiny", runs=2, steps=1, pack=32, patience=0.0, foreign=cores)
    return made.parse_args(arguments)


def main() -> None:
    options = options_of()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    session = {"session": time.time(), "threads": options.threads}
    session |= {"machine": measure.machine_line(), "versions": measure.versions_line()}
    results = Results(options.output.with_suffix(".jsonl"), session)
    material = Material(options)
    chosen = rows() if options.rows is None else {name: rows()[name] for name in options.rows}
    if options.again:
        results.forget(list(chosen))
    for name, row in chosen.items():
        measure_row(name, row, material, results, options)
        options.output.write_text(report(results, options) + "\n", encoding="utf-8")
    print(report(results, options))


if __name__ == "__main__":
    main()
