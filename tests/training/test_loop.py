"""Training an adapter: PEFT's gradients, steps that do not depend on the cut, resuming exactly."""

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hanok
from hanok.checkpoint.aside import Batch
from hanok.checkpoint.lora_config import LoraConfig
from hanok.engine.model import Model
from hanok.errors import CheckpointError, GenerationError, OptionError
from hanok.models.adapters import attached
from hanok.training.checkpoint import CheckpointWriter, find_newest, why_incomplete
from hanok.training.loop import StepReport, Trainer
from hanok.training.options import TrainOptions

TEXTS = (
    "Once upon a time there was a little dog who loved to play.",
    "Lily saw a big red ball in the park.",
    "The sun was warm and the birds were singing.",
    "Tom and his mom went to the store to buy milk.",
    "One day a cat found a box.",
    "Ben was sad.",
    "She ran and ran until she was home again with all her friends.",
    "They had fun.",
)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
OPTIONS = TrainOptions(
    lora=LORA, packs_per_step=2, learning_rate=1e-3, epochs=3, save_steps=2, warmup_ratio=0.1
)


class Texts:
    """Documents of some texts, all of whose tokens are learnt, in packs of so many documents."""

    def __init__(self, model: Model, size: int = 2, texts: Sequence[str] = TEXTS) -> None:
        self._ids = [model.encode(text) for text in texts]
        self._size = size

    def packs(self, epoch: int) -> Sequence[Sequence[int]]:
        order = list(range(len(self._ids)))
        order = order[epoch:] + order[:epoch]
        return [order[i : i + self._size] for i in range(0, len(order), self._size)]

    def document(self, number: int) -> tuple[Sequence[int], Sequence[bool]]:
        return self._ids[number], [index > 1 for index in range(len(self._ids[number]))]


def loaded(quant: str | None = None, dtype: str = "float32") -> Model:
    return hanok.load(hanok.BUNDLED, dtype=dtype, quant=quant, weights="copied")


def first_step(output: Path, packs_per_step: int, size: int) -> dict[str, Tensor]:
    """What a first step's gradients are, by the parameters' names: ten times the first moments."""
    model = loaded()
    options = replace(OPTIONS, packs_per_step=packs_per_step, max_steps=1, max_grad_norm=0.0)
    trainer = Trainer(model, options, output)
    with torch.no_grad():  # B begins as zero, and A would have no gradient
        generator = torch.Generator().manual_seed(1)
        for part in attached(model.decoder, trainer.learnt.table, 0).parts.values():
            part.b.copy_(0.1 * torch.randn(part.b.shape, generator=generator))
    trainer.run(Texts(model, size))
    moments = trainer._optimizer.state()
    return {name: 10 * value for name, value in moments if name.startswith("exp_avg.")}


@pytest.mark.parametrize(("packs_per_step", "size"), [(8, 1), (4, 2), (2, 4)])
def test_a_step_does_not_depend_on_how_it_is_cut(
    packs_per_step: int, size: int, tmp_path: Path
) -> None:
    whole = first_step(tmp_path / "whole", 1, 8)
    parts = first_step(tmp_path / "parts", packs_per_step, size)
    assert whole.keys() == parts.keys()
    differences = {name: gradient - parts[name] for name, gradient in whole.items()}
    for name, gradient in whole.items():
        assert gradient.norm() > 0
        assert differences[name].norm() <= 3e-6 * gradient.norm(), name
    length, off = (
        torch.cat([item.flatten() for item in found.values()]).norm()
        for found in (whole, differences)
    )
    assert off <= 1e-6 * length


def test_what_is_computed_again_on_the_way_back_is_the_same(tmp_path: Path) -> None:
    dropped = replace(OPTIONS, lora=replace(LORA, lora_dropout=0.1), max_steps=3)
    found = []
    for index, again in enumerate((False, True)):
        model = loaded()
        options = replace(dropped, gradient_checkpointing=again)
        found.append(Trainer(model, options, tmp_path / str(index)).run(Texts(model)))
    assert found[0].losses == found[1].losses
    files = [item.output / "adapter_model.safetensors" for item in found]
    assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()
    moments = [
        tmp_path / str(i) / "checkpoints/step-00000003/optimizer.safetensors" for i in (0, 1)
    ]
    assert moments[0].read_bytes() == moments[1].read_bytes()


