import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hanok.checkpoint import convert as convert_module
from hanok.checkpoint.convert import convert
from hanok.checkpoint.files import open_checkpoint
from hanok.errors import CheckpointError, UnsupportedError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(8, 4, generator=generator).bfloat16()
    fused = torch.randn(6, 4, generator=generator)
    return {
        HEAD: embed,
        EMBED: embed,
        "norm": torch.ones(4),
        "top": fused[:4],
        "bottom": fused[2:],
        "transposed": fused.T,
    }


def put(folder: Path, config: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = weights()
    torch.save(tensors, folder / "pytorch_model.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return tensors


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_converts_a_folder_in_place(tmp_path: Path) -> None:
    tensors = put(tmp_path, {"tie_word_embeddings": True, "eps": 1e-5})
    config = (tmp_path / "config.json").read_bytes()
    totals: list[int] = []
    done: list[int] = []
    report = convert(str(tmp_path), progress=done.append, on_start=totals.append)
    del tensors[HEAD]
    assert report.files == (tmp_path / "model.safetensors",)
    check(load_file(report.files[0]), tensors)
    assert report.shared == {HEAD: EMBED}
    assert report.num_tensors == 5
    assert report.num_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert totals == [2 * report.num_bytes] == [sum(done)]
    assert not report.already_done
    assert (tmp_path / "config.json").read_bytes() == config
    assert open_checkpoint(tmp_path).metadata == {"format": "pt"}


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, {})
    first = convert(tmp_path, max_shard_bytes=100)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    totals: list[int] = []
    second = convert(tmp_path, on_start=totals.append)
    assert second.already_done
    assert set(second.files) == set(first.files)
    assert (second.num_tensors, second.num_bytes) == (first.num_tensors, first.num_bytes)
    assert second.shared == first.shared
    assert totals == []
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_writes_shards_with_an_index(tmp_path: Path) -> None:
    tensors = put(tmp_path, {"tie_word_embeddings": True})
    report = convert(tmp_path, max_shard_bytes=100)
    assert report.files[-1].name == "model.safetensors.index.json"
    assert len(report.files) > 2
    del tensors[HEAD]
    found: dict[str, torch.Tensor] = {}
    for file in report.files[:-1]:
        found |= load_file(file)
    check(found, tensors)


@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}],
)
def test_an_untied_config_keeps_both_names(tmp_path: Path, config: dict[str, Any]) -> None:
    tensors = put(tmp_path, config)
    report = convert(tmp_path)
    assert report.shared == {}
    check(load_file(report.files[0]), tensors)
    assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize("config", [{}, {"vocab_size": 8}])
def test_a_silent_config_is_told_of_the_tie(tmp_path: Path, config: dict[str, Any]) -> None:
    put(tmp_path / "in", config)
    report = convert(tmp_path / "in", tmp_path / "out")
    assert report.shared == {HEAD: EMBED}
    tied = config | {"tie_word_embeddings": True}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == tied
    assert json.loads((tmp_path / "in" / "config.json").read_text()) == config
    assert convert(tmp_path / "in", tmp_path / "out").already_done
    convert(tmp_path / "in")
    assert json.loads((tmp_path / "in" / "config.json").read_text()) == tied


def test_other_shared_names_keep_the_first(tmp_path: Path) -> None:
    shared = torch.ones(3)
    heads = torch.zeros(2)
    path = tmp_path / "model.pt"
    torch.save(
        {
            "shared.weight": shared,
            "decoder.weight": shared,
            "x.embed_out.weight": heads,
            "x.lm_head.weight": heads,
            "reshaped": shared[None],
            "empty.a": torch.zeros(0),
            "empty.b": torch.zeros(0),
        },
        path,
    )
    report = convert(path)
    assert report.shared == {
        "decoder.weight": "shared.weight",
        "x.lm_head.weight": "x.embed_out.weight",
    }
    assert sorted(load_file(report.files[0])) == [
        "empty.a",
        "empty.b",
        "reshaped",
        "shared.weight",
        "x.embed_out.weight",
    ]
    assert names(tmp_path) == ["model.pt", "model.safetensors"]
    assert convert(path).already_done


