"""One cold process of benchmarks/train.py, whichever program trains: what is asked and measured.

A program loads a model, says when it has (`Log.loaded`), and tells of each step what it computed. Clocks
and memory are read here, the same way for all. Only the standard library is imported, so that every
program can run in an environment of its own.

Peak memory is the kernel's high-water mark of resident pages (VmHWM), mapped files included: that of the
process, and that of the steps alone, since the mark is reset once the model is loaded.
"""

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engine_worker

RESET_PEAK = "5"  # man 5 proc, clear_refs
NO_LOSS = -100  # what transformers takes for a token that is no target


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a program trains, on what, and how long."""

    model: str
    """The checkpoint's folder."""
    threads: int
    dtype: str = "float32"
    quant: str | None = None
    is_full: bool = False
    """All weights learn; else an adapter does."""
    rank: int = 8
    gradient_checkpointing: bool = False
    rows: str | None = None
    """A file of rows, one JSON object a line: {"prompt", "completion"} of messages, or {"text"}. None:
    random token ids, one document of `pack_tokens` a step."""
    pack_tokens: int = 512
    target_share: float = 1.0
    """Share of the tokens that are targets, of random ones: the last ones of the document."""
    batch_size: int = 8
    """Documents of a step, of programs that take whole documents."""
    warmup: int = 1
    """Steps before the measured ones."""
    steps: int | None = 3
    """Measured steps. None: the rest of one epoch."""

    @property
    def max_steps(self) -> int | None:
        """Steps in all."""
        return None if self.steps is None else self.warmup + self.steps

    def documents(self) -> list[tuple[list[int], list[bool]]]:
        """Return random documents, one a step: token ids, and which are targets, never the first."""
        vocab = json.loads((Path(self.model) / "config.json").read_text())["vocab_size"]
        numbers = random.Random(0)
        length = self.pack_tokens
        others = max(1, length - round(self.target_share * length))
        targets = [index >= others for index in range(length)]
        count = self.max_steps or 0
        return [
            ([numbers.randrange(3, vocab) for _ in range(length)], targets) for _ in range(count)
        ]


@dataclass(slots=True)
class Log:
    """The clocks of a process, and its steps."""

    row: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    _began: tuple[float, float] = (0.0, 0.0)

    def loaded(self) -> None:
        """Take the memory of loading; the next step begins."""
        self.row["loaded_gib"] = engine_worker.memory_gib("VmRSS")
        self.row["load_peak_gib"] = engine_worker.memory_gib("VmHWM")
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        self.begin()

    def begin(self) -> None:
        """Start the clocks of a step."""
        self._began = time.perf_counter(), time.process_time()

    def end(self, *, tokens: int, targets: int, loss: float, seconds: float | None = None) -> None:
        """Take a step, and start the next one; `seconds` where the program measures them itself."""
        wall, cpu = self._began
        self.steps.append(
            {
                "seconds": time.perf_counter() - wall if seconds is None else seconds,
                "cpu_seconds": time.process_time() - cpu,
                "tokens": tokens,
                "targets": targets,
                "loss": loss,
            }
        )
        self.begin()

    def result(self, warmup: int) -> dict[str, Any]:
        """Return the row: rates of all measured steps together."""
        measured = self.steps[warmup:]
        if not measured:
            raise SystemExit(
                f"{len(self.steps)} steps, of which {warmup} are not measured: none is left"
            )
        total = {
            key: sum(step[key] for step in measured) for key in ("seconds", "cpu_seconds", "tokens")
        }
        peak = engine_worker.memory_gib("VmHWM")
        return {
            "tokens_per_s": total["tokens"] / total["seconds"],
            "tokens_per_cpu_s": total["tokens"] / total["cpu_seconds"],
            "num_steps": len(measured),
            "tokens_per_step": total["tokens"] / len(measured),
            "targets_per_step": sum(step["targets"] for step in measured) / len(measured),
            "first_loss": self.steps[0]["loss"],
            "last_loss": self.steps[-1]["loss"],
            "num_tokens": sum(step["tokens"] for step in self.steps),
            "steps_peak_gib": peak,
            "peak_gib": max(peak, self.row["load_peak_gib"]),
            **self.row,
        }


Train = Callable[[Asked, Log], Mapping[str, Any]]
"""Trains, and returns what else is to be said: versions, which kernels."""


def run(train: Train) -> None:
    """Measure a program and print the row."""
    given = json.loads(sys.argv[1])
    known = {item.name for item in dataclasses.fields(Asked)}
    asked, log = Asked(**{key: value for key, value in given.items() if key in known}), Log()
    details = train(asked, log)
    print(json.dumps({**log.result(asked.warmup), **details}))


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