@pytest.mark.filterwarnings("ignore")  # of PEFT's
def test_a_loss_goes_down_and_what_was_learnt_is_what_is_loaded(tmp_path: Path) -> None:
    model = loaded()
    texts = Texts(model)
    reports: list[StepReport] = []
    trainer = Trainer(model, replace(OPTIONS, epochs=20, eval_steps=10), tmp_path)
    before = trainer.evaluate(texts)
    done = trainer.run(texts, texts, on_step=reports.append)
    assert done.is_finished
    assert done.held_out_loss is not None
    assert done.held_out_loss < 0.5 * before
    held_out = [report.held_out_loss for report in reports]
    assert [loss is not None for loss in held_out] == [step % 10 == 0 for step in range(1, 41)]
    assert held_out[-1] == done.held_out_loss
    assert trainer.parameter_line.startswith("trainable params: ")
    assert [report.step for report in reports] == list(range(1, 41))
    assert max(report.learning_rate for report in reports) <= 1e-3
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(hanok.BUNDLED, dtype=torch.float32), done.output
    )
    ids = model.encode(TEXTS[0])
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model.logits(ids), expected, atol=1e-3, rtol=1e-4)
    assert model.generate("Lily saw", max_new_tokens=6).text == " a big red ball in the"


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(stop: int, tmp_path: Path) -> None:
    model = loaded()
    dropped = replace(OPTIONS, lora=replace(LORA, lora_dropout=0.1))
    whole = Trainer(model, dropped, tmp_path / "whole").run(Texts(model))
    model = loaded()
    first = Trainer(model, dropped, tmp_path / "parts")

    def stop_at(report: StepReport) -> None:
        first.is_told_to_stop = report.step == stop

    one = first.run(Texts(model), on_step=stop_at)
    assert not one.is_finished
    assert one.num_steps == stop
    model = loaded()
    two = Trainer(model, dropped, tmp_path / "parts").run(Texts(model))
    assert two.is_finished
    assert one.losses + two.losses == whole.losses
    files = [
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_damaged_checkpoint_is_left_for_the_one_before_it(tmp_path: Path) -> None:
    model = loaded()
    Trainer(model, OPTIONS, tmp_path).run(Texts(model))
    checkpoints = sorted((tmp_path / "checkpoints").iterdir())
    assert [item.name for item in checkpoints] == ["step-00000004", "step-00000006"]
    (checkpoints[1] / "optimizer.safetensors").write_bytes(b"cut off")
    trainer = Trainer(loaded(), OPTIONS, tmp_path)
    (reason,) = trainer.skipped
    assert "step-00000006: optimizer.safetensors has 7 bytes and should have" in reason
    shutil.rmtree(checkpoints[0])
    with pytest.raises(CheckpointError, match="no checkpoint is complete"):
        Trainer(loaded(), OPTIONS, tmp_path)


def test_a_damaged_checkpoint_is_written_again_and_no_complete_one_is_removed_for_it(
    tmp_path: Path,
) -> None:
    options = replace(OPTIONS, keep_checkpoints=1)
    model = loaded()
    Trainer(model, options, tmp_path).run(Texts(model))
    (last,) = (tmp_path / "checkpoints").iterdir()
    damaged = last.with_name("step-00000005")
    last.rename(damaged)
    shutil.copytree(damaged, last.with_name("step-00000002"))
    (damaged / "optimizer.safetensors").write_bytes(b"cut off")
    state = json.loads((last.with_name("step-00000002") / "state.json").read_text())
    writer = CheckpointWriter(tmp_path, 1)
    writer.write(4, state, [], lambda folder: None)
    kept = sorted(item.name for item in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]
    found = find_newest(tmp_path)
    assert found is not None
    assert found.folder.name == "step-00000004"
    writer.write(5, state, [], lambda folder: None)
    assert why_incomplete(damaged) is None


def test_a_full_disk_ends_a_training_and_what_was_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint before is complete, nothing is left of the new one, and the training goes on."""
    model = loaded()
    whole = Trainer(model, OPTIONS, tmp_path / "whole").run(Texts(model))
    created, is_full = Batch._created, False

    def opened(batch: Batch, path: Path) -> BinaryIO:
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return created(batch, path)

    def fill(report: StepReport) -> None:
        nonlocal is_full
        is_full = report.step == 4

    monkeypatch.setattr(Batch, "_created", opened)
    model = loaded()
    with pytest.raises((CheckpointError, OSError), match="No space left on device"):
        Trainer(model, OPTIONS, tmp_path / "parts").run(Texts(model), on_step=fill)
    is_full = False
    checkpoints = tmp_path / "parts" / "checkpoints"
    assert [item.name for item in checkpoints.iterdir()] == ["step-00000002"]
    again = Trainer(loaded(), OPTIONS, tmp_path / "parts")
    assert again.first_step == 2
    assert again.run(Texts(model)).losses == whole.losses[2:]


def test_a_training_of_more_steps_replaces_the_adapter(tmp_path: Path) -> None:
    model = loaded()
    first = Trainer(model, replace(OPTIONS, max_steps=2), tmp_path).run(Texts(model))
    before = (first.output / "adapter_model.safetensors").read_bytes()
    model = loaded()
    second = Trainer(model, replace(OPTIONS, max_steps=4), tmp_path).run(Texts(model))
    assert second.num_steps == 4
    assert (second.output / "adapter_model.safetensors").read_bytes() != before


def test_nothing_to_learn_from_is_said(tmp_path: Path) -> None:
    model = loaded()
    with pytest.raises(OptionError, match="no documents"):
        Trainer(model, replace(OPTIONS, max_steps=2), tmp_path).run(Texts(model, texts=()))


def test_other_options_are_another_training(tmp_path: Path) -> None:
    model = loaded()
    Trainer(model, replace(OPTIONS, max_steps=2), tmp_path).run(Texts(model))
    with pytest.raises(
        OptionError, match=r"made with learning_rate 0\.001, and 0\.01 is asked for"
    ):
        Trainer(loaded(), replace(OPTIONS, learning_rate=0.01), tmp_path)


def test_a_loss_that_is_no_number_changes_nothing(tmp_path: Path) -> None:
    model = loaded()
    trainer = Trainer(model, OPTIONS, tmp_path)
    parts = attached(model.decoder, trainer.learnt.table, 0).parts
    with torch.no_grad():
        next(iter(parts.values())).b.fill_(torch.nan)
    kept = {path: part.a.clone() for path, part in parts.items()}
    with pytest.raises(GenerationError, match="step 1: the loss is nan"):
        trainer.run(Texts(model))
    assert all(torch.equal(kept[path], part.a) for path, part in parts.items())


@pytest.mark.parametrize("quant", ["int8", "int4", "nf4"])
def test_an_adapter_over_a_quantized_base_learns(quant: str, tmp_path: Path) -> None:
    model = loaded(quant=quant)
    texts = Texts(model)
    trainer = Trainer(model, replace(OPTIONS, epochs=10), tmp_path)
    before = trainer.evaluate(texts)
    assert trainer.run(texts).is_finished
    assert trainer.evaluate(texts) < 0.7 * before
