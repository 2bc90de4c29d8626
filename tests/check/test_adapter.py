"""Adapters: PEFT's own are sound, and each break of one is named."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hanok.check.finding import CheckReport
from hanok.check.folder import check_folder
from hanok.check.options import CheckOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as PEFT saves it, after training: B is not zero."""
    folder = tmp_path_factory.mktemp("adapter")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.v_proj": 2},
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PEFT's
        adapted = peft.get_peft_model(model, lora)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def check(folder: Path) -> CheckReport:
    return check_folder(folder, CheckOptions(threads=1))


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return broken


def with_config(**values: Any) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content | values))

    return broken


def test_an_adapter_of_peft_is_sound(adapter: Path) -> None:
    report = check(adapter)
    assert report.findings == ()
    assert {item.reason for item in report.skipped} == {
        "it is an adapter",
        "there is no tokenizer in the folder",
    }
    assert report.facts["weights"].startswith("8 tensors in 1")


def test_state_of_a_training_next_to_it_is_no_model(adapter: Path) -> None:
    save_file({"moments": torch.ones(3)}, adapter / "optimizer.safetensors")
    assert check(adapter).findings == ()


@pytest.mark.parametrize(
    ("broken", "level", "kind", "message"),
    [
        (
            with_tensors(lambda t: [t[name].zero_() for name in t if "lora_B" in name]),
            "warning",
            "idle-adapter",
            "every B is zero",
        ),
        (
            with_tensors(lambda t: t.pop(LORA_B)),
            "error",
            "adapter",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight is absent",
        ),
        (with_config(r=8), "error", "adapter", "(r is 8): "),
        (with_config(r=0), "error", "adapter", "r is 0"),
        (with_config(peft_type="IA3"), "note", "unknown-adapter", "'IA3'"),
        (with_config(use_qalora=True), "note", "unknown-adapter", "use_qalora is true"),
        (
            with_tensors(lambda t: t[LORA_B].fill_(float("nan"))),
            "error",
            "not-finite",
            "128 numbers not finite",
        ),
        (lambda f: (f / CONFIG).unlink(), "error", "adapter", f"{CONFIG} is missing"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x"), "error", "damaged", "holds 1 bytes"),
    ],
)
def test_a_broken_adapter_is_named(
    adapter: Path, broken: Callable[[Path], None], level: str, kind: str, message: str
) -> None:
    broken(adapter)
    found = check(adapter).findings
    assert [(item.level, item.kind) for item in found] == [(level, kind)]
    assert message in found[0].what


def test_one_product_that_learnt_nothing_is_no_idle_adapter(adapter: Path) -> None:
    with_tensors(lambda tensors: tensors[LORA_B].zero_())(adapter)
    assert check(adapter).findings == ()
