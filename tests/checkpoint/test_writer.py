import json
import os
import stat
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hanok.checkpoint.files import open_checkpoint, read_tensor_bytes
from hanok.checkpoint.safetensors import DTYPE_BITS, read_header
from hanok.checkpoint.writer import TensorData, write_json, write_safetensors
from hanok.errors import CheckpointError, OptionError


def tensor(name: str, size: int = 4, data: bytes | None = None, dtype: str = "U8") -> TensorData:
    content = bytes(range(size)) if data is None else data
    return TensorData(name=name, dtype=dtype, shape=(size,), read=lambda: content)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_one_file_is_what_the_library_reads(tmp_path: Path) -> None:
    values = {
        "b": torch.arange(3, dtype=torch.uint8),
        "a": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
        "c": torch.tensor(5, dtype=torch.int64),
        "d": torch.zeros(0, 2),
    }
    dtypes = {"b": "U8", "a": "BF16", "c": "I64", "d": "F32"}
    tensors = [
        TensorData(
            name=name,
            dtype=dtypes[name],
            shape=tuple(value.shape),
            read=lambda value=value: (
                memoryview(value.reshape(-1).view(torch.uint8).numpy()) if value.numel() else b""
            ),
        )
        for name, value in values.items()
    ]
    done: list[int] = []
    folder = tmp_path / "new" / "folder"
    files = write_safetensors(folder, tensors, progress=done.append)
    assert files == (folder / "model.safetensors",)
    loaded = load_file(files[0])
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(loaded[name], value)
    refs, metadata = read_header(files[0])
    assert metadata == {"format": "pt"}
    assert list(refs) == ["c", "d", "a", "b"]
    assert all(ref.offset_bytes % (DTYPE_BITS[ref.dtype] // 8) == 0 for ref in refs.values())
    assert refs["c"].offset_bytes % 8 == 0
    assert sum(done) == 3 + 4 + 8
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_shards_are_filled_in_order(tmp_path: Path) -> None:
    tensors = [tensor("a", 6), tensor("b", 4), tensor("c", 20), tensor("d", 1), tensor("e", 9)]
    files = write_safetensors(tmp_path, tensors, max_shard_bytes=10, metadata={})
    assert [file.name for file in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert names(tmp_path) == [file.name for file in files]
    index = json.loads(files[3].read_text())
    assert index["metadata"] == {"total_size": 40}
    shard_of = {name: int(file[6:11]) for name, file in index["weight_map"].items()}
    assert shard_of == {"a": 1, "b": 1, "c": 2, "d": 3, "e": 3}
    checkpoint = open_checkpoint(tmp_path, needs_config=False)
    assert checkpoint.metadata == {}
    for data in tensors:
        assert read_tensor_bytes(checkpoint.tensors[data.name]) == data.read()


def test_no_tensors_give_an_empty_file(tmp_path: Path) -> None:
    (path,) = write_safetensors(tmp_path, [])
    assert load_file(path) == {}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor("a"), tensor("a")], "'a' cannot be written: the name is given twice"),
        ([tensor("__metadata__")], "'__metadata__' cannot be written: the name"),
        ([tensor("a", dtype="FP8")], "'a' cannot be written: dtype 'FP8' is not one of F64, "),
        ([tensor("a", 3, dtype="F4")], r"'a' .* F4 of shape \(3,\) is not a whole number of bytes"),
        (
            [TensorData(name="a", dtype="U8", shape=(-1,), read=bytes)],
            r"shape \(-1,\) has a negative",
        ),
        ([TensorData(name="a", dtype="U8", shape=(2**62, 4), read=bytes)], r"2\*\*63"),
    ],
)
def test_refuses_tensors_that_cannot_be_written(
    tmp_path: Path, tensors: list[TensorData], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path, tensors)
    assert names(tmp_path) == []


def test_refuses_a_shard_size_of_zero(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="max_shard_bytes is 0"):
        write_safetensors(tmp_path, [], max_shard_bytes=0)


def test_refuses_shards_that_a_whole_file_would_hide(tmp_path: Path) -> None:
    write_safetensors(tmp_path, [tensor("old")])
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, .* the 2 shards"):
        write_safetensors(tmp_path, [tensor("a"), tensor("b")], max_shard_bytes=4)


@pytest.mark.parametrize("error", [CheckpointError, KeyboardInterrupt, OSError])
def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    old = tmp_path / "model-00001-of-00002.safetensors"
    old.write_bytes(b"old")

    def fail() -> bytes:
        raise error("broken source")

    tensors = [tensor("a"), TensorData(name="b", dtype="U8", shape=(4,), read=fail)]
    raised = CheckpointError if error is OSError else error
    with pytest.raises(raised, match="broken source"):
        write_safetensors(tmp_path, tensors, max_shard_bytes=4)
    assert names(tmp_path) == [old.name]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("size", [3, 5])
def test_refuses_a_source_of_another_length(tmp_path: Path, size: int) -> None:
    with pytest.raises(
        CheckpointError, match=rf"'a' of dtype U8 and shape \(4,\) needs 4 bytes, .* gave {size}"
    ):
        write_safetensors(tmp_path, [tensor("a", 4, bytes(size))])
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: cannot be written"):
        write_safetensors(tmp_path / "file", [tensor("a")])


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"name": "한옥", "eps": 1e-05})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "한옥", "eps": 1e-05}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be written"):
        write_json(tmp_path / "absent" / "config.json", {})
    assert names(tmp_path) == ["config.json"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter("__metadata__".__ne__),
        st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    max_shard_bytes=st.integers(1, 400),
    seed=st.integers(0, 2**32),
)
def test_any_dtype_and_shape_survives(
    tmp_path_factory: pytest.TempPathFactory,
    content: dict[str, tuple[str, list[int]]],
    max_shard_bytes: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name, (dtype, shape) in content.items():
        # Four elements of six bits, or two of four, are whole bytes.
        extents = (*shape, 4)
        size = TensorData(name=name, dtype=dtype, shape=extents, read=bytes).size_bytes
        data = bytes(torch.randint(0, 256, (size,), generator=generator).tolist())
        tensors.append(
            TensorData(name=name, dtype=dtype, shape=extents, read=lambda data=data: data)
        )
    files = write_safetensors(folder, tensors, max_shard_bytes=max_shard_bytes)
    refs = open_checkpoint(folder, needs_config=False).tensors
    theirs = {}
    for file in files:
        if file.suffix == ".safetensors":
            theirs |= dict(safetensors.deserialize(file.read_bytes()))
    assert refs.keys() == theirs.keys() == content.keys()
    for data in tensors:
        assert read_tensor_bytes(refs[data.name]) == data.read()
        assert bytes(theirs[data.name]["data"]) == data.read()
        assert theirs[data.name]["dtype"] == data.dtype
        assert tuple(theirs[data.name]["shape"]) == data.shape == refs[data.name].shape
