import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hanok.checkpoint.files import TensorRef, open_checkpoint, read_tensor_bytes
from hanok.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "test"}')
    return tmp_path


def put(folder: Path, file_name: str, *names: str) -> Path:
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    path = folder / file_name
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def put_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_opens_a_folder(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    path = put(folder, "model.safetensors", "a", "b")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.folder == folder
    assert checkpoint.config == {"model_type": "test"}
    assert checkpoint.generation_config == {"eos_token_id": 2}
    assert checkpoint.files == (path,)
    assert list(checkpoint.tensors) == ["a", "b"]


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth"])
def test_opens_a_single_file_with_the_config_beside_it(folder: Path, name: str) -> None:
    path = put(folder, name, "a")
    for opened in (open_checkpoint(path), open_checkpoint(folder)):
        assert opened.folder == folder
        assert opened.files == (path,)
        assert opened.generation_config == {}
        assert opened.config == {"model_type": "test"}
        assert opened.tensors["a"].shape == (2,)


def test_candidates_are_taken_in_order(folder: Path) -> None:
    put(folder, "shard.bin", "shard")
    taken = []
    put(folder, "other.bin", "other")
    put_index(folder, {"shard": "shard.bin"}, "pytorch_model.bin.index.json")
    taken += open_checkpoint(folder).tensors
    put(folder, "pytorch_model.bin", "whole bin")
    taken += open_checkpoint(folder).tensors
    put(folder, "single.safetensors", "single")
    taken += open_checkpoint(folder).tensors
    put_index(folder, {"single": "single.safetensors"})
    put(folder, "undeclared.safetensors", "undeclared")
    taken += open_checkpoint(folder).tensors
    put(folder, "model.safetensors", "whole")
    taken += open_checkpoint(folder).tensors
    assert taken == ["shard", "whole bin", "single", "single", "whole"]


def test_training_state_is_no_candidate(folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        put(folder, name, "state")
    with pytest.raises(CheckpointError, match=r"holds no weights .* config\.json, optimizer\.pt"):
        open_checkpoint(folder)
    put(folder, "weights.pt", "a")
    assert list(open_checkpoint(folder).tensors) == ["a"]


@pytest.mark.parametrize("names", [("a.safetensors", "b.safetensors"), ("a.bin", "b.pth")])
def test_refuses_several_undeclared_candidates(folder: Path, names: tuple[str, str]) -> None:
    for name in names:
        put(folder, name, "a")
    with pytest.raises(CheckpointError, match=f"holds {names[0]}, {names[1]}, and neither"):
        open_checkpoint(folder)


def test_opens_shards(folder: Path) -> None:
    put(folder, "s1.safetensors", "a", "b")
    put(folder, "s2.safetensors", "c")
    put_index(folder, {"c": "s2.safetensors", "a": "s1.safetensors", "b": "s1.safetensors"})
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert [file.name for file in checkpoint.files] == ["s1.safetensors", "s2.safetensors"]
    index = folder / "model.safetensors.index.json"
    assert open_checkpoint(index) == checkpoint


def test_a_shard_may_be_a_link_or_in_a_subfolder(folder: Path) -> None:
    (folder / "config.json").rename(folder / "blob")
    (folder / "snapshot" / "part").mkdir(parents=True)
    (folder / "snapshot" / "config.json").symlink_to(folder / "blob")
    put(folder, "data.safetensors", "a").rename(folder / "weights-blob")
    (folder / "snapshot" / "part" / "s.safetensors").symlink_to(folder / "weights-blob")
    put_index(folder / "snapshot", {"a": "part/s.safetensors"})
    assert list(open_checkpoint(folder / "snapshot").tensors) == ["a"]


def test_refuses_an_absent_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_refuses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weights .* it holds nothing"):
        open_checkpoint(tmp_path)


def test_lists_only_the_first_of_many_names(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").touch()
    with pytest.raises(CheckpointError, match=r"18\.txt, 19\.txt and 10 more$"):
        open_checkpoint(tmp_path)


def test_refuses_a_file_of_another_kind(folder: Path) -> None:
    (folder / "model.npz").touch()
    with pytest.raises(CheckpointError, match=r"model\.npz: is not a weights file; known endings"):
        open_checkpoint(folder / "model.npz")


def test_needs_a_config_unless_told_otherwise(tmp_path: Path) -> None:
    path = put(tmp_path, "model.safetensors", "a")
    for opened in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"config\.json: is absent"):
            open_checkpoint(opened)
    assert open_checkpoint(path, needs_config=False).config == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", r"config\.json is not JSON"),
        (b"[]", r"config\.json is JSON, but a list and not an object"),
        (b'"\xff"', r"config\.json is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer .*git lfs pull"),
    ],
)
def test_refuses_a_damaged_config(folder: Path, text: bytes, message: str) -> None:
    put(folder, "model.safetensors", "a")
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_byte_order_mark_is_no_part_of_a_config(folder: Path) -> None:
    put(folder, "model.safetensors", "a")
    (folder / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}')
    assert open_checkpoint(folder).config == {"model_type": "llama"}


