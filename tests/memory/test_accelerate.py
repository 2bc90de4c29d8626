"""Placement by `balanced` and `sequential` against accelerate's own, on published models.

accelerate's rule counts weights alone and splits what does not fit, so it is compared where blocks stay
whole and everything is on GPUs. Budgets are the same on both sides: ours keep nothing back for caches
and activations here. For `sequential` accelerate holds one layer's room back on the first GPU, which
hanok does not (docs/plan.md); its budget there is larger by that.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hanok.memory.budget import Budget, Limit
from hanok.memory.needs import Use, needs_of
from hanok.memory.plan import Needs, Place, make_plan
from hanok.memory.planning import plan_load
from hanok.models.family import read_config, sources

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the published config.json of a model says of its sizes."""

    config: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    is_tied: bool = False
    head_dim: int | None = None

    def keys(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.is_tied,
            "max_position_embeddings": 4096,
        }
        return found | ({"head_dim": self.head_dim} if self.head_dim else {})


LLAMA, QWEN2, QWEN3 = "LlamaConfig", "Qwen2Config", "Qwen3Config"
MODELS = {
    "llama-2-7b": Published(
        config=LLAMA, model_type="llama", hidden_size=4096, intermediate_size=11008, layers=32,
        heads=32, kv_heads=32, vocab_size=32000,
    ),
    "llama-2-13b": Published(
        config=LLAMA, model_type="llama", hidden_size=5120, intermediate_size=13824, layers=40,
        heads=40, kv_heads=40, vocab_size=32000,
    ),
    "llama-2-70b": Published(
        config=LLAMA, model_type="llama", hidden_size=8192, intermediate_size=28672, layers=80,
        heads=64, kv_heads=8, vocab_size=32000,
    ),
    "llama-3.1-8b": Published(
        config=LLAMA, model_type="llama", hidden_size=4096, intermediate_size=14336, layers=32,
        heads=32, kv_heads=8, vocab_size=128256,
    ),
    "llama-3.1-70b": Published(
        config=LLAMA, model_type="llama", hidden_size=8192, intermediate_size=28672, layers=80,
        heads=64, kv_heads=8, vocab_size=128256,
    ),
    "llama-3.1-405b": Published(
        config=LLAMA, model_type="llama", hidden_size=16384, intermediate_size=53248, layers=126,
        heads=128, kv_heads=8, vocab_size=128256,
    ),
    "mistral-7b": Published(
        config="MistralConfig", model_type="mistral", hidden_size=4096, intermediate_size=14336,
        layers=32, heads=32, kv_heads=8, vocab_size=32000,
    ),
    "qwen2.5-72b": Published(
        config=QWEN2, model_type="qwen2", hidden_size=8192, intermediate_size=29568, layers=80,
        heads=64, kv_heads=8, vocab_size=152064,
    ),
    "qwen3-8b": Published(
        config=QWEN3, model_type="qwen3", hidden_size=4096, intermediate_size=12288, layers=36,
        heads=32, kv_heads=8, vocab_size=151936, head_dim=128,
    ),
    "qwen3-32b": Published(
        config=QWEN3, model_type="qwen3", hidden_size=5120, intermediate_size=25600, layers=64,
        heads=64, kv_heads=8, vocab_size=151936, head_dim=128,
    ),
}  # fmt: skip


def our_needs(model: Published) -> Needs:
    keys = {"model_type": model.model_type, **model.keys()}
    family, config = read_config(keys, "config.json")
    table = sources(family, config, {})
    use = Use(dtype="bfloat16", context=1)
    found = needs_of(family, config, table, {}, use, num_readers=2, file_bytes_per_s=1e9)
    units = tuple(weights_alone(unit) for unit in found.units)
    return Needs(
        units=units, context=1, batch=1, prompt_flops=1.0, load_bytes=0, file_bytes_per_s=1e9
    )


def weights_alone(unit: Any) -> Any:
    from dataclasses import replace

    return replace(unit, cache_bytes=0, work_bytes=0)


