"""Whether a task is learnt as transformers + peft learn it: the held-out losses of both, along the way.

    python benchmarks/learning.py [MODEL …] [--output FILE.md] [--kinds lora full] [--epochs 4] [--quick]

Models (the bundled one, and those that are named) learn a style: the reports of `corpus/harbour.py`,
written for this. Both sides have the same documents in the same order, the same steps, and the same
options: AdamW, a warm-up and a cosine, clipping, float32. An adapter begins as hanok's, which peft
reads from its files; there is no dropout. hanok learns from packs (`learning_hanok.py`); the other side
is a plain loop of torch over padded rows (`learning_peft.py`). The loss of a step is the sum over its
targets, divided by their number; the held-out loss is that of documents that nobody learns from.

Every result is appended to FILE.jsonl at once, beside it the curves as FILE-NAME.svg; what is there is
not computed again without --again. Nothing here is a matter of speed: other programs may run.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import checkpoints
import measure
from corpus import harbour

from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.package import BUNDLED
from hanok.training.data.pack import pack_epoch

HERE = Path(__file__).parent
ASKED = 0.01  # share by which the last held-out losses may differ
LEARNT = 0.75  # share of its first held-out loss that something that learns goes below
POINTS = 10
KINDS = {"lora": 3e-3, "full": 1e-3}  # with their learning rates
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
SIDES = {"hanok": "learning_hanok.py", "transformers + peft": "learning_peft.py"}
COLOURS = {"hanok": "#c0392b", "transformers + peft": "#2c6fbb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What one model learns in one way with one seed."""

    model: Path
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Its name in the report, and in the files' names."""
        return f"{model_name(self.model)}-{self.kind}-{self.seed}"


def model_name(folder: Path) -> str:
    """Return a folder's name, or that above it where it only says whose layout it has."""
    return folder.parent.name if folder.name == "hf" else folder.name


