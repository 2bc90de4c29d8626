"""Trains in processes killed at random moments until each training is done; prints how it went.

python -m tests.training.killed FOLDER NUMBER

One process loads the model and forks: a child trains on from what the one before it left, and gets
SIGKILL after some milliseconds. Every training has to give the losses and the adapter of one that was
never killed, bit for bit.
"""

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch

import hanok
from hanok.models.adapters import detach
from hanok.training.checkpoint import find_newest
from hanok.training.loop import StepReport, Trainer
from hanok.training.options import TrainOptions

TEXTS = (
    "Once upon a time there was a little dog who loved to play.",
    "Lily saw a big red ball in the park.",
    "Tom and his mom went to the store.",
    "One day a cat found a box.",
)
OPTIONS = TrainOptions(
    lora=hanok.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
    packs_per_step=1,
    epochs=2,
    learning_rate=1e-3,
    save_steps=1,
)


LIMIT_S = 150


class Texts:
    """Each text is a document, and a pack."""

    def __init__(self, model: hanok.Model) -> None:
        self._ids = [model.encode(text) for text in TEXTS]

    def packs(self, epoch: int) -> list[list[int]]:
        return [[number] for number in range(epoch, len(TEXTS))]

    def document(self, number: int) -> tuple[list[int], list[bool]]:
        return self._ids[number], [True] * len(self._ids[number])


def trained(model: hanok.Model, texts: Texts, output: Path) -> None:
    """Train on, and note each step's loss under its number."""
    losses = output.with_suffix(".losses")
    losses.mkdir(exist_ok=True)

    def note(report: StepReport) -> None:
        (losses / f"{report.step}").write_text(report.loss.hex())

    Trainer(model, OPTIONS, output).run(texts, on_step=note)


def result(output: Path) -> tuple[list[str], bytes]:
    losses = sorted(output.with_suffix(".losses").iterdir(), key=lambda file: int(file.name))
    adapter = output / "adapter" / "adapter_model.safetensors"
    return [file.read_text() for file in losses], adapter.read_bytes()


def killed_after(child: int, timeout_s: float) -> bool:
    """Kill a child if it is still there after some time; return whether it was."""
    descriptor = os.pidfd_open(child)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    is_there = not poll.poll(timeout_s * 1000)
    if is_there:
        os.kill(child, signal.SIGKILL)
    os.close(descriptor)
    _, status = os.waitpid(child, 0)
    if not is_there and status != 0:
        raise SystemExit(f"a training ended with {status}")
    return is_there


def main(folder: Path, number: int) -> None:
    torch.set_num_threads(1)  # what is forked has no other threads
    model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied", threads=1)
    texts, drawn = Texts(model), random.Random(0)

    def fork(output: Path) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                trained(model, texts, output)
                status = 0
            finally:
                os._exit(status)
        return child

    trained(model, texts, folder / "warm")  # what is measured and imported once is there in all
    detach(model.decoder, 0)
    began = time.perf_counter()
    killed_after(fork(folder / "whole"), LIMIT_S)
    longest = time.perf_counter() - began
    expected = result(folder / "whole")
    kills, trainings, skipped = 0, 0, 0
    while kills < number:
        if time.perf_counter() - began > LIMIT_S:
            raise SystemExit(f"{kills} kills in {LIMIT_S} s")
        output = folder / str(trainings)
        while killed_after(fork(output), drawn.uniform(0.0, longest)):
            kills += 1
            if time.perf_counter() - began > LIMIT_S:
                break
            if (output / "checkpoints").exists():
                found = find_newest(output)
                skipped += 0 if found is None else len(found.skipped)
        if time.perf_counter() - began > LIMIT_S:
            continue  # which says so
        if result(output) != expected:
            raise SystemExit(f"training {trainings} is another one than that without a break")
        trainings += 1
    print(json.dumps({"kills": kills, "trainings": trainings, "skipped": skipped}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
