"""What learns: the gradients are PEFT's and transformers', and what is written serves and goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.models.test_families import Built, built  # noqa: F401 (a fixture)
from tests.training.test_loop import OPTIONS, TEXTS, Texts, loaded
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import hanok
from hanok.checkpoint.lora_config import LoraConfig
from hanok.engine.model import Model
from hanok.errors import OptionError
from hanok.models.adapters import attached
from hanok.models.lora import Adapter
from hanok.training.loop import StepReport, Trainer
from hanok.training.optimizer import Optimizer, learning_rate
from hanok.training.options import TrainOptions

KINDS: dict[str, dict[str, Any]] = {
    "low rank": {},
    "rank-stabilized": {"use_rslora": True},
    "directions": {"use_dora": True},
    "head and norms": {"modules_to_save": ("lm_head", "norm")},
    "embedding": {"modules_to_save": ("embed_tokens",)},
    "tied": {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True},
    "rows of tokens": {"trainable_token_indices": (5, 3, 7)},
    "low-rank head": {"target_modules": ("q_proj", "lm_head", "down_proj")},
}


class Numbers:
    """Documents of drawn tokens, some of which are learnt."""

    def __init__(self, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.documents = [
            torch.randint(1, min(vocab_size, 40), (size,), generator=generator).tolist()
            for size in (9, 5, 14, 7)
        ]

    def packs(self, epoch: int) -> list[list[int]]:
        return [[2, 0], [3, 1]]

    def document(self, number: int) -> tuple[list[int], list[bool]]:
        ids = self.documents[number]
        return ids, [index % 3 > 0 for index in range(len(ids))]


def started(model: Model, options: TrainOptions, output: Path) -> Trainer:
    """A training whose adapter says something already: B begins as zero, and A has no gradient then."""
    trainer = Trainer(model, replace(options, max_steps=1, max_grad_norm=0.0), output)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in attached(model.decoder, trainer.learnt.table, 0).parts.values():
            part.b.copy_(0.1 * torch.randn(part.b.shape, generator=generator))
    return trainer


def gradients_in_files(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """A first step's gradients under the names of files: written as if they were the weights."""
    moments = {name: 10 * value for name, value in trainer._optimizer.state()}
    with torch.no_grad():
        for name, parameter in trainer._optimizer.parameters.items():
            parameter.copy_(moments[f"exp_avg.{name}"])
    folder.mkdir()
    trainer.learnt.write(folder)
    return load_file(folder / "adapter_model.safetensors")


def their_loss(model: nn.Module, documents: Numbers) -> Tensor:
    """Each document for itself, by transformers."""
    losses, count = [], 0
    for number in range(len(documents.documents)):
        ids, is_target = documents.document(number)
        labels = torch.tensor([t if k else -100 for t, k in zip(ids, is_target, strict=True)])
        logits = model(torch.tensor([ids])).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        count += sum(is_target[1:])
    return sum(losses, torch.tensor(0.0)) / count


@pytest.mark.filterwarnings("ignore")  # of PEFT's
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["llama-biases", "gemma2"]
)  # the second one's head is its embedding
def test_gradients_are_pefts(
    name: str,
    kind: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    folder = built(name).folder
    model = hanok.load(folder, dtype="float32", weights="copied")
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **KINDS[kind]})
    trainer = started(model, replace(OPTIONS, lora=config), tmp_path / "run")
    (tmp_path / "start").mkdir()
    trainer.learnt.write(tmp_path / "start")
    documents = Numbers(model.config.vocab_size)
    trainer.run(documents)
    ours = gradients_in_files(trainer, tmp_path / "ours")
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).eval()
    their_loss(theirs, documents).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.norm() > 0, key
        assert (ours[key] - gradient).norm() <= 1e-5 * gradient.norm(), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_learn_and_a_resumed_training_is_the_uninterrupted_one(
    dtype: str, tmp_path: Path
) -> None:
    options = replace(OPTIONS, lora=None, learning_rate=1e-3)
    model = loaded(dtype=dtype)
    before = {name: item.clone() for name, item in model.decoder.named_parameters()}
    whole = Trainer(model, options, tmp_path / "whole")
    assert whole.parameter_line.endswith("trainable%: 100.0000")
    done = whole.run(Texts(model))
    assert done.losses[-1] < 0.8 * done.losses[0]
    for name, item in model.decoder.named_parameters():
        if item.dim() > 1 or dtype == "float32":  # a norm's are too large for one step in bfloat16
            assert not torch.equal(item, before[name]), name
    model = loaded(dtype=dtype)
    first = Trainer(model, options, tmp_path / "parts")

    def stop_at(report: StepReport) -> None:
        first.is_told_to_stop = report.step == 5

    one = first.run(Texts(model), on_step=stop_at)
    second = Trainer(loaded(dtype=dtype), options, tmp_path / "parts")
    two = second.run(Texts(model))
    assert one.losses + two.losses == done.losses
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    served = hanok.load(done.output)
    ids = model.encode(TEXTS[0])
    assert torch.equal(served.logits(ids), second.model.logits(ids))


