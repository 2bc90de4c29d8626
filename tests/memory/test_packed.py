"""Packed copies: read where nothing changed, made again where anything did, never half there."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hanok
from hanok.attention.base import ForwardBatch
from hanok.checkpoint import content_hash
from hanok.checkpoint.files import open_checkpoint
from hanok.engine.model import Model
from hanok.errors import CheckpointError
from hanok.memory import load as load_module
from hanok.memory import packed

PROMPT = [5, 9, 200, 31]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that were quantized and not read."""
    found: list[str] = []
    real = load_module.quantize_source

    def quantize(tensors: Any, item: Any) -> int:
        found.append(item.source.names[0])
        return real(tensors, item)

    monkeypatch.setattr(load_module, "quantize_source", quantize)
    return found


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(hanok.BUNDLED, folder)
    return folder


def load(folder: Path, cache: Path, quant: str = "int4") -> Model:
    return hanok.load(folder, quant=quant, dtype="float32", cache_packed=cache)


def logits(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        return model.decoder.logits(model.decoder(ForwardBatch.of([PROMPT])))


@pytest.mark.parametrize(
    "quant",
    ["int4", "int4:symmetric=false", "int8", "nf4", "fp8", "int8-outlier", "int4:head=none"],
)
def test_the_second_load_reads_and_computes_the_same(
    model_folder: Path, tmp_path: Path, counted: list[str], quant: str
) -> None:
    first = load(model_folder, tmp_path / "cache", quant)
    assert counted
    counted.clear()
    second = load(model_folder, tmp_path / "cache", quant)
    assert not counted
    assert torch.equal(logits(first), logits(second))
    assert second.report.quantized_bytes == first.report.quantized_bytes
    assert not list((tmp_path / "cache").glob(".*"))


def test_another_recipe_is_another_copy(
    model_folder: Path, tmp_path: Path, counted: list[str]
) -> None:
    for quant in ("int4", "int4:group_size=64", "int8"):
        load(model_folder, tmp_path, quant)
        assert counted
        counted.clear()
    assert len(list(tmp_path.glob(f"*{packed.SUFFIX}"))) == 3


def test_contents_count_and_not_names_or_times(
    model_folder: Path, tmp_path: Path, counted: list[str]
) -> None:
    cache = tmp_path / "cache"
    load(model_folder, cache)
    counted.clear()
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    load(copy, cache)
    assert not counted
    weights = model_folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    load(model_folder, cache)
    assert counted


def test_another_instruction_set_or_version_is_another_copy(
    model_folder: Path, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model_folder, tmp_path)
    counted.clear()
    monkeypatch.setattr(packed, "version", lambda name: "0.0.0")
    load(model_folder, tmp_path)
    assert counted
    counted.clear()

    class Other:
        instruction_set = "one that is not here"

    monkeypatch.setattr(packed, "native", Other)
    load(model_folder, tmp_path)
    assert counted


@pytest.mark.parametrize("damage", ["cut", "longer", "other", "empty"])
def test_a_damaged_copy_is_made_again(
    model_folder: Path, tmp_path: Path, counted: list[str], damage: str
) -> None:
    expected = logits(load(model_folder, tmp_path))
    (copy,) = tmp_path.glob(f"*{packed.SUFFIX}")
    content = copy.read_bytes()
    damaged = {
        "cut": content[:-40],
        "longer": content + b"x",
        "other": b"x" + content[1:],
        "empty": b"",
    }[damage]
    copy.write_bytes(damaged)
    counted.clear()
    assert torch.equal(logits(load(model_folder, tmp_path)), expected)
    assert counted
    assert copy.read_bytes() == content


def test_it_is_no_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load(model_folder, cache)
    with pytest.raises(CheckpointError):
        open_checkpoint(cache)
    (copy,) = cache.glob(f"*{packed.SUFFIX}")
    shutil.copy(model_folder / "config.json", cache)
    with pytest.raises(CheckpointError):
        open_checkpoint(copy)


def test_a_full_disk_is_a_note_and_leaves_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load(model_folder, tmp_path / "good"))

    def no_space(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    cache = tmp_path / "full"
    cache.mkdir()
    (cache / packed.HASHES).write_text(json.dumps({}))
    monkeypatch.setattr(content_hash, "write_json", lambda file, values: None)
    model = load(model_folder, cache)
    assert any("No space left on device" in note for note in model.notes)
    assert torch.equal(logits(model), expected)
    assert [file.name for file in cache.iterdir()] == [packed.HASHES]


def test_nested_scales_are_not_kept_and_that_is_said(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder, tmp_path / "cache", "nf4:double_quant=true")
    assert any("no copy is kept of nested scales" in note for note in model.notes)
    assert not (tmp_path / "cache").exists()
