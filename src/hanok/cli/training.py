"""A training on the command line: bars, what is said of it, signals, and the exit status."""

import signal
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from hanok.cli.plan_table import training_lines
from hanok.cli.progress import bytes_bars, seconds_bar
from hanok.cli.units import size
from hanok.training.callback import Sample, TrainCallback
from hanok.training.config import DEFAULT, TrainConfig

if TYPE_CHECKING:
    from hanok.checkpoint.card import Step
    from hanok.memory.plan import LoadPlan
    from hanok.training.loop import StepReport, Trainer

STOPPED = 85
"""The exit status of a training that was told to stop: it goes on with the same command."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(config: TrainConfig, step: "Step") -> int:
    """Train and return the exit status: 0, or STOPPED. `step` is what the card says was done."""
    # Imported here: it brings torch.
    from hanok.training.run import carry_out

    for line in option_lines(config):
        click.echo(line, err=True)
    with _Shown() as shown:
        report = carry_out(config, shown, step=step)
    if not report.is_finished:
        click.echo(
            f"Stopped after step {report.num_steps}; the same command goes on from there.", err=True
        )
        return STOPPED
    losses = [
        f"loss {loss:.4f}" for loss in report.losses[-1:]
    ]  # none where it was finished before
    if report.held_out_loss is not None:
        losses.append(f"{report.held_out_loss:.4f} held out")
    said = f"; {', '.join(losses)}" if losses else ""
    is_adapter = config.options.lora is not None
    kind = "Adapter" if is_adapter else "Model"
    click.echo(f"Trained {report.num_steps} steps{said}. {kind}: {report.output}")
    if report.planned_bytes is not None:
        click.echo(
            f"Peak memory {size(report.peak_bytes)}, planned {size(report.planned_bytes)}.",
            err=True,
        )
    how = f"{config.model} --adapter {report.output}" if is_adapter else f"{report.output}"
    click.echo(f"Try it: hanok generate {how}", err=True)
    return 0


def option_lines(config: TrainConfig) -> list[str]:
    """Return the options that are not defaults, a line for each place that they come from."""
    said: dict[str, list[str]] = {}
    for name, item in config.resolved().items():
        if item["origin"] != DEFAULT and name not in ("model", "data", "output"):
            said.setdefault(item["origin"], []).append(f"{name}={item['value']}")
    return [f"Options by {origin}: {', '.join(items)}" for origin, items in said.items()]


class _Shown(TrainCallback):
    """Shows how far a training is, and lets signals end it after its step, saved."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._loading = ExitStack()
        self._done_s = 0.0

    def __enter__(self) -> Self:
        self._stack.enter_context(self._loading)
        self._show_bytes = self._loading.enter_context(bytes_bars())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def on_progress(self, what: str, done: int, total: int) -> None:
        self._show_bytes(what, done, total)

    def on_plan(self, plan: "LoadPlan") -> None:
        for line in training_lines(plan):
            click.echo(line, err=True)
        if plan.training is not None and plan.training.gradient_checkpointing:
            click.echo(
                "Each layer is computed again on the way back (gradient checkpointing).", err=True
            )

    def on_begin(self, trainer: "Trainer") -> None:
        self._loading.close()
        for reason in trainer.skipped:
            click.echo(f"Left: {reason}.", err=True)
        if trainer.first_step:
            click.echo(f"Going on after step {trainer.first_step}.", err=True)
        click.echo(trainer.parameter_line, err=True)

        def stop(number: int, frame: object) -> None:
            trainer.is_told_to_stop = True

        for item in SIGNALS:
            self._stack.callback(signal.signal, item, signal.signal(item, stop))
        self._first_step = trainer.first_step
        self._show_steps = self._stack.enter_context(seconds_bar("Training"))

    def on_held_out(self, step: int, loss: float) -> None:
        click.echo(f"Held-out loss before the first step: {loss:.4f}", err=True)

    def on_step(self, report: "StepReport") -> None:
        self._done_s += report.seconds
        number = report.step - self._first_step
        total_s = self._done_s / number * (report.num_steps - self._first_step)
        said = f"step {report.step}/{report.num_steps}, loss {report.loss:.4f}"
        self._show_steps(said, self._done_s, total_s)

    def on_sample(self, sample: Sample) -> None:
        click.echo(f"After step {sample.step}: {sample.prompt} → {sample.text.strip()}", err=True)