def gpus(sizes: list[int]) -> list[Place]:
    return [
        Place(
            name=str(index),
            kind="gpu",
            budget=Budget(device=str(index), limits=(Limit(num_bytes=size, source="test"),)),
            bytes_per_s=1.0,
            flops_per_s=1.0,
            rate_source="test",
        )
        for index, size in enumerate(sizes)
    ]


def theirs(
    model: Published, sizes: list[int], *, is_balanced: bool, dtype: torch.dtype = torch.bfloat16
) -> dict[str, int]:
    """Return accelerate's map, blocks named one by one."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    config = getattr(transformers, model.config)(**model.keys())
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    blocks = [type(built.model.layers[0]).__name__]
    memory: Any = dict(enumerate(sizes))
    if is_balanced:
        memory = get_balanced_memory(built, memory, no_split_module_classes=blocks, dtype=dtype)
    found = infer_auto_device_map(built, memory, no_split_module_classes=blocks, dtype=dtype)
    names = [f"model.layers.{index}" for index in range(model.layers)]
    return {
        name: next(
            device
            for prefix, device in found.items()
            if prefix == "" or name == prefix or name.startswith(f"{prefix}.")
        )
        for name in ["model.embed_tokens", *names, "model.norm", "lm_head"]
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_balanced_is_accelerates(name: str, count: int) -> None:
    model = MODELS[name]
    needed = our_needs(model)
    total = sum(unit.weight_bytes for unit in needed.units)
    sizes = [2 * total // count] * count
    found = make_plan(needed, gpus(sizes), "balanced")
    assert found.hf_device_map == theirs(model, sizes, is_balanced=True)


@pytest.mark.parametrize("name", MODELS)
def test_sequential_is_accelerates_but_for_the_layer_held_back(name: str) -> None:
    model = MODELS[name]
    needed = our_needs(model)
    total = sum(unit.weight_bytes for unit in needed.units)
    largest = max(unit.weight_bytes for unit in needed.units)
    sizes = [2 * total // 5, total // 3, total]
    found = make_plan(needed, gpus(sizes), "sequential")
    wider = [sizes[0] + largest, *sizes[1:]]
    assert found.hf_device_map == theirs(model, wider, is_balanced=False)


DOCUMENTED = re.findall(
    r"^\| (float32|bfloat16) \| (sequential|auto) \| ([0-9–, ]+) \| ([0-9–, ]+) \|$",
    (Path(__file__).parents[2] / "docs" / "plan.md").read_text(),
    re.M,
)


@pytest.mark.parametrize(("dtype", "policy", "expected", "ours"), DOCUMENTED)
def test_the_70b_of_the_documentation(
    tmp_path: Path, dtype: str, policy: str, expected: str, ours: str
) -> None:
    model = MODELS["llama-2-70b"]
    keys = {"model_type": model.model_type, **model.keys()}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    found = plan_load(
        tmp_path,
        devices=["name=a100"] * 4,
        max_memory=dict.fromkeys(range(4), "70GiB"),
        dtype=dtype,
        device_map=policy,
        may_measure=False,
    )
    assert found.fits
    assert ranges(found.hf_device_map) == ours
    balanced = policy == "auto"
    sizes = [70 * 2**30] * 4
    accelerates = theirs(model, sizes, is_balanced=balanced, dtype=getattr(torch, dtype))
    assert ranges(accelerates) == expected


def test_the_documentation_has_both_dtypes_and_policies() -> None:
    assert len(DOCUMENTED) == 4


def ranges(device_map: Mapping[str, Any]) -> str:
    """Return the layers of each GPU: "0–19, 20–39"."""
    layers: dict[Any, list[str]] = {}
    for module, device in device_map.items():
        if ".layers." in module:
            layers.setdefault(device, []).append(module.rpartition(".")[2])
    return ", ".join(f"{mine[0]}–{mine[-1]}" for mine in layers.values())
