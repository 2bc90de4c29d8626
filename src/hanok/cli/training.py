"""From the options of `hanok train` to a trained adapter: model, data, steps with a bar, and signals."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hanok.cli.progress import bytes_bar, seconds_bar
from hanok.errors import OptionError
from hanok.memory.options import LoadOptions
from hanok.training.data.options import DataOptions, read_source
from hanok.training.options import TrainOptions

if TYPE_CHECKING:
    from hanok.checkpoint.card import Step
    from hanok.engine.model import Model
    from hanok.training.data.dataset import Dataset
    from hanok.training.loop import StepReport, Trainer, TrainReport

STOPPED = 85
"""The exit status of a training that was told to stop: it goes on with the same command."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOG = "log.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line asks for."""

    model: Path
    data: Sequence[str]
    output: Path
    load: LoadOptions
    options: TrainOptions
    data_options: DataOptions
    cache_folder: Path
    step: "Step"
    """What the adapter's card says was done."""


def train(asked: Asked) -> int:
    """Train an adapter and return the exit status: 0, or STOPPED."""
    # Imported here: it brings torch.
    from hanok.engine.model import load
    from hanok.memory.planning import plan_load
    from hanok.training.loop import Trainer

    plan = plan_load(asked.model, may_measure=False, **asked.load.planned)
    with bytes_bar(f"Loading {asked.model.name}") as bar:
        model = load(plan=plan, progress=bar.advance, **asked.load.unplanned)
    dataset = _open_data(asked, model)
    learnt, held_out = dataset, None
    if asked.options.held_out:
        learnt, held_out = dataset.split(asked.options.held_out)
    trainer = Trainer(model, asked.options, asked.output)
    for reason in trainer.skipped:
        click.echo(f"Left: {reason}.", err=True)
    if trainer.first_step:
        click.echo(f"Going on after step {trainer.first_step}.", err=True)
    click.echo(trainer.parameter_line, err=True)
    with _stopping(trainer), _log(asked.output / LOG, trainer) as on_step:
        report = trainer.run(learnt, held_out, on_step=on_step)
    return _finish(asked, model, dataset, report)


def _open_data(asked: Asked, model: "Model") -> "Dataset":
    from hanok.training.data.dataset import Dataset

    if model.tokenizer is None:
        raise OptionError(f"{asked.model} has no tokenizer, so no text can be learnt from.")
    dataset = Dataset.open(
        [read_source(text) for text in asked.data],
        model.tokenizer,
        asked.data_options,
        pack_tokens=asked.options.pack_tokens,
        seed=asked.options.seed,
        end_ids=model.end_ids,
        cache_folder=asked.cache_folder / "train",
    )
    dataset.check()
    return dataset


def _finish(asked: Asked, model: "Model", dataset: "Dataset", report: "TrainReport") -> int:
    if not report.is_finished:
        click.echo(
            f"Stopped after step {report.num_steps}; the same command goes on from there.", err=True
        )
        return STOPPED
    from hanok.checkpoint.card import CardContent, write_card

    if model.tokenizer is not None:
        model.tokenizer.save(report.output)
    if dataset.template is not None and "{" in dataset.template:  # a text, and no name
        (report.output / "chat_template.jinja").write_text(dataset.template, encoding="utf-8")
    inferred = {"library_name": "peft", "base_model_relation": "adapter"}
    write_card(report.output, CardContent(inferred=inferred, steps=(asked.step,)))
    losses = [
        f"loss {loss:.4f}" for loss in report.losses[-1:]
    ]  # none where it was finished before
    if report.held_out_loss is not None:
        losses.append(f"{report.held_out_loss:.4f} held out")
    said = f"; {', '.join(losses)}" if losses else ""
    click.echo(f"Trained {report.num_steps} steps{said}. Adapter: {report.output}")
    click.echo(f"Try it: hanok generate {asked.model} --adapter {report.output}", err=True)
    return 0


@contextmanager
def _stopping(trainer: "Trainer") -> Iterator[None]:
    """Let signals end the training after its step, saved."""

    def stop(number: int, frame: object) -> None:
        trainer.is_told_to_stop = True

    before = {item: signal.signal(item, stop) for item in SIGNALS}
    try:
        yield
    finally:
        for item, handler in before.items():
            signal.signal(item, handler)


@contextmanager
def _log(path: Path, trainer: "Trainer") -> "Iterator[Callable[[StepReport], None]]":
    """Write a JSON line for each step, and show how far it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, seconds_bar("Training") as show:
        done = 0.0

        def on_step(report: "StepReport") -> None:
            nonlocal done
            done += report.seconds
            file.write(json.dumps(asdict(report)) + "\n")
            file.flush()
            number = report.step - trainer.first_step
            total = done / number * (report.num_steps - trainer.first_step)
            show(f"step {report.step}/{report.num_steps}, loss {report.loss:.4f}", done, total)

        yield on_step