def test_refuses_an_unreadable_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    put(folder, "model.safetensors", "a")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: .*Permission denied"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "gives the name 'a' twice"),
        ('{"weight_map": {"a": 1}}', "shard of tensor 'a' is 1, no name"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "lies outside"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "'a' is '../x.safetensors', .* outside"),
        ('{"weight_map": {"a": "b/../../x.safetensors"}}', "lies outside"),
        ('{"weight_map": {"a": "..\\\\x.safetensors"}}', "lies outside"),
        ('{"weight_map": {"a": "C:\\\\x.safetensors"}}', "lies outside"),
        ('{"weight_map": {"a": "x.safetensors"}}', "1 of 1 shards .* missing: x.safetensors"),
    ],
)
def test_refuses_a_damaged_index(folder: Path, text: str, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_what_only_the_index_or_a_shard_names_is_noted(folder: Path) -> None:
    put(folder, "s1.safetensors", "a", "d")
    put(folder, "s2.safetensors", "b")
    put_index(folder, {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"})
    found = open_checkpoint(folder)
    assert list(found.tensors) == ["a", "d", "b"]
    assert found.disagreements == (
        "model.safetensors.index.json lists 1 tensors that no shard has: c",
        "model.safetensors.index.json does not list 1 tensors of shards: d",
    )
    put_index(folder, {"a": "s1.safetensors", "b": "s2.safetensors", "d": "s1.safetensors"})
    assert open_checkpoint(folder).disagreements == ()


def test_refuses_an_index_that_gives_a_tensor_to_another_shard(folder: Path) -> None:
    put(folder, "s1.safetensors", "a")
    put(folder, "s2.safetensors", "b")
    put_index(folder, {"a": "s2.safetensors", "b": "s1.safetensors"})
    with pytest.raises(CheckpointError, match=r"gives tensor 'a' to s2.*, and it lies in s1"):
        open_checkpoint(folder)


def test_refuses_a_tensor_in_two_files(folder: Path) -> None:
    put(folder, "s1.safetensors", "a")
    put(folder, "s2.safetensors", "b", "a")
    put_index(folder, {"a": "s1.safetensors", "b": "s2.safetensors"})
    with pytest.raises(CheckpointError, match=r"'a' is in two files, .*s1.* and .*s2"):
        open_checkpoint(folder)


def test_reading_a_file_that_was_cut_off_since(folder: Path) -> None:
    path = put(folder, "model.safetensors", "a", "b")
    ref = open_checkpoint(folder).tensors["b"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"'b' needs 8 bytes .* ends after 5 of them"):
        read_tensor_bytes(ref)
    path.unlink()
    with pytest.raises(CheckpointError, match="'b' cannot be read"):
        read_tensor_bytes(ref)


DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "I32": torch.int32, "F64": torch.float64}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dims=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=4),
    offset=st.integers(0, 3),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_reads_any_strided_view(
    tmp_path: Path, dims: list[tuple[int, int]], offset: int, dtype: str
) -> None:
    shape, strides = tuple(d[0] for d in dims), tuple(d[1] for d in dims)
    base = torch.arange(200, dtype=torch.uint8).to(DTYPES[dtype])
    # Through a list, because torch keeps odd strides of dimensions with one element.
    values = base.as_strided(shape, strides, offset).flatten().tolist()
    expected = torch.tensor(values, dtype=base.dtype)
    path = tmp_path / "raw"
    raw = bytes(base.view(torch.uint8).tolist())
    path.write_bytes(raw)
    item_bytes = base.element_size()
    used = 1 + sum((extent - 1) * stride for extent, stride in dims) if math.prod(shape) else 0
    ref = TensorRef(
        name="a",
        dtype=dtype,
        shape=shape,
        path=path,
        offset_bytes=offset * item_bytes,
        size_bytes=used * item_bytes,
        strides=strides,
    )
    assert ref.dense_bytes == expected.numel() * item_bytes
    found = read_tensor_bytes(ref)
    assert found == (bytes(expected.view(torch.uint8).tolist()) if expected.numel() else b"")