def test_small_steps_of_weights_in_bfloat16_add_up(tmp_path: Path) -> None:
    """Each one is lost in rounding; a float32 master keeps them."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = loaded(dtype=dtype)
        options = replace(OPTIONS, lora=None, learning_rate=3e-5, schedule="constant", epochs=15)
        found[dtype] = Trainer(model, options, tmp_path / dtype).run(Texts(model)).losses
    fallen = {dtype: losses[0] - losses[-4] for dtype, losses in found.items()}
    assert fallen["bfloat16"] == pytest.approx(fallen["float32"], rel=0.1)


def test_quantized_weights_cannot_all_learn(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="those of this model are quantized"):
        Trainer(loaded(quant="int8"), replace(OPTIONS, lora=None), tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
def test_pissa_begins_as_the_base_with_the_largest_directions_and_is_written_over_it(
    init: str, tmp_path: Path
) -> None:
    model = loaded()
    ids = model.encode(TEXTS[0])
    base = model.logits(ids)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"), init_lora_weights=init
    )
    options = replace(OPTIONS, lora=config)
    trainer = Trainer(model, options, tmp_path / "whole")
    torch.testing.assert_close(model.logits(ids), base, atol=1e-4, rtol=1e-4)
    for path, part in attached(model.decoder, trainer.learnt.table, 0).parts.items():
        weight = load_file(hanok.BUNDLED / "model.safetensors")[f"{path}.weight"].float()
        values = torch.linalg.svdvals(weight)[:4]
        own = torch.linalg.svdvals(2.0 * part.b @ part.a)[:4]
        torch.testing.assert_close(own, values, atol=1e-3, rtol=5e-2 if "niter" in init else 1e-4)
    done = trainer.run(Texts(model))
    served = hanok.load(hanok.BUNDLED, dtype="float32")
    served.adapters.load("learnt", done.output)
    served.use_adapter("learnt")
    torch.testing.assert_close(served.logits(ids), model.logits(ids), atol=1e-4, rtol=1e-4)
    model = loaded()
    first = Trainer(model, options, tmp_path / "parts")
    first.is_told_to_stop = True
    one = first.run(Texts(model))
    two = Trainer(loaded(), options, tmp_path / "parts").run(Texts(model))
    assert one.losses + two.losses == done.losses


def test_b_of_an_adapter_may_have_a_rate_of_its_own(tmp_path: Path) -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        model = loaded()
        options = replace(OPTIONS, loraplus_lr_ratio=ratio, warmup_ratio=0.0)
        trainer = started(model, options, tmp_path / str(ratio))
        adapters = [item for item in model.decoder.modules() if isinstance(item, Adapter)]
        before = [(item.a.clone(), item.b[0].clone()) for item in adapters]
        trainer.run(Texts(model))
        pairs = zip(adapters, before, strict=True)
        moved[ratio] = [
            torch.stack([(item.a - a).norm(), (item.b[0] - b).norm()]) for item, (a, b) in pairs
        ]
    ratios = torch.stack(moved[16.0]) / torch.stack(moved[1.0])
    torch.testing.assert_close(ratios[:, 0], torch.ones(len(ratios)), atol=1e-3, rtol=0)
    torch.testing.assert_close(ratios[:, 1], torch.full((len(ratios),), 16.0), atol=0.01, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_optimizer_is_torchs_adamw(decay: float) -> None:
    """Over several steps, with what is kept of a parameter told that it has changed."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    asked = TrainOptions(weight_decay=decay, max_grad_norm=0.0)
    optimizer = Optimizer(ours, asked)
    groups = [
        {"params": [theirs.weight], "weight_decay": decay},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999))
    x = torch.randn(7, 5)
    for _ in range(4):
        version = ours.weight._version
        for module in (ours, theirs):
            module(x).square().sum().backward()
        optimizer.step(0.01)
        adam.step()
        adam.zero_grad()
        assert ours.weight._version > version
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-6, rtol=1e-5)


def test_lengths_of_rows_follow_what_is_learnt(tmp_path: Path) -> None:
    """DoRA keeps them between passes: after a step they are those of the new A and B."""
    model = loaded()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",), use_dora=True)
    trainer = Trainer(model, replace(OPTIONS, lora=config, learning_rate=0.05), tmp_path)
    done = trainer.run(Texts(model))
    served = hanok.load(hanok.BUNDLED, dtype="float32")
    served.adapters.load("learnt", done.output)
    served.use_adapter("learnt")
    ids = model.encode(TEXTS[0])
    torch.testing.assert_close(model.logits(ids), served.logits(ids), atol=1e-4, rtol=1e-4)


def test_schedules() -> None:
    def rates(**options: Any) -> list[float]:
        asked = TrainOptions(learning_rate=1.0, warmup_ratio=0.2, **options)
        return [round(learning_rate(asked, step, 10), 3) for step in range(10)]

    assert rates(schedule="constant") == [0.5, *[1.0] * 9]
    assert rates(schedule="linear") == [
        *(0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
    ]
    assert rates(schedule="wsd", decay_ratio=0.4) == [0.5, *[1.0] * 6, 0.75, 0.5, 0.25]
    assert rates(schedule="cosine")[1:4] == [1.0, 1.0, 0.962]
    assert TrainOptions(lora=None).peak_rate == 2e-5
    assert TrainOptions().peak_rate == 2e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ("lm_haed",)}, r"called 'lm_haed'\. The nearest: lm_head"),
        ({"trainable_token_indices": (2_000_000,)}, "2000000 is no token of this model"),
        (
            {"trainable_token_indices": {"wte": (1,)}},
            "'wte' is neither model.embed_tokens nor lm_head",
        ),
        ({"init_lora_weights": "pissa", "r": 2000}, "the rank 2000 is larger than a weight of"),
    ],
)
def test_what_cannot_learn_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
    with pytest.raises(OptionError, match=message):
        Trainer(loaded(), replace(OPTIONS, lora=config), tmp_path)


def test_beginnings_that_are_not_known_are_named() -> None:
    with pytest.raises(OptionError, match="init_lora_weights is 'olora'"):
        LoraConfig(init_lora_weights="olora")
    with pytest.raises(OptionError, match="init_lora_weights is false"):
        LoraConfig(init_lora_weights=False)
