"""What is told of a training while it goes on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hanok.memory.plan import LoadPlan
    from hanok.training.loop import StepReport, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How the model went on from a prompt, after some step."""

    step: int
    """0: before the first one."""
    prompt: str
    text: str
    """The likeliest continuation, greedily."""


class TrainCallback:
    """Is told of a training while it goes on; override what is wanted. These methods do nothing."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """Be told how many bytes of all are loaded or tokenized; `what` says which of both."""

    def on_plan(self, plan: "LoadPlan") -> None:
        """Be told where every byte will be, before the model is loaded."""

    def on_begin(self, trainer: "Trainer") -> None:
        """Be told before the first step; the trainer is told to stop by its `is_told_to_stop`."""

    def on_held_out(self, step: int, loss: float) -> None:
        """Be told the loss of the held-out documents before the first step, where `step` is 0."""

    def on_step(self, report: "StepReport") -> None:
        """Be told what a step did, before its checkpoint is written."""

    def on_sample(self, sample: Sample) -> None:
        """Be told how the model goes on from one of the prompts that are asked for."""
