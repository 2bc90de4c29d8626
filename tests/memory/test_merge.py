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
from tests.memory.test_adapters import FAMILIES, pefts_config, randomize
from tests.models.test_families import Built, built  # noqa: F401 (a fixture)

import hanok
from hanok.checkpoint.card import steps_of
from hanok.cli.main import cli
from hanok.errors import CheckpointError
from hanok.memory.merge import merge_files


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
    count = merge_files(made.folder, tmp_path / "adapter", tmp_path / "merged")
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
    with pytest.raises(CheckpointError, match="is no product of"):
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
