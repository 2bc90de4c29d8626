"""Adapters of files: PEFT reads what we write, we read what PEFT writes, and both compute the same."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_families import CASES, Built, built, hanok_decoder  # noqa: F401 (a fixture)
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.checkpoint.adapter_files import open_adapter, read_lora_config
from hanok.checkpoint.files import open_checkpoint
from hanok.checkpoint.lora_config import LoraConfig
from hanok.errors import CheckpointError, OptionError, UnsupportedError
from hanok.memory.adapters import attach_files, attach_new, write_adapter
from hanok.models.adapters import activate, attached
from hanok.models.decoder import Decoder
from hanok.models.family import Source, family_of, usual_sources

TOLERANCE = 1e-5
FAMILIES = ("llama-biases", "qwen2", "gpt_neox", "phi3", "gemma2", "gpt2")
TARGETS = {"gpt_neox": ("query_key_value",), "gpt2": ("c_attn",), "phi3": ("qkv_proj", "o_proj")}
CONFIGS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 16},
    "rank-stabilized": {"target_modules": "all-linear", "r": 4, "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "r": 4,
        "rank_pattern": {"down_proj": 2, "dense_4h_to_h": 3},
        "alpha_pattern": {"layers.0.self_attn.o_proj": 32},
    },
    "some layers": {"r": 2, "layers_to_transform": (1,)},
    "directions": {"target_modules": "all-linear", "r": 4, "use_dora": True},
}
# Weights of an adapter's own; the second family ties its head to its embedding.
OWN: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ("lm_head",)},
    "embedding": {"modules_to_save": ("embed_tokens",)},
    "both": {"modules_to_save": ("embed_tokens", "lm_head")},
    "tied": {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True},
    "norms": {"modules_to_save": ("norm",)},
    "tokens": {"trainable_token_indices": (7, 3, 40)},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": (9, 2)}},
    "low-rank head": {"target_modules": ("q_proj", "lm_head"), "r": 2},
}
OWN_FAMILIES = ("llama-biases", "gemma2")


def saved(
    folder: Path, decoder: Decoder, table: Mapping[str, Source], config: LoraConfig, *, index: int
) -> Path:
    folder.mkdir()
    write_adapter(folder, decoder, table, config, index=index)
    return folder


def table_of(folder: Path, decoder: Decoder) -> dict[str, Source]:
    return usual_sources(family_of(open_checkpoint(folder).config, str(folder)), decoder.config)


def logits(decoder: Decoder, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder(ForwardBatch.of([tokens])))


def theirs(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return found


def options_of(kind: str, name: str) -> dict[str, Any]:
    names = TARGETS.get(name, ("q_proj", "v_proj"))
    return {"target_modules": names, **(CONFIGS | OWN)[kind]}


def listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def pefts_config(kind: str, name: str) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", **listed(options_of(kind, name)))


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
            # Lengths of rows stay lengths, and norms near what they were.
            parameter.copy_(drawn if "lora_A" in name or "lora_B" in name else parameter + drawn)


def base_of(made: Built) -> Any:
    return copy.deepcopy(made.model)


@pytest.mark.filterwarnings("ignore")  # of PEFT's, about weights that are tied
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in FAMILIES for kind in CONFIGS),
        *((name, kind) for name in OWN_FAMILIES for kind in OWN),
    ],
)
def test_what_peft_writes_computes_the_same_here(
    name: str,
    kind: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    made = built(name)
    config = pefts_config(kind, name)
    model = peft.get_peft_model(base_of(made), config).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "theirs")
    decoder = hanok_decoder(made.folder)
    base = logits(decoder, made.tokens)
    table = table_of(made.folder, decoder)
    files = open_adapter(tmp_path / "theirs")
    attach_files(decoder, table, files, index=0)
    assert torch.equal(logits(decoder, made.tokens), base)
    activate(decoder, 0)
    found, expected = logits(decoder, made.tokens), theirs(model, made.tokens)
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=TOLERANCE)
    # And written again, PEFT reads the same.
    saved(tmp_path / "ours", decoder, table, files.config, index=0)
    one, other = (
        load_file(tmp_path / item / "adapter_model.safetensors") for item in ("theirs", "ours")
    )
    one = {key: value for key, value in one.items() if ".base_layer." not in key}  # the base's own
    assert one.keys() == other.keys()
    if kind != "tokens" and kind != "tokens by name":  # whose rows we write in order
        assert all(torch.equal(one[key], other[key]) for key in one)
    again = peft.PeftModel.from_pretrained(base_of(made), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(again, made.tokens), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of PEFT's
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in FAMILIES for kind in CONFIGS),
        *((name, kind) for name in OWN_FAMILIES for kind in OWN),
    ],
)
def test_a_new_adapter_is_where_pefts_is_and_adds_nothing(
    name: str,
    kind: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    made = built(name)
    decoder = hanok_decoder(made.folder)
    table = table_of(made.folder, decoder)
    config = LoraConfig(**options_of(kind, name))
    base = logits(decoder, made.tokens)
    attach_new(decoder, table, config, index=0, generator=torch.Generator().manual_seed(0))
    activate(decoder, 0)
    torch.testing.assert_close(logits(decoder, made.tokens), base, atol=1e-6, rtol=1e-6)
    model = peft.get_peft_model(base_of(made), pefts_config(kind, name))
    shapes = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]: tuple(value.shape)
        for name, value in model.named_parameters()
        if "lora_A" in name
    }
    parts = attached(decoder, table, 0).parts
    assert {path: tuple(part.a.shape) for path, part in parts.items()} == shapes
    spread = torch.cat([part.a.flatten() for part in parts.values()]).std()
    drawn = torch.cat([v.flatten() for n, v in model.named_parameters() if "lora_A" in n]).std()
    assert float(spread) == pytest.approx(float(drawn), rel=0.1)
    saved(tmp_path / "new", decoder, table, config, index=0)
    read = open_adapter(tmp_path / "new").config
    assert [read.scale_of(path) for path in parts] == [config.scale_of(path) for path in parts]


def test_counting_is_pefts() -> None:
    """r = 8 on q and v of Llama 2 with 70 billion parameters: 16,384,000, as PEFT prints it."""
    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1)
    rows = {"q_proj": 8192, "k_proj": 1024, "v_proj": 1024}
    paths = [f"model.layers.{index}.self_attn.{name}" for index in range(80) for name in rows]
    count = sum(
        config.rank_of(path) * (8192 + rows[path.rpartition(".")[2]])
        for path in config.targets(paths)
    )
    assert count == 16_384_000
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 4.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({"peft_type": "LORA", "use_qalora": True}, "use_qalora is true, which hanok does not"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "path_initial_model_for_weight_conv"),
        ({"peft_type": "LORA", "init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"peft_type": "LORA", "bias": "all"}, 'bias is "all"'),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_lora_config(value, "adapter_config.json")


def test_unknown_products_are_named_with_the_nearest() -> None:
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    with pytest.raises(
        OptionError, match=r"no product of this model is called 'q_porj'\. The nearest: q_proj"
    ):
        LoraConfig(target_modules=("q_porj",)).targets(paths)
    with pytest.raises(OptionError, match=r"matches none of model\.layers\.0"):
        LoraConfig(target_modules="nothing.*").targets(paths)
    assert LoraConfig(target_modules=r".*mlp\..*").targets(paths) == paths[1:]
    found = LoraConfig(target_modules="all-linear", exclude_modules=("up_proj",)).targets(paths)
    assert found == paths[:1]
    with pytest.raises(OptionError, match="rank r is 0"):
        LoraConfig(r=0)
    with pytest.raises(OptionError, match="lora_dropout is 1"):
        LoraConfig(lora_dropout=1.0)


def test_damaged_files_are_named(
    tmp_path: Path,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is absent"):
        open_adapter(tmp_path)
    made = built("mistral")
    decoder = hanok_decoder(made.folder)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(2, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B\.weight is absent"):
        attach_files(decoder, table_of(made.folder, decoder), open_adapter(tmp_path), index=0)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        (
            "head",
            "lm_head.weight",
            r"the adapter's lm_head is \[\d+, 64\], and the base's \[\d+, 64\]",
        ),
        (
            "embedding",
            "model.embed_tokens.weight",
            "Check that it was trained on this base, with as many",
        ),
        (
            "tokens",
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            r"rows of 32 numbers for tokens up to 40 of model\.embed_tokens",
        ),
    ],
)
def test_an_adapter_of_another_vocabulary_is_refused(
    kind: str,
    changed: str,
    message: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    made = built("llama-biases")
    decoder = hanok_decoder(made.folder)
    table = table_of(made.folder, decoder)
    config = LoraConfig(**options_of(kind, "llama-biases"))
    attach_new(decoder, table, config, index=0, generator=torch.Generator())
    folder = saved(tmp_path / "adapter", decoder, table, config, index=0)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.{changed}"
    rows, columns = tensors[name].shape
    other = (rows + 8, columns) if kind != "tokens" else (rows, columns // 2)
    tensors[name] = torch.zeros(other)
    save_file(tensors, folder / "adapter_model.safetensors")
    fresh = hanok_decoder(made.folder)
    with pytest.raises(CheckpointError, match=message):
        attach_files(fresh, table, open_adapter(folder), index=0)
    assert not any(".lora" in path for path, _ in fresh.named_parameters())
