"""Merging as files: what PEFT's merge computes, and what a model with the adapter says."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tests.engine.test_adapters import written
from tests.memory.test_adapters import (
    FAMILIES,
    OWN,
    OWN_FAMILIES,
    TARGETS,
    pefts_config,
    randomize,
    saved,
    theirs,
)
from tests.models.test_families import Built, built  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

import hanok
from hanok.checkpoint.card import steps_of
from hanok.checkpoint.lora_config import LoraConfig
from hanok.cli.main import cli
from hanok.errors import CheckpointError
from hanok.memory.adapters import attach_new
from hanok.memory.merge import merge_files
from hanok.models.adapters import attached
from hanok.models.family import family_of, usual_sources
from hanok.models.linear import Embedding, Linear


@pytest.mark.filterwarnings("ignore")  # of PEFT's
@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_are_those_of_pefts_merge(
    name: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    made = built(name)
    model = peft.get_peft_model(copy.deepcopy(made.model), pefts_config("patterns", name))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    count = merge_files(made.folder, tmp_path / "adapter", tmp_path / "merged").num_changed
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, theirs, before = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "merged", tmp_path / "theirs", made.folder)
    )
    assert ours.keys() == before.keys()
    changed = [key for key in ours if not torch.equal(ours[key], before[key])]
    assert len(changed) == count > 0
    for key in changed:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of PEFT's
@pytest.mark.parametrize("kind", ["directions", *OWN])
@pytest.mark.parametrize("name", OWN_FAMILIES)
def test_a_merged_model_is_base_and_adapter(
    name: str,
    kind: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    """Also where a head that is the embedding becomes another weight."""
    made = built(name)
    model = peft.get_peft_model(copy.deepcopy(made.model), pefts_config(kind, name)).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    report = merge_files(made.folder, tmp_path / "adapter", tmp_path / "merged")
    is_tied = name == "gemma2"
    assert report.is_untied == (is_tied and kind in ("head", "embedding", "both", "low-rank head"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(
        theirs(merged, made.tokens), theirs(model, made.tokens), atol=1e-4, rtol=1e-4
    )
    ours = hanok.load(tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(
        ours.logits(made.tokens), theirs(model, made.tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("llama-biases", "nf4"),
        ("gemma2", "int4"),
        ("gpt_neox", "int8"),
        ("gpt2", "int4:head=none"),
        ("mixtral", "int8"),
        ("gemma2", "nf4:embedding=int8"),
    ],
)
def test_what_a_quantized_base_computed_with_is_merged_into(
    name: str,
    quant: str,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    """Every weight of the result is the quantized model's, dequantized, and the adapter's product."""
    folder = built(name).folder
    model = hanok.load(folder, quant=quant, dtype="float32")
    table = usual_sources(family_of(model.checkpoint.config, "config.json"), model.config)
    target = TARGETS.get(name, ("q_proj", "o_proj"))
    config = LoraConfig(r=4, lora_alpha=16, target_modules=target)
    generator = torch.Generator().manual_seed(0)
    attach_new(model.decoder, table, config, index=0, generator=generator)
    for part in attached(model.decoder, table, 0).parts.values():
        with torch.no_grad():
            part.b.copy_(0.3 * torch.randn(part.b.shape, generator=generator))
    adapter = saved(tmp_path / "adapter", model.decoder, table, config, index=0)
    report = merge_files(folder, adapter, tmp_path / "merged", base_quant=quant)
    assert report.num_dequantized > report.num_changed > 0
    merged = hanok.load(tmp_path / "merged", dtype="float32").decoder
    for path, module in model.decoder.named_modules():
        if not isinstance(module, Linear | Embedding):
            continue
        held = {} if module.lora is None else dict(module.lora.adapters.items())
        whole = slice(0, getattr(module.weight, "shape")[0])  # noqa: B009
        expected = held["0"].merged(module) if "0" in held else module.float_rows(whole)
        found = merged.get_submodule(path)
        assert isinstance(found, Linear | Embedding)
        torch.testing.assert_close(
            found.float_rows(whole), expected, atol=1e-6, rtol=1e-5, msg=path
        )


def test_the_command_merges_into_what_the_adapter_was_trained_over(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", 1, ("q_proj", "v_proj"))
    (adapter / "training.json").write_text('{"quant": "int4"}')
    command = ["merge", str(hanok.BUNDLED), str(adapter)]
    found = CliRunner().invoke(cli, [*command, str(tmp_path / "trained")])
    assert found.exit_code == 0, found.output
    assert "weights are those of int4, dequantized" in found.output
    other = CliRunner().invoke(cli, [*command, str(tmp_path / "own"), "--base-quant", "none"])
    assert other.exit_code == 0, other.output
    assert "dequantized" not in other.output
    over, own = (
        json.loads((tmp_path / name / "merge.json").read_text())["merged"]
        for name in ("trained", "own")
    )
    assert own["kl_mean"] < 1e-3
    assert over["kl_mean"] < 0.02  # the kernel of int4 rounds what it multiplies as well
    files = [
        load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        for name in ("trained", "own")
    ]
    assert not torch.equal(*files)


def test_the_command_reports_how_far_the_merged_model_agrees(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", 1, ("q_proj", "v_proj", "down_proj"))
    command = ["merge", str(hanok.BUNDLED), str(adapter), str(tmp_path / "merged")]
    found = CliRunner().invoke(cli, [*command, "--quant", "int4"])
    assert found.exit_code == 0, found.output
    assert "15 weights changed" in found.output
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["merged"]["kl_mean"] < 1e-3 < report["without the adapter"]["kl_mean"]
    assert report["merged"]["same_top"] > 0.95
    assert report["merged"]["kl_mean"] < report["merged, int4"]["kl_mean"]
    (step,) = steps_of((tmp_path / "merged" / "README.md").read_text())
    assert step.text == "merges the adapter adapter"
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        merge_files(hanok.BUNDLED, adapter, tmp_path / "merged")


def test_an_adapter_of_another_base_is_refused_and_nothing_is_left(
    tmp_path: Path,
    built: Callable[[str], Built],  # noqa: F811 (the fixture)
) -> None:
    adapter = written(tmp_path / "adapter", 1, ("q_proj",))
    with pytest.raises(CheckpointError, match="Check that the adapter was trained on this base"):
        merge_files(built("mistral").folder, adapter, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="is no module of"):
        merge_files(built("gpt2").folder, adapter, tmp_path / "merged")
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_a_product_without_one_of_its_matrices_is_named(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", 1, ("q_proj",))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B\.weight is absent"):
        merge_files(hanok.BUNDLED, adapter, tmp_path / "merged")
