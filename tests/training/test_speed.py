"""Operations of a step are those that torch counts in transformers and peft; a share is of a rate."""

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import hanok
from hanok.memory.adapters import attach_new
from hanok.models.family import family_of, usual_sources
from hanok.training.speed import StepSpeed

LENGTH = 24


def counted(*, learns_all: bool, rank: int = 4) -> int:
    """Operations of one pass forward and backward over LENGTH tokens, their whole squares of scores."""
    model = AutoModelForCausalLM.from_pretrained(
        hanok.BUNDLED, dtype=torch.float32, attn_implementation="eager"
    )
    if not learns_all:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear")
        model = peft.get_peft_model(model, config)
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.arange(1, LENGTH + 1)[None]).logits.sum().backward()
    return counter.get_total_flops()


def speed_of(model: hanok.Model, *, learns_all: bool, rank: int = 4) -> StepSpeed:
    decoder = model.decoder
    decoder.requires_grad_(learns_all)
    if not learns_all:
        table = usual_sources(family_of(model.checkpoint.config, "bundled"), model.config)
        lora = hanok.LoraConfig(r=rank, target_modules="all-linear")
        attach_new(decoder, table, lora, index=0, generator=torch.Generator())
    return StepSpeed(decoder, LENGTH)


@pytest.mark.filterwarnings("ignore")  # of PEFT's
@pytest.mark.parametrize("learns_all", [False, True])
def test_operations_are_those_that_torch_counts(learns_all: bool) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied")
    speed = speed_of(model, learns_all=learns_all)
    config = model.config
    attention = config.layers[0].attention
    square = 3 * 4 * attention.num_heads * attention.head_dim * LENGTH**2 * config.num_layers
    seen = square * (LENGTH + 1) // (2 * LENGTH)  # a token sees those before it
    expected = counted(learns_all=learns_all) - square + seen
    if not learns_all:  # torch asks for no gradient of the embedding's rows
        rows = sum(attention.qkv_sizes)
        expected += 2 * LENGTH * config.hidden_size * (rows + 3 * 4)
    assert speed.flops([LENGTH], LENGTH) == expected


def test_documents_do_not_see_each_other_and_masked_rows_never_reach_the_head() -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied")
    speed = speed_of(model, learns_all=False)
    assert speed.flops([8, 16], 10) < speed.flops([24], 10)
    head = 2 * 2 * model.config.vocab_size * model.config.hidden_size
    assert speed.flops([24], 10) - speed.flops([24], 9) == head
    assert speed.best_per_s > 0
    half = speed.share([24], 10, 1.0)
    assert speed.share([24], 10, 0.5) == pytest.approx(2 * half)


def test_a_head_of_its_own_learns() -> None:
    found = []
    for saved in ((), ("lm_head",)):
        model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied")
        model.decoder.requires_grad_(False)
        table = usual_sources(family_of(model.checkpoint.config, "bundled"), model.config)
        lora = hanok.LoraConfig(r=4, modules_to_save=saved)
        attach_new(model.decoder, table, lora, index=0, generator=torch.Generator())
        found.append(StepSpeed(model.decoder, LENGTH).flops([LENGTH], 1))
    assert found[1] - found[0] == 2 * model.config.vocab_size * model.config.hidden_size


def test_layers_below_what_learns_are_passed_once() -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied")
    model.decoder.requires_grad_(False)
    last = model.decoder.layers[-1]
    last.requires_grad_(True)
    upper = StepSpeed(model.decoder, LENGTH).flops([LENGTH], 0)
    model.decoder.layers.requires_grad_(True)
    whole = StepSpeed(model.decoder, LENGTH).flops([LENGTH], 0)
    layers = model.config.num_layers
    assert upper * 3 * layers == whole * (layers - 1 + 3)
