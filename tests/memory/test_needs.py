"""What a plan counts, against what the decoder, its cache and its quantized weights really take."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.test_embed import save_base

import hanok
from hanok.errors import OptionError
from hanok.memory.load import load_decoder
from hanok.memory.needs import KNOWN_RECIPES, Use, activation_bytes, choose_dtype, needs_of
from hanok.memory.options import LoadOptions
from hanok.memory.plan import Needs
from hanok.memory.planning import describe, plan_load
from hanok.models.decoder import Execution
from hanok.models.family import read_config, sources
from hanok.quant.base import methods
from hanok.quant.recipe import read_recipe

USE = Use(dtype="bfloat16", context=100, batch=3)


def bundled(use: Use = USE) -> Needs:
    found = describe(hanok.BUNDLED)
    return needs_of(
        found.family,
        found.config,
        found.table,
        found.checkpoint.tensors,
        use,
        num_readers=2,
        file_bytes_per_s=1e9,
    )


def test_weights_and_cache_are_those_of_the_decoder() -> None:
    found = describe(hanok.BUNDLED)
    decoder = load_decoder(found, LoadOptions(dtype="bfloat16")).decoder
    units = bundled().units
    assert sum(unit.weight_bytes for unit in units) == found.config.parameter_bytes("bfloat16")
    assert sum(unit.file_bytes for unit in units) == sum(
        ref.size_bytes for ref in found.checkpoint.tensors.values()
    )
    names = [name for unit in units for name in unit.parameters]
    assert sorted(names) == sorted(found.config.parameter_shapes())
    cache = decoder.new_cache(3, 100)
    assert sum(unit.cache_bytes for unit in units) == cache.size_bytes
    decoder.execution = Execution(cache_dtype=torch.int8)
    small = bundled(replace(USE, cache_dtype="int8")).units
    assert sum(unit.cache_bytes for unit in small) == decoder.new_cache(3, 100).size_bytes


@pytest.mark.parametrize("text", ["int8", "int4", "nf4", "int4:group_size=64", "int8:head=none"])
def test_fewer_bits_are_those_of_the_quantized_weights(text: str) -> None:
    """Panels are filled up to 16 rows, which the bundled model's sizes are multiples of."""
    found = describe(hanok.BUNDLED)
    recipe = read_recipe(text)
    loaded = load_decoder(found, LoadOptions(dtype="bfloat16", quant=text))
    taken = loaded.report.quantized_bytes + loaded.report.copied_bytes + loaded.report.mapped_bytes
    planned = sum(unit.weight_bytes for unit in bundled(replace(USE, recipe=recipe)).units)
    assert planned == pytest.approx(taken, rel=0.005)


@pytest.mark.parametrize("name", KNOWN_RECIPES)
def test_what_is_known_without_torch_is_what_torch_would_say(name: str) -> None:
    recipe, known = read_recipe(name), KNOWN_RECIPES[name]
    assert known.linear_bits == methods()[name]().bits_per_weight(4096)
    for is_tied in (False, True):
        for parameter in (
            "embed_tokens.weight",
            "lm_head.weight",
            "layers.1.mlp.down_proj.weight",
            "layers.1.mlp.down_proj.bias",
            "layers.0.attention_norm.weight",
            "layers.0.mlp.router.weight",
        ):
            real = recipe.method_for(parameter, is_tied=is_tied)
            found = known.method_for(parameter, is_tied=is_tied)
            assert (real is None) == (found is None), parameter
            if real is not None and found is not None:
                assert found.bits_per_weight(4096) == real.bits_per_weight(4096)
    assert known.shares_embedding == recipe.shares_embedding


def test_what_stays_in_the_file_is_what_the_loader_leaves_there() -> None:
    found = describe(hanok.BUNDLED)
    for dtype in ("bfloat16", "float32", "float16"):
        report = load_decoder(found, LoadOptions(dtype=dtype)).report
        units = bundled(replace(USE, dtype=dtype)).units
        assert sum(unit.mapped_bytes for unit in units) == report.mapped_bytes
    copied = bundled(replace(USE, may_map=False)).units
    assert sum(unit.mapped_bytes for unit in copied) == 0


MOE: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def config_needs(keys: dict[str, Any], use: Use = USE) -> Needs:
    family, config = read_config(keys, "config.json")
    table = sources(family, config, {})
    return needs_of(family, config, table, {}, use, num_readers=2, file_bytes_per_s=1e9)