def test_copies_what_lies_beside_the_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    put(source, {"tie_word_embeddings": True})
    for name in (
        "tokenizer.json",
        "chat.jinja",
        "spiece.model",
        "merges.txt",
        "qwen.tiktoken",
        "README.md",
    ):
        (source / name).write_text(name)
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "notes.py").write_text("")
    (source / "folder.json").mkdir()
    convert(source, target)
    assert names(target) == [
        "README.md",
        "chat.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "qwen.tiktoken",
        "spiece.model",
        "tokenizer.json",
    ]
    assert (target / "merges.txt").read_text() == "merges.txt"
    assert convert(source, target).already_done
    (target / "merges.txt").write_text("other")
    with pytest.raises(CheckpointError, match=r"out/merges\.txt: exists and differs from .*in/"):
        convert(source, target)


def test_converts_shards_of_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "p1.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "p2.bin")
    index = {"weight_map": {"a": "p1.bin", "b": "p2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    report = convert(tmp_path)
    check(load_file(report.files[0]), {"a": torch.ones(2), "b": torch.zeros(2)})


def test_safetensors_are_done_already_or_copied(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    path = source / "weights.safetensors"
    tensors = {"a": torch.ones(2)}
    save_file(tensors, path, metadata={"format": "pt", "made": "here"})
    for done in (convert(source), convert(path), convert(path, source)):
        assert done.already_done
        assert done.files == (path,)
    save_file({"b": torch.ones(2)}, source / "further.safetensors")
    assert convert(path).files == (path,)
    report = convert(path, tmp_path / "out")
    assert not report.already_done
    check(load_file(report.files[0]), tensors)
    assert open_checkpoint(report.files[0], needs_config=False).metadata == {
        "format": "pt",
        "made": "here",
    }


@pytest.mark.parametrize(
    ("existing", "name"),
    [
        ({"a": torch.ones(3)}, "'a'"),
        ({"a": torch.ones(2).half()}, "'a'"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "'b'"),
    ],
)
def test_refuses_a_destination_with_other_weights(
    tmp_path: Path, existing: dict[str, torch.Tensor], name: str
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    path = tmp_path / "model.safetensors"
    save_file(existing, path)
    before = path.read_bytes()
    with pytest.raises(
        CheckpointError, match=rf"safetensors that differ from .*bin: tensor {name} .* delete"
    ):
        convert(tmp_path)
    assert path.read_bytes() == before


def test_refuses_a_destination_that_is_a_file(tmp_path: Path) -> None:
    put(tmp_path)
    with pytest.raises(CheckpointError, match=r"bin: is a file; the destination must be"):
        convert(tmp_path, tmp_path / "pytorch_model.bin")


def test_refuses_a_source_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        convert(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "nowhere")


def test_a_copy_that_differs_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path)
    verify = convert_module._verify

    def damage(files: Sequence[Path], *args: Any) -> None:
        data = bytearray(files[0].read_bytes())
        data[-1] ^= 1
        files[0].write_bytes(data)
        verify(files, *args)

    monkeypatch.setattr(convert_module, "_verify", damage)
    with pytest.raises(CheckpointError, match=r"differs from .*pytorch_model\.bin after byte 0"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_a_copy_that_lacks_a_tensor_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path)
    write = convert_module.write_safetensors

    def write_less(folder: Path, tensors: Any, **kwargs: Any) -> tuple[Path, ...]:
        return write(folder, tensors[1:], **kwargs)

    monkeypatch.setattr(convert_module, "write_safetensors", write_less)
    with pytest.raises(CheckpointError, match="came back as None"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_an_interrupt_while_verifying_leaves_nothing_unverified(tmp_path: Path) -> None:
    put(tmp_path)
    done: list[int] = []

    def interrupt(count: int) -> None:
        done.append(count)
        if len(done) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, progress=interrupt)
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_refuses_an_index_that_lists_more_than_its_shards_have(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "part.bin")
    index = {"weight_map": {"a": "part.bin", "b": "part.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lists 1 tensors that no shard has: b"):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", '{"base_model_name_or_path": "a/b"}', "a PEFT adapter of a/b"),
        ("params.json", "{}", "makers' own layout"),
    ],
)
def test_refuses_what_loading_refuses_as_another_layout(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=message):
        convert(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
