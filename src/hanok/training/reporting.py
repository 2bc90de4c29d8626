"""What is seen of a training: its log, samples, TensorBoard, and a plot of its losses when it ends."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from hanok.training.callback import TrainCallback
from hanok.training.log import LOG, SAMPLES, StepLog
from hanok.training.loop import Documents, StepReport, Trainer
from hanok.training.loss_page import write_plots
from hanok.training.report_options import TENSORBOARD, ReportOptions
from hanok.training.samples import Sampler
from hanok.training.tensorboard import EventFile

NOT_SHOWN = ("step", "num_steps")
"""What TensorBoard has no curve of."""


class Reporter:
    """Writes what the steps of a training did below its output folder. A context: it ends with plots."""

    def __init__(
        self,
        trainer: Trainer,
        options: ReportOptions,
        callback: TrainCallback,
        sampler: Sampler,
        title: str,
    ) -> None:
        self._trainer = trainer
        self._callback = callback
        self._sampler = sampler
        self._title = title
        self._output: Path = trainer.output
        self._stack = ExitStack()
        first = trainer.first_step
        self.log = self._stack.enter_context(StepLog(self._output / LOG, first))
        self._samples = None
        if options.samples:
            self._samples = self._stack.enter_context(StepLog(self._output / SAMPLES, first))
        self._events = None
        if TENSORBOARD in options.report_to:
            folder = self._output / TENSORBOARD
            self._events = self._stack.enter_context(EventFile(folder, first))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        write_plots(self._output, self._title, self.log.lines)

    def begin(self, held_out: Documents | None) -> None:
        """Report what there is before the first step; nothing where steps were done before."""
        if self._trainer.first_step:
            return
        if held_out is not None:
            loss = self._trainer.evaluate(held_out)
            line = {"step": 0, "epoch": 0.0, "held_out_loss": loss}
            self.log.add(line)
            if self._events is not None:
                self._events.add(0, {"held_out_loss": loss})
            self._callback.on_held_out(0, loss)
        self._sample(0)

    def on_step(self, report: StepReport) -> None:
        """Report a step."""
        line = asdict(report)
        self.log.add(line)
        if self._events is not None:
            values = {
                name: float(value)
                for name, value in line.items()
                if value is not None and name not in NOT_SHOWN
            }
            self._events.add(report.step, values)
        self._callback.on_step(report)
        if self._trainer.evaluates_after(report.step, report.num_steps):
            self._sample(report.step)

    def _sample(self, step: int) -> None:
        if self._samples is None:
            return
        for sample in self._sampler.samples(step):
            self._samples.add(asdict(sample))
            self._callback.on_sample(sample)
