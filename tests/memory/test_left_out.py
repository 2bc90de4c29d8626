"""What files hold beside the decoder is counted, said, and takes no memory in a plan."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hanok.cli.main import cli
from hanok.engine.model import load
from hanok.memory.left_out import LeftOut, left_out
from hanok.memory.load import load_decoder
from hanok.memory.planning import describe, plan_load

SIZES: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def with_tower(folder: Path) -> tuple[Path, int]:
    """Write a model whose files hold a tower of 8 + 1000 bfloat16 numbers, and none that is read."""
    transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen2Config(**SIZES), dtype=torch.bfloat16
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen2_vl", "vision_config": {"depth": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    plain = sum(tensor.nbytes for tensor in tensors.values())
    tower = {
        "visual.patch_embed.proj.weight": torch.arange(8, dtype=torch.bfloat16),
        "visual.blocks.0.norm.weight": torch.ones(10, 100, dtype=torch.bfloat16),
    }
    save_file(tensors | tower, folder / "model.safetensors")
    return folder, plain


def test_a_plan_counts_what_is_read_and_says_what_is_not(tmp_path: Path) -> None:
    folder, plain = with_tower(tmp_path)
    found = plan_load(folder, may_measure=False)
    tower = LeftOut(name="the vision tower and its projector", num_tensors=2, num_bytes=2016)
    assert found.needs.left_out == (tower,)
    assert sum(unit.file_bytes for unit in found.needs.units) == plain
    loaded = load_decoder(describe(folder).checkpoint, plan=found)
    report = loaded.report
    assert report.copied_bytes + report.mapped_bytes == plain
    assert report.notes[0] == str(tower)
    assert report.planned_bytes is not None
    assert report.held_bytes <= report.planned_bytes


def test_every_way_of_looking_at_a_checkpoint_says_it(tmp_path: Path) -> None:
    folder, _ = with_tower(tmp_path)
    said = "the vision tower and its projector, 2 tensors of 2,016 bytes"
    run = CliRunner().invoke
    plan = ["plan", str(folder), "--cache-folder", str(tmp_path / "rates")]
    assert f"Left out: {said}." in run(cli, plan).stdout
    assert json.loads(run(cli, [*plan, "--json"]).stdout)["left_out"] == [
        {"name": "the vision tower and its projector", "tensors": 2, "bytes": 2016}
    ]
    info = json.loads(run(cli, ["info", str(folder), "--json"]).stdout)
    assert info["checkpoint"]["left out"] == said


def test_a_saved_model_keeps_what_was_left_out(tmp_path: Path) -> None:
    folder, _ = with_tower(tmp_path / "original")
    saved = load(folder).save(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (folder, saved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_names_must_match_as_a_whole(tmp_path: Path) -> None:
    described = describe(with_tower(tmp_path)[0])
    narrow = replace(described.family, left_out={"one norm": r"visual\.blocks\.0\.norm"})
    assert left_out(narrow, described.checkpoint.tensors) == ()
