"""What a plan counts of a training is what autograd keeps and what the optimizer holds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.test_families import Built, built  # noqa: F401 (a fixture)
from torch import Tensor

import hanok
from hanok.attention.base import ForwardBatch
from hanok.checkpoint.lora_config import LoraConfig
from hanok.errors import BudgetError
from hanok.memory.learning import LearningNeeds
from hanok.memory.planning import check_fits
from hanok.models.family import family_of
from hanok.training.loop import Trainer
from hanok.training.options import TrainOptions

TOKENS = 96
KINDS: dict[str, dict[str, Any] | None] = {
    "all linear": {"target_modules": "all-linear"},
    "two products": {"target_modules": ("q_proj", "down_proj")},
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "directions": {"target_modules": ("q_proj",), "use_dora": True},
    "own": {"target_modules": ("q_proj",), "modules_to_save": ("lm_head", "norm")},
    "tokens": {"target_modules": ("q_proj",), "trainable_token_indices": (3, 5)},
    "principal": {"target_modules": ("q_proj",), "init_lora_weights": "pissa"},
    "all weights": None,
}


def options_of(kind: str, **options: Any) -> TrainOptions:
    lora = KINDS[kind]
    config = None if lora is None else LoraConfig(r=4, lora_alpha=8, **lora)
    return TrainOptions(lora=config, pack_tokens=TOKENS, packs_per_step=1, max_steps=1, **options)


class Drawn:
    """One pack of drawn tokens."""

    def __init__(self, vocab_size: int) -> None:
        self.ids = torch.randint(1, vocab_size, (TOKENS,)).tolist()

    def packs(self, epoch: int) -> list[list[int]]:
        return [[0]]

    def document(self, number: int) -> tuple[list[int], list[bool]]:
        return self.ids, [True] * TOKENS


def kept_bytes(trainer: Trainer, ids: list[int]) -> int:
    """What autograd keeps of a pass besides parameters, each storage once."""
    decoder, found = trainer.model.decoder, dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = decoder.train()(ForwardBatch.of([ids]))
    held = [*decoder.parameters(), *decoder.buffers()]
    for parameter in held:
        found.pop(parameter.untyped_storage().data_ptr(), None)
    assert hidden.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_a_plan_counts_what_autograd_and_the_optimizer_keep(
    name: str,
    dtype: str,
    kind: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    folder = built(name).folder
    options = options_of(kind)
    model = hanok.load(folder, dtype=dtype, weights="copied")
    needs = LearningNeeds(
        family_of(model.checkpoint.config, str(folder)), model.config, options.learning, dtype
    )
    plan = hanok.plan_load(folder, dtype=dtype, training=options.learning)
    (tier,) = [tier for tier in plan.tiers if tier.modules]
    trainer = Trainer(model, options, tmp_path)
    parameters = trainer._optimizer.parameters.values()
    numbers = sum(item.numel() for item in parameters)
    assert tier.learning.gradients == 4 * numbers
    assert tier.learning.optimizer == 8 * numbers
    wide = 0 if kind == "all weights" and dtype == "float32" else 4 * numbers
    assert tier.learning.learnt == wide * (2 if kind == "principal" else 1)
    if kind != "directions":  # which keeps a few products more
        drawn = Drawn(model.config.vocab_size)
        assert tier.learning.activations == pytest.approx(kept_bytes(trainer, drawn.ids), rel=0.12)
    assert needs.head_bytes > 0


def test_layers_that_are_computed_again_keep_their_input_alone(
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
) -> None:
    folder = built("qwen2").folder
    sizes = {}
    for again in (False, True):
        options = options_of("all linear", gradient_checkpointing=again)
        plan = hanok.plan_load(folder, dtype="float32", training=options.learning)
        (tier,) = [tier for tier in plan.tiers if tier.modules]
        sizes[again] = tier
    assert sizes[True].learning.activations < sizes[False].learning.activations / 4
    assert sizes[True].work_bytes > sizes[False].work_bytes


def test_a_training_that_does_not_fit_says_what_would_help(
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
) -> None:
    folder = built("qwen2").folder
    options = replace(options_of("all linear"), pack_tokens=200_000)
    plan = hanok.plan_load(folder, training=options.learning, max_memory="cpu=700MiB")
    with pytest.raises(BudgetError, match="--gradient-checkpointing"):
        check_fits(plan, folder)