def lesson_file(lesson: Lesson, options: argparse.Namespace) -> dict[str, object]:
    """Return what both sides are told: documents as token ids, packs of all epochs, options."""
    tokenizer = open_tokenizer(lesson.model)
    ids = [
        [*tokenizer.encode(text), *filter(None, [tokenizer.eos_token_id])]
        for text in harbour.texts(options.documents + options.held_out)
    ]
    documents, held_out = ids[: options.documents], ids[options.documents :]
    lengths = [len(item) for item in documents]
    if max(lengths) > options.pack:
        raise ValueError(
            f"a document has {max(lengths)} tokens, a pack {options.pack}: give --pack"
        )
    epochs = [
        pack_epoch(lengths, options.pack, range(len(documents)), lesson.seed, epoch)
        for epoch in range(options.epochs)
    ]
    num_steps = sum(math.ceil(len(packs) / options.packs_per_step) for packs in epochs)
    return {
        "model": str(lesson.model),
        "threads": options.threads,
        "is_full": lesson.kind == "full",
        "lora": LORA,
        "documents": documents,
        "held_out": held_out,
        "epochs": epochs,
        "options": {
            "max_steps": num_steps,
            "packs_per_step": options.packs_per_step,
            "pack_tokens": options.pack,
            "learning_rate": KINDS[lesson.kind],
            "schedule": "cosine",
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "max_grad_norm": 1.0,
            "eval_steps": max(1, num_steps // POINTS),
            "seed": lesson.seed,
        },
    }


def learn(lesson: Lesson, options: argparse.Namespace) -> measure.Row:
    """Return what both sides' losses were; RuntimeError where one does not run."""
    told = lesson_file(lesson, options)
    with tempfile.TemporaryDirectory() as scratch:
        file, start = Path(scratch) / "lesson.json", Path(scratch) / "start"
        file.write_text(json.dumps(told))
        found = {
            side: measure.run_cold(
                [sys.executable, str(HERE / program), str(file), str(start)],
                threads=options.threads,
                timeout_s=options.limit,
            )
            for side, program in SIDES.items()  # hanok writes how the adapter begins
        }
    documents: Sequence[Sequence[int]] = told["documents"]  # type: ignore[assignment]
    return {
        "lesson": lesson.name,
        "options": told["options"],
        "num_tokens": sum(map(len, documents)),
        "num_documents": len(documents),
        "num_held_out": options.held_out,
        "num_epochs": options.epochs,
        "sides": found,
    }


# The report


def report(lines: Sequence[measure.Row], options: argparse.Namespace) -> str:
    """Return the page, and write its curves beside it."""
    parts = [
        measure.heading("Learning a style", options.threads),
        "Held-out losses are means of -log p over all tokens but the first of documents that nobody "
        "learns from, in nats. Met: the last ones of both sides differ by at most "
        f"{ASKED:.0%}, and both are below {LEARNT} of the first.",
        summary_table(lines),
    ]
    for line in lines:
        if "sides" not in line:
            parts.append(f"## {line['lesson']}\n\nNot computed: {line['failed']}")
            continue
        picture = options.output.with_name(f"{options.output.stem}-{line['lesson']}.svg")
        picture.write_text(
            svg(held_out_of(line), f"{line['lesson']}: held-out loss"), encoding="utf-8"
        )
        parts.append(lesson_section(line, picture.name))
    return "\n\n".join(parts)


def held_out_of(line: measure.Row) -> dict[str, list[tuple[int, float]]]:
    """Return each side's held-out losses as (step, loss)."""
    return {
        side: [(int(step), float(loss)) for step, loss in found["held_out"]]
        for side, found in line["sides"].items()
    }


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return by which share of the second the first is larger."""
    return [a / b - 1 for a, b in zip(first, second, strict=True)]


def summary_table(lines: Sequence[measure.Row]) -> str:
    """Return one line for each lesson."""
    found = []
    for line in lines:
        if "sides" not in line:
            found.append((line["lesson"], "–", "–", "–", "–", f"≤ {ASKED:.0%}", "not computed"))
            continue
        ours, theirs = held_out_of(line).values()
        (difference,) = differences([ours[-1][1]], [theirs[-1][1]])
        steps = differences(*(side["losses"] for side in line["sides"].values()))
        is_met = abs(difference) <= ASKED and all(
            item[-1][1] < LEARNT * item[0][1] for item in (ours, theirs)
        )
        found.append(
            (
                line["lesson"],
                f"{theirs[0][1]:.4f}",
                *(f"{item[-1][1]:.4f}" for item in (ours, theirs)),
                f"{difference:+.1e} (steps: at most {max(map(abs, steps)):.1e})",
                f"≤ {ASKED:.0%}",
                "yes" if is_met else "no",
            )
        )
    header = ("", "held-out before", "after, hanok", "after, peft", "difference", "asked", "met")
    return measure.table(header, found)


def lesson_section(line: measure.Row, picture: str) -> str:
    """Return the part about one lesson."""
    ours, theirs = held_out_of(line).values()
    sides = list(line["sides"].values())
    losses = [side["losses"] for side in sides]
    shown = [
        (
            step,
            f"{loss:.5f}",
            f"{other:.5f}",
            f"{differences([loss], [other])[0]:+.1e}",
            *((f"{item[step - 1]:.5f}" for item in losses) if step else ("–", "–")),
        )
        for (step, loss), (_, other) in zip(ours, theirs, strict=True)
    ]
    header = (
        "step",
        "held-out, hanok",
        "held-out, peft",
        "difference",
        "step's, hanok",
        "step's, peft",
    )
    asked = ", ".join(f"{key} {value}" for key, value in line["options"].items())
    each = "\n".join(
        " ".join(f"{item:+.1e}" for item in part)
        for part in in_tens(differences(losses[0], losses[1]))
    )
    rates = max(map(abs, (a - b for a, b in zip(*(side["rates"] for side in sides), strict=True))))
    return "\n\n".join(
        [
            f"## {line['lesson']}",
            f"{line['num_documents']} documents of {line['num_tokens']:,} tokens, {line['num_epochs']} "
            f"epochs, {len(losses[0])} steps, {line['num_held_out']} documents held out; {asked}. "
            f"Learning rates differ by at most {rates:.1e}. "
            f"{sides[1]['version']}.",
            f"![Held-out losses of both sides]({picture})",
            measure.table(header, shown),
            "Each step's loss, hanok / peft - 1, ten steps a line:",
            f"```\n{each}\n```",
        ]
    )


def in_tens(values: Sequence[float]) -> list[Sequence[float]]:
    """Return them ten at a time."""
    return [values[start : start + 10] for start in range(0, len(values), 10)]


def svg(curves: Mapping[str, Sequence[tuple[int, float]]], title: str) -> str:
    """Return a picture of curves: steps to the right, losses upwards from zero."""
    width, height, left, below = 640, 320, 48, 36
    last = max(step for curve in curves.values() for step, _ in curve) or 1
    top = math.ceil(max(loss for curve in curves.values() for _, loss in curve)) or 1

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - 12) * step / last
        return round(x, 1), round((height - below) - (height - below - 30) * loss / top, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18">{escape(title)}</text>',
    ]
    for loss in range(top + 1):
        x, y = place(0, loss)
        parts.append(f'<path d="M{x} {y}H{width - 12}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{loss}</text>')
    for index in range(5):
        step = last * index / 4
        parts.append(
            f'<text x="{place(step, 0)[0]}" y="{height - below + 18}" text-anchor="middle">'
            f"{step:.0f}</text>"
        )
    for index, (name, curve) in enumerate(curves.items()):
        points = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve))
        dashes = ' stroke-dasharray="6 5"' if index else ""
        line = f'fill="none" stroke="{COLOURS[name]}" stroke-width="{2 + 2 * (index == 0)}"{dashes}'
        parts.append(f'<polyline points="{points}" {line} stroke-opacity="0.8"/>')
        y = 40 + 18 * index
        parts.append(f'<path d="M{width - 190} {y}h30" {line}/>')
        parts.append(f'<text x="{width - 152}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


# The program


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Compare what is learnt with transformers + peft.")
    made.add_argument(
        "models", nargs="*", type=Path, metavar="MODEL", help="beside the bundled one"
    )
    made.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--documents", type=int, default=360, help="documents that are learnt from")
    made.add_argument("--held-out", type=int, default=40, help="documents that are held out")
    made.add_argument("--epochs", type=int, default=4)
    made.add_argument("--pack", type=int, default=512, help="tokens of a pack")
    made.add_argument("--packs-per-step", type=int, default=4)
    made.add_argument("--threads", type=int, default=measure.num_cores(), help="default: all cores")
    made.add_argument("--limit", type=float, default=1800.0, help="seconds of a process")
    made.add_argument("--again", action="store_true", help="compute what is there again")
    made.add_argument("--quick", action="store_true", help="few documents: does it run?")
    made.add_argument(
        "--output",
        type=Path,
        default=checkpoints.DEFAULT_FOLDER / "learning.md",
        help="Markdown file; a .jsonl and pictures go beside it",
    )
    return made


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, those of --quick filled in."""
    made = parser()
    if made.parse_args(arguments).quick:
        made.set_defaults(documents=24, held_out=4, epochs=1, pack=512, packs_per_step=1)
    return made.parse_args(arguments)


def read_lines(path: Path) -> dict[str, measure.Row]:
    """Return the last line about each lesson."""
    if not path.exists():
        return {}
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["lesson"]: line for line in found}


def main() -> None:
    options = options_of()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    path = options.output.with_suffix(".jsonl")
    if options.again:
        path.unlink(missing_ok=True)
    append = measure.json_lines(path)
    lessons = [
        Lesson(model=model, kind=kind, seed=seed)
        for model in (BUNDLED, *options.models)
        for kind in options.kinds
        for seed in options.seeds
    ]
    for lesson in lessons:
        if "sides" in read_lines(path).get(lesson.name, {}):
            continue
        try:
            append(learn(lesson, options))
        except (RuntimeError, ValueError, OSError) as error:
            append({"lesson": lesson.name, "failed": str(error).strip().splitlines()[-1]})
    text = report(list(read_lines(path).values()), options)
    measure.publish(text, options.output)


if __name__ == "__main__":
    main()
