"""What goes wrong while loading ends in a clear error, and leaves no file and no thread."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import hanok
from hanok.checkpoint.writer import TensorData, write_safetensors
from hanok.errors import CheckpointError, UnsupportedError
from hanok.memory import tensors as tensors_module

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def our_threads() -> list[str]:
    return [item.name for item in threading.enumerate() if item.name.startswith("hanok")]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of many small shards."""
    folder = tmp_path / "model"
    shapes = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,)}
    shapes["lm_head.weight"] = (64, 32)
    for index in range(2):
        layer = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (32, 32)
        shapes |= {
            f"{layer}.mlp.gate_proj.weight": (64, 32),
            f"{layer}.mlp.up_proj.weight": (64, 32),
            f"{layer}.mlp.down_proj.weight": (32, 64),
            f"{layer}.input_layernorm.weight": (32,),
            f"{layer}.post_attention_layernorm.weight": (32,),
        }
    data = []
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(len(data)))
        content = bytearray(values.bfloat16().view(torch.uint8).numpy().tobytes())
        data.append(
            TensorData(name=name, dtype="BF16", shape=shape, read=lambda content=content: content)
        )
    write_safetensors(folder, data, max_shard_bytes=6000)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


@pytest.mark.parametrize("options", [{"weights": "copied"}, {"quant": "int8"}])
def test_a_shard_that_is_deleted_while_loading(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1]
    real = tensors_module.read_bytes

    def read_and_delete(*arguments: Any) -> None:
        real(*arguments)
        last.unlink(missing_ok=True)

    monkeypatch.setattr(tensors_module, "read_bytes", read_and_delete)
    before = threading.active_count()
    with pytest.raises(
        CheckpointError, match=rf"{last.name} was there when loading began and cannot"
    ):
        hanok.load(sharded, **options)
    assert threading.active_count() == before
    assert not our_threads()


@pytest.mark.parametrize("options", [{}, {"weights": "copied"}, {"quant": "int4"}])
def test_an_interrupt_in_the_middle(sharded: Path, options: dict[str, Any]) -> None:
    placed: list[int] = []

    def interrupt(num_bytes: int) -> None:
        placed.append(num_bytes)
        if len(placed) == 3:
            raise KeyboardInterrupt

    files = sorted(file.name for file in sharded.iterdir())
    with pytest.raises(KeyboardInterrupt):
        hanok.load(sharded, progress=interrupt, **options)
    assert len(placed) == 3
    assert not our_threads()
    assert sorted(file.name for file in sharded.iterdir()) == files
    assert hanok.load(sharded, **options).generate([3, 4], max_new_tokens=2).token_ids


def test_a_device_that_is_not_here_any_more(sharded: Path) -> None:
    plan = hanok.plan_load(sharded, devices=["name=h100", "name=h100"], may_measure=False)
    assert plan.fits
    assert set(plan.hf_device_map.values()) <= {0, 1}
    with pytest.raises(
        UnsupportedError, match=r"the plan uses GPU \d, but torch finds \d GPUs here"
    ):
        hanok.load(plan=plan)
    assert not our_threads()


@pytest.mark.parametrize("what", ["save", "packed"])
def test_a_disk_that_is_full(sharded: Path, tmp_path: Path, what: str) -> None:
    """In a process whose files may not grow beyond 4 KiB, which is an error of the same kind."""
    target = tmp_path / "target"
    target.mkdir()
    code = f"""
import resource, sys
import hanok
folder, target = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
if {what!r} == "packed":
    print(hanok.load(folder, quant="int8", cache_packed=target).notes)
else:
    hanok.load(folder).save(target + "/saved")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(sharded), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "File too large" in (done.stdout if what == "packed" else done.stderr)
    assert (done.returncode == 0) == (what == "packed")
    assert [file.name for file in target.iterdir() if file.suffix != ".json"] == []


def test_a_folder_that_vanished_after_planning(sharded: Path) -> None:
    plan = hanok.plan_load(sharded, may_measure=False)
    shutil.rmtree(sharded)
    with pytest.raises(CheckpointError):
        hanok.load(plan=plan)
