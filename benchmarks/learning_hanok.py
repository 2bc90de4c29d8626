"""hanok in one process of benchmarks/learning.py: what its documents' losses are, step by step.

    python learning_hanok.py LESSON.json START [TIME]     prints one JSON object

An adapter as it is before the first step is written into the folder START, in PEFT's files.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hanok
from hanok.training.loop import StepReport


class Documents:
    """Documents all of whose tokens but the first are learnt, in packs that were chosen before."""

    def __init__(self, documents: Sequence[Sequence[int]], epochs: Sequence[Any]) -> None:
        self._documents, self._epochs = documents, epochs

    def packs(self, epoch: int) -> Sequence[Sequence[int]]:
        """See `hanok.training.loop.Documents`."""
        found: Sequence[Sequence[int]] = self._epochs[epoch]
        return found

    def document(self, number: int) -> tuple[Sequence[int], Sequence[bool]]:
        """See `hanok.training.loop.Documents`."""
        token_ids = self._documents[number]
        return token_ids, [index > 0 for index in range(len(token_ids))]


def main() -> None:
    lesson = json.loads(Path(sys.argv[1]).read_text())
    asked = lesson["options"]
    model = hanok.load(
        lesson["model"], dtype="float32", weights="copied", threads=lesson["threads"]
    )
    lora = None if lesson["is_full"] else hanok.LoraConfig(**lesson["lora"])
    options = hanok.TrainOptions(lora=lora, epochs=len(lesson["epochs"]), save_steps=0, **asked)
    documents = Documents(lesson["documents"], lesson["epochs"])
    held_out = Documents(
        lesson["held_out"], [[[number] for number in range(len(lesson["held_out"]))]]
    )
    losses: list[float] = []
    rates: list[float] = []
    points: list[tuple[int, float]] = []

    def took(report: StepReport) -> None:
        losses.append(report.loss)
        rates.append(report.learning_rate)
        if report.held_out_loss is not None:
            points.append((report.step, report.held_out_loss))

    with tempfile.TemporaryDirectory() as output:
        trainer = hanok.Trainer(model, options, output)
        if lora is not None:
            start = Path(sys.argv[2])
            start.mkdir()
            trainer.learnt.write(start)
        points.append((0, trainer.evaluate(held_out)))
        found = trainer.run(documents, held_out, on_step=took)
    if points[-1][0] != len(losses):
        points.append((len(losses), float(found.held_out_loss or 0.0)))
    print(json.dumps({"losses": losses, "rates": rates, "held_out": points}))


if __name__ == "__main__":
    main()