def test_a_token_reads_chosen_experts_and_one_row_of_the_embedding() -> None:
    config = read_config(MOE, "config.json")[1]
    found = config_needs(MOE).units
    matrices = 2 * config.num_active_parameters()
    norms = 2 * 64 * (2 * 2 + 1)
    row = 2 * 64
    assert sum(unit.token_bytes for unit in found) == matrices + norms + row
    names = [unit.modules for unit in found]
    assert names == [
        ("model.embed_tokens",),
        ("model.layers.0",),
        ("model.layers.1",),
        ("model.norm",),
        ("lm_head",),
    ]


def test_a_tied_head_is_part_of_the_embedding_unless_it_gets_its_own_weight() -> None:
    tied = MOE | {"tie_word_embeddings": True}
    found = config_needs(tied).units
    assert found[0].modules == ("model.embed_tokens", "lm_head")
    assert [unit.name for unit in found][-1] == "norm"
    assert found[0].token_bytes == 2 * 100 * 64
    assert found[0].work_bytes == 3 * 100 * (2 + 4)
    own = replace(USE, recipe=read_recipe("int8:embedding=none"))
    parted = config_needs(tied, own).units
    assert parted[-1].name == "lm_head"
    assert parted[-1].weight_bytes == 100 * 64 * 8.5 / 8
    assert parted[0].weight_bytes == 2 * 100 * 64


def test_learned_positions_go_with_the_embedding() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 60}
    found = config_needs(gpt2 | {"n_positions": 16}).units
    assert found[0].modules == ("transformer.wte", "transformer.wpe", "lm_head")
    assert found[1].modules == ("transformer.h.0",)


def test_what_is_computed_in(tmp_path: Path) -> None:
    config = read_config(MOE, "config.json")[1]
    tensors = describe(hanok.BUNDLED).checkpoint.tensors
    assert choose_dtype(config, {}, "auto", is_on_cpu=True) == "float32"
    assert choose_dtype(replace(config, dtype="float16"), {}, "auto", is_on_cpu=True) == "bfloat16"
    assert choose_dtype(replace(config, dtype="float16"), {}, "auto", is_on_cpu=False) == "float16"
    assert choose_dtype(config, tensors, "auto", is_on_cpu=True) == "bfloat16"
    assert choose_dtype(config, tensors, "float32", is_on_cpu=True) == "float32"
    with pytest.raises(OptionError, match="dtype 'int3' is unknown"):
        choose_dtype(config, tensors, "int3", is_on_cpu=True)


def test_activations_grow_with_tokens_up_to_one_pass() -> None:
    family, config = read_config(MOE, "config.json")
    sizes = [
        activation_bytes(family, config, replace(USE, context=context, batch=1))
        for context in (100, 200, 2048, 9999)
    ]
    assert sizes[1] == 2 * sizes[0]
    assert sizes[3] == sizes[2]


@pytest.mark.parametrize("quant", [None, "int8", "int4:group_size=32", "int8:embedding=int8"])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_what_a_model_without_a_head_needs_is_what_it_holds(
    tmp_path: Path, family: str, quant: str | None
) -> None:
    save_base(tmp_path / "model", family)
    plan = plan_load(
        tmp_path / "model", quant=quant, dtype="float32", weights="copied", context=64, batch=2
    )
    model = hanok.load(plan=plan)
    planned = sum(tier.weight_bytes for tier in plan.tiers)
    held = model.report.copied_bytes + model.report.quantized_bytes
    assert planned == pytest.approx(held, rel=0.005)
    if quant is None:
        assert planned == held == 4 * sum(item.numel() for item in model.decoder.parameters())
        assert held == model.config.parameter_bytes("float32")
    assert [unit.name for unit in plan.needs.units][-1] == "norm"
    # No scores are computed, of which the plan of a causal model has a row for each sequence.
    assert sum(unit.work_bytes for unit in plan.needs.units) == 0
    assert sum(tier.cache_bytes for tier in plan.tiers) == model.decoder.new_cache(2, 64).size_bytes
    sizes = model.config
    assert sizes.num_active_parameters() == sum(
        item.numel()
        for name, item in hanok.load(tmp_path / "model").decoder.named_parameters()
        if item.dim() == 2 and name != "embed_tokens.weight"
    )
