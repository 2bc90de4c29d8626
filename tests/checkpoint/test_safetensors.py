import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save_file

from hanok.checkpoint.files import read_tensor_bytes
from hanok.checkpoint.safetensors import DTYPE_BITS, MAX_HEADER_BYTES, TensorRef, read_header
from hanok.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(path: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_reads_what_the_library_wrote(path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.tensor(7, dtype=torch.int64),
        "d": torch.arange(5).to(torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    refs, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert {name: (ref.dtype, ref.shape) for name, ref in refs.items()} == {
        "a": ("BF16", (2, 3)),
        "b": ("F32", (0, 4)),
        "c": ("I64", ()),
        "d": ("F8_E4M3", (5,)),
    }
    for name, tensor in tensors.items():
        expected = bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
        assert read_tensor_bytes(refs[name]) == expected
        assert refs[name].dense_bytes == refs[name].size_bytes == len(expected)


def test_reads_an_empty_file_of_the_library(path: Path) -> None:
    path.write_bytes(save({}))
    assert read_header(path) == ({}, {})


def test_accepts_padding_and_further_keys(path: Path) -> None:
    raw = json.dumps({"a": ENTRY | {"note": 1}}).encode() + b"   "
    refs, _ = read_header(write_raw(path, raw))
    assert refs["a"].offset_bytes == 8 + len(raw)


@pytest.mark.parametrize("size", [0, 7])
def test_refuses_a_file_without_length(path: Path, size: int) -> None:
    path.write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: holds {size} bytes, fewer"):
        read_header(path)


def test_refuses_a_header_longer_than_the_file(path: Path) -> None:
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header of 1000 bytes, but the file ends after 10"):
        read_header(path)


def test_refuses_a_huge_header_without_reading_it(path: Path) -> None:
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match=f"header of {MAX_HEADER_BYTES + 1} bytes, above"):
        read_header(path)


def test_names_a_git_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        read_header(path)


def test_refuses_an_absent_file(path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"[1]", "not JSON: it starts with"),
        (b'{"a": ', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_refuses_a_header_that_is_no_object(path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(write_raw(path, raw))


def test_refuses_a_name_given_twice(path: Path) -> None:
    entry = json.dumps(ENTRY)
    raw = f'{{"a": {entry}, "a": {entry}}}'.encode()
    with pytest.raises(CheckpointError, match="gives the name 'a' twice"):
        read_header(write_raw(path, raw))


def test_refuses_half_a_surrogate_pair(path: Path) -> None:
    with pytest.raises(CheckpointError, match="surrogate"):
        read_header(write_raw(path, {"a\ud800": ENTRY}))


@pytest.mark.parametrize("metadata", [{}, None])
def test_no_metadata_is_none_as_the_library_has_it(path: Path, metadata: object) -> None:
    file = write_raw(path, {"__metadata__": metadata, "a": ENTRY})
    with safetensors.safe_open(file, "pt") as library:
        assert not library.metadata()
    tensors, found = read_header(file)
    assert (list(tensors), found) == (["a"], {})


@pytest.mark.parametrize("metadata", [[], 0, {"a": 1}])
def test_refuses_metadata_that_is_no_map_of_strings(path: Path, metadata: object) -> None:
    with pytest.raises(CheckpointError, match="__metadata__"):
        read_header(write_raw(path, {"__metadata__": metadata, "a": ENTRY}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "must have dtype, shape and data_offsets, and has int"),
        ({"dtype": "F32", "shape": [2]}, r"must have .* and has \['dtype', 'shape'\]"),
        (ENTRY | {"shape": 2}, "has the shape 2"),
        (ENTRY | {"shape": [-2]}, r"has the shape \[-2\]"),
        (ENTRY | {"shape": [2.0]}, r"has the shape \[2.0\]"),
        (ENTRY | {"shape": [True, 2]}, r"has the shape \[True, 2\]"),
        (ENTRY | {"data_offsets": [0]}, r"has the data_offsets \[0\]"),
        (ENTRY | {"data_offsets": [8, 0]}, r"has the data_offsets \[8, 0\]"),
        (ENTRY | {"data_offsets": [-8, 0]}, r"has the data_offsets \[-8, 0\]"),
        (ENTRY | {"data_offsets": [False, 8]}, r"has the data_offsets \[False, 8\]"),
        (ENTRY | {"dtype": "F8_E4M"}, "unknown dtype 'F8_E4M'; near names are F8_E4M3"),
        (ENTRY | {"dtype": None}, "unknown dtype None; near names are"),
        (ENTRY | {"shape": [2**40, 2**40]}, r"2\*\*63 elements or more"),
        (ENTRY | {"shape": [0, 2**63]}, r"2\*\*63 elements or more"),
        (ENTRY | {"shape": [3]}, r"F32 and shape \[3\] needs 12 bytes, but .* give it 8"),
        (ENTRY | {"dtype": "F4", "shape": [15]}, r"needs 7.5 bytes, but .* give it 8"),
    ],
)
def test_refuses_a_malformed_entry(path: Path, entry: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor 'a' .*{message}"):
        read_header(write_raw(path, {"a": entry}))


def test_refuses_a_truncated_file(path: Path) -> None:
    write_raw(path, {"a": ENTRY})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        CheckpointError, match=rf"'a' ends .* holds {size - 3} of the {size} bytes .* cut off"
    ):
        read_header(path)


@pytest.mark.parametrize(
    ("offsets", "data_bytes", "message"),
    [
        ([4, 12], 12, "tensor 'b' starts at byte .* overlaps tensor 'a'"),
        ([12, 20], 20, "hole of 4 bytes lies between tensor 'a'.* and tensor 'b'"),
        ([8, 16], 20, "hole of 4 bytes follows tensor 'b'"),
    ],
)
def test_refuses_overlaps_and_holes(
    path: Path, offsets: list[int], data_bytes: int, message: str
) -> None:
    header = {"b": ENTRY | {"data_offsets": offsets}, "a": ENTRY}
    with pytest.raises(CheckpointError, match=message):
        read_header(write_raw(path, header, b"\0" * data_bytes))


def test_refuses_a_hole_before_the_first_tensor(path: Path) -> None:
    header = {"a": ENTRY | {"data_offsets": [8, 16]}}
    with pytest.raises(CheckpointError, match="hole of 8 bytes lies between the header"):
        read_header(write_raw(path, header, b"\0" * 16))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=4))))
def test_a_damaged_header_is_an_error_or_consistent(
    path: Path, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(save({"w": np.zeros((2, 3), np.float32), "b": np.ones(4, np.int8)}))
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    path.write_bytes(data)
    refs: dict[str, TensorRef] = {}
    with contextlib.suppress(CheckpointError):
        refs, _ = read_header(path)
    for ref in refs.values():
        assert ref.dtype in DTYPE_BITS
        assert ref.size_bytes == ref.dense_bytes == len(read_tensor_bytes(ref))
        assert 0 <= ref.offset_bytes <= ref.offset_bytes + ref.size_bytes <= len(data)
