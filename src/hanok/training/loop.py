"""The loop: packs of documents forward and backward, one step of the optimizer, and what is kept of it.

The loss of a step is the sum of -log p over all its targets, divided by their number, however they are
cut into packs. A step draws from nothing but the seed and its number, so a training that goes on from a
checkpoint computes what one without a break would have computed.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.checkpoint.aside import folder_aside, folder_exchanged
from hanok.engine.model import Model
from hanok.errors import GenerationError, OptionError
from hanok.memory.heap import give_back_at_once, trim_heap
from hanok.memory.watch import peak_resident_bytes
from hanok.training.checkpoint import CheckpointWriter, find_newest, read_state
from hanok.training.learnt import Learnt, LearntAdapter, LearntWeights
from hanok.training.loss import backward, loss_sum
from hanok.training.optimizer import Optimizer, learning_rate
from hanok.training.options import TrainOptions
from hanok.training.speed import StepSpeed

STEP_SEED = 1_000_003


class Documents(Protocol):
    """Tokenized documents, packed."""

    def packs(self, epoch: int) -> Sequence[Sequence[int]]:
        """Return the packs of an epoch, each the numbers of its documents."""

    def document(self, number: int) -> tuple[Sequence[int], Sequence[bool]]:
        """Return a document's tokens, and which of them are to be learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did."""

    step: int
    """From 1 on."""
    num_steps: int
    loss: float
    """Mean of -log p of its targets, in nats."""
    gradient_norm: float
    learning_rate: float
    num_tokens: int
    """Of all documents; there is no padding."""
    num_targets: int
    tokens_per_s: float
    seconds: float
    data_wait_s: float
    """Of these, waiting for the data: packing an epoch, and reading documents."""
    peak_share: float
    """Operations of the step in its seconds, as a share of the best rate of the model's products,
    measured once (`training/speed.py`)."""
    memory_bytes: int
    """The most that the process had in memory so far; of a GPU, that its allocator held."""
    epoch: float = 0.0
    """Epochs done after it; 1.5 is half of the second."""
    held_out_loss: float | None = None
    """At those steps that `eval_steps` names, and at the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a training did."""

    output: Path
    """The folder of the adapter, or of the model where all weights learnt."""
    num_steps: int
    num_parameters: int
    """That learnt."""
    losses: tuple[float, ...]
    """Of the steps of this process."""
    held_out_loss: float | None
    """After the last step; None without held-out documents, and where it was told to stop."""
    is_finished: bool
    """False where it was told to stop."""
    peak_bytes: int = 0
    """The most memory that the process had, on a GPU that torch had there."""
    planned_bytes: int | None = None
    """What was planned of it; None: no plan was made for this training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """A step that is left."""

    number: int
    """From 0 on."""
    packs: Sequence[Sequence[int]]
    epoch: float
    """Epochs done after it."""
    wait_s: float
    """How long its packs took to make."""


class Trainer:
    """One training: of an adapter over a model's weights, which stay as they are, or of the weights."""

    def __init__(self, model: Model, options: TrainOptions, output: str | Path) -> None:
        if model.decoder.execution.is_streamed:
            raise OptionError(
                "a model that is read from disk in every pass cannot be trained; give it more memory, "
                "or load it with fewer bits (quant)."
            )
        self.model = model
        self.options = options
        self.output = Path(output)
        self.asked: Mapping[str, Any] = {}
        """What else is asked for, such as data and where each option comes from: kept in checkpoints."""
        self.asked_before: Mapping[str, Any] = {}
        """The same of the training that this goes on with."""
        self.is_told_to_stop = False
        """Set it from anywhere, such as a signal's handler: the training stops after its step."""
        self._decoder = model.decoder
        lora = options.lora
        self.learnt: Learnt = LearntWeights(model) if lora is None else LearntAdapter(model, lora)
        """What learns."""
        self._writer = CheckpointWriter(self.output, options.keep_checkpoints)
        self.first_step = 0
        """Steps that were done before, in the training that this goes on with."""
        found = find_newest(self.output)
        self.skipped: tuple[str, ...] = found.skipped if found else ()
        """Checkpoints that a resumed training did not take, with the reason."""
        self._decoder.gradient_checkpointing = bool(options.gradient_checkpointing)
        if found is None:
            self.learnt.begin(options.seed)
            self._optimizer = Optimizer(self._decoder, options)
        else:
            state, moments = read_state(found.folder)
            _check_same(state["options"], options)
            self.learnt.restore(found.folder)
            self._optimizer = Optimizer(self._decoder, options)
            self.first_step = int(state["step"])
            self.asked_before = state.get("asked", {})
            self._optimizer.restore(moments, self.first_step)

    @cached_property
    def _speed(self) -> StepSpeed:
        return StepSpeed(self._decoder, self.options.pack_tokens)

    @property
    def parameter_line(self) -> str:
        """How many numbers learn, and of how many, in PEFT's words."""
        count = self._optimizer.num_parameters()
        own = 0 if self.options.lora is None else count
        total = self._decoder.config.num_parameters() + own
        return (
            f"trainable params: {count:,d} || all params: {total:,d} || "
            f"trainable%: {100 * count / total:.4f}"
        )

    def run(
        self,
        documents: Documents,
        held_out: Documents | None = None,
        *,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> TrainReport:
        """Train to the end, or until told to stop; the output folder is complete in either case.

        Raises GenerationError where the loss or a gradient is not a finite number: nothing is lost, the
        last checkpoint stays.
        """
        give_back_at_once()
        num_steps = self._num_steps(documents)
        losses: list[float] = []
        loss: float | None = None
        self._decoder.train()
        for turn in self._steps(documents, num_steps):
            report = self._step(documents, turn.packs, turn.number, num_steps)
            seconds = report.seconds + turn.wait_s
            report = replace(
                report,
                epoch=turn.epoch,
                data_wait_s=report.data_wait_s + turn.wait_s,
                seconds=seconds,
                tokens_per_s=report.num_tokens / seconds,
            )
            losses.append(report.loss)
            if held_out is not None and self.evaluates_after(report.step, num_steps):
                loss = self.evaluate(held_out)
                report = replace(report, held_out_loss=loss)
            if on_step is not None:
                on_step(report)
            every = self.options.save_steps
            if self.is_told_to_stop or (every and report.step % every == 0):
                self._save(report.step)
            if self.is_told_to_stop:
                break
        self._decoder.eval()
        done = self.first_step + len(losses)
        self._save(done)
        is_finished = done >= num_steps
        if not is_finished:
            loss = None
        elif held_out is not None and not losses:  # it was finished before
            loss = self.evaluate(held_out)
        target = self.output / self.learnt.folder
        if is_finished and target.exists() and losses:  # of fewer steps
            with folder_exchanged(target) as unfinished:
                self.learnt.write(unfinished)
        elif is_finished and not target.exists():
            with folder_aside(target) as unfinished:
                self.learnt.write(unfinished)
        return TrainReport(
            output=target,
            num_steps=done,
            num_parameters=self._optimizer.num_parameters(),
            losses=tuple(losses),
            held_out_loss=loss,
            is_finished=is_finished,
            peak_bytes=_peak_bytes(self.model.device),
        )

    def evaluates_after(self, step: int, num_steps: int) -> bool:
        """Return whether held-out documents and samples are looked at after a step."""
        often = self.options.eval_steps
        return step == num_steps or bool(often and step % often == 0)

    def evaluate(self, documents: Documents) -> float:
        """Return the mean of -log p of the targets of some documents."""
        total, count, was_training = 0.0, 0, self._decoder.training
        self._decoder.eval()
        with torch.no_grad():
            for pack in documents.packs(0):
                batch, rows, targets = _packed(documents, pack, self.model.device)
                hidden = self._decoder(batch).index_select(0, rows)
                total += loss_sum(self._decoder, hidden, targets)
                count += len(targets)
        self._decoder.train(was_training)
        return total / max(1, count)

    def _step(
        self, documents: Documents, packs: Sequence[Sequence[int]], number: int, num_steps: int
    ) -> StepReport:
        began = time.perf_counter()
        torch.manual_seed(self.options.seed * STEP_SEED + number)
        batches = [_packed(documents, pack, self.model.device) for pack in packs]
        num_targets = sum(len(targets) for _, _, targets in batches)
        data_wait_s = time.perf_counter() - began
        total = 0.0
        for batch, rows, targets in batches:
            hidden = self._decoder(batch).index_select(0, rows)
            trim_heap()  # what layers claimed for a moment; the head claims blocks of other sizes
            total += backward(self._decoder, hidden, targets, 1 / max(1, num_targets))
            del hidden  # and the graph behind it, before the next one is made
        loss, rate = total / max(1, num_targets), learning_rate(self.options, number, num_steps)
        norm = self._optimizer.step(rate) if math.isfinite(loss) else math.nan
        self._decoder.weights_changed()
        if not math.isfinite(norm):
            numbers = sorted(number for pack in packs for number in pack)
            raise GenerationError(
                f"step {number + 1}: the loss is {loss} and the gradients' norm {norm}; nothing "
                f"was changed. The step's documents are {numbers[:20]}. Lower the learning rate, "
                "or look at these documents."
            )
        num_tokens = sum(len(batch.token_ids) for batch, _, _ in batches)
        seconds = time.perf_counter() - began
        lengths = [length for batch, _, _ in batches for length in batch.host.query_lengths]
        return StepReport(
            step=number + 1,
            num_steps=num_steps,
            loss=loss,
            gradient_norm=norm,
            learning_rate=rate,
            num_tokens=num_tokens,
            num_targets=num_targets,
            tokens_per_s=num_tokens / seconds,
            seconds=seconds,
            data_wait_s=data_wait_s,
            peak_share=self._speed.share(lengths, num_targets, seconds),
            memory_bytes=_peak_bytes(self.model.device),
        )

    def _num_steps(self, documents: Documents) -> int:
        per_epoch = -(-len(documents.packs(0)) // self.options.packs_per_step)
        if not per_epoch:
            raise OptionError("there are no documents to learn from.")
        wanted = max(1, round(per_epoch * self.options.epochs))
        return wanted if self.options.max_steps is None else self.options.max_steps

    def _steps(self, documents: Documents, num_steps: int) -> Iterator[_Turn]:
        """Yield each step that is left."""
        size, number, epoch = self.options.packs_per_step, 0, 0
        while number < num_steps:
            began = time.perf_counter()
            packs = documents.packs(epoch)
            wait_s = time.perf_counter() - began
            for start in range(0, len(packs), size):
                if self.first_step <= number < num_steps:
                    done = epoch + min(1.0, (start + size) / len(packs))
                    part = packs[start : start + size]
                    yield _Turn(number=number, packs=part, epoch=done, wait_s=wait_s)
                    wait_s = 0.0
                number += 1
            epoch += 1

    def _save(self, step: int) -> None:
        options = json.loads(json.dumps(asdict(self.options)))
        state = {"step": step, "options": options, "asked": self.asked}
        self._writer.write(step, state, self._optimizer.state(), self.learnt.write)


def _packed(
    documents: Documents, pack: Sequence[int], device: torch.device
) -> tuple[ForwardBatch, Tensor, Tensor]:
    """Return the batch of a pack, the rows whose next token is to be learnt, and these tokens."""
    sequences, rows, targets = [], [], []
    start = 0
    for number in pack:
        token_ids, is_target = documents.document(number)
        for index in range(1, len(token_ids)):
            if is_target[index]:
                rows.append(start + index - 1)
                targets.append(token_ids[index])
        sequences.append(list(token_ids))
        start += len(token_ids)
    batch = ForwardBatch.of(sequences, device=device)
    return batch, torch.tensor(rows, device=device), torch.tensor(targets, device=device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def _check_same(old: dict[str, Any], options: TrainOptions) -> None:
    """Refuse to go on with options that would make another training of it."""
    new = json.loads(json.dumps(asdict(options)))
    may_change = {
        "save_steps",
        "keep_checkpoints",
        "eval_steps",
        "max_steps",
        "gradient_checkpointing",
    }
    for name in new.keys() | old.keys():
        if name not in may_change and new.get(name) != old.get(name):
            raise OptionError(
                f"the checkpoint was made with {name} {old.get(name)!r}, and {new.get(name)!r} is "
                "asked for: it would be another training. Give the same, or start in another folder."
            )
