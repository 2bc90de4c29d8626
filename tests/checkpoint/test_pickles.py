import collections
import contextlib
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanok.checkpoint import pickles
from hanok.checkpoint.files import TensorRef, read_tensor_bytes
from hanok.checkpoint.pickles import read_pickle_header
from hanok.errors import CheckpointError

FORMATS = ["zip", "stream"]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def save(value: Any, path: Path, form: str = "zip", protocol: int = 2) -> None:
    torch.save(
        value,
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=form == "zip",
    )


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def write_zip(path: Path, data_pkl: bytes, storages: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)


class Call:
    """Pickles as a call of `function`; reading it back must not make the call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


class Program:
    """A pickle assembled opcode by opcode."""

    def __init__(self) -> None:
        self.code = b"\x80\x02"

    def glob(self, module: str, name: str) -> "Program":
        self.code += f"c{module}\n{name}\n".encode()
        return self

    def text(self, text: str) -> "Program":
        self.code += b"X" + struct.pack("<I", len(text)) + text.encode()
        return self

    def number(self, value: int) -> "Program":
        encoded = value.to_bytes(16, "little", signed=True)
        self.code += b"\x8a" + bytes([len(encoded)]) + encoded
        return self

    def numbers(self, *values: int) -> "Program":
        self.code += b"("
        for value in values:
            self.number(value)
        return self.op(b"t")

    def op(self, code: bytes) -> "Program":
        self.code += code
        return self

    def storage(self, count: int, kind: str = "FloatStorage", key: str = "0") -> "Program":
        self.op(b"(").text("storage").glob("torch", kind).text(key).text("cpu").number(count)
        return self.op(b"tQ")

    def view(
        self, count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> "Program":
        self.glob("torch._utils", "_rebuild_tensor").op(b"(").storage(count).number(offset)
        return self.numbers(*shape).numbers(*strides).op(b"tR")


def one_view(
    count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], name: str = "a"
) -> bytes:
    program = Program().op(b"}").text(name).view(count, offset, shape, strides)
    return program.op(b"s.").code


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_reads_what_torch_saved(path: Path, form: str, protocol: int) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 2, (3, 4), generator=generator)
    tensors = {str(dtype): data.to(torch.uint8).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "": torch.ones(1)}
    save(tensors, path, form, protocol)
    refs = read_pickle_header(path)
    assert list(refs) == list(tensors)
    for name, tensor in tensors.items():
        assert refs[name].shape == tuple(tensor.shape)
        assert refs[name].path == path
        assert refs[name].strides is None
        assert read_tensor_bytes(refs[name]) == (raw(tensor) if tensor.numel() else b"")


@pytest.mark.parametrize("form", FORMATS)
def test_reads_a_module_state_with_views_and_ties(path: Path, form: str) -> None:
    module = torch.nn.Module()
    module.embed = torch.nn.Embedding(5, 3, dtype=torch.bfloat16)
    module.head = torch.nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
    module.head.weight = module.embed.weight
    state = module.state_dict()
    assert state._metadata
    base = torch.arange(24.0).reshape(4, 6)
    state |= {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "transposed": base.T,
        "column": base[:, 2],
        "block": base[1:3, 2:4],
        "expanded": torch.tensor([1.0, 2.0])[:, None].expand(2, 3),
        "step": 3,
        "note": "text",
        "size": base.shape,
    }
    save(state, path, form)
    refs = read_pickle_header(path)
    assert "step" not in refs
    assert "note" not in refs
    assert "size" not in refs
    for name, ref in refs.items():
        assert read_tensor_bytes(ref) == raw(state[name]), name
    embed, head = refs["embed.weight"], refs["head.weight"]
    assert (embed.offset_bytes, embed.size_bytes) == (head.offset_bytes, head.size_bytes)
    assert refs["transposed"].strides == (1, 6)
    assert refs["block"].size_bytes == 8 * 4
    assert refs["block"].dense_bytes == 4 * 4
    assert refs["block"].offset_bytes == refs["transposed"].offset_bytes + 8 * 4


def test_reads_a_parameter_with_python_state(path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = "text"
    save({"a": parameter}, path)
    assert read_tensor_bytes(read_pickle_header(path)["a"]) == raw(parameter)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_reads_one_level_of_nesting(path: Path, key: str) -> None:
    save({key: {"a": torch.ones(2)}, "epoch": 3, "optimizer": {"m": [torch.zeros(1)]}}, path)
    assert list(read_pickle_header(path)) == ["a"]


def test_reads_views_of_parts_of_a_storage(path: Path) -> None:
    # Old files in the stream format may say that a storage is a part of another one.
    data = struct.pack("<6f", *range(6))
    part = Program().op(b"(").text("part").number(2).number(3).op(b"t").code[2:]
    program = Program().op(b"}").text("a").glob("torch._utils", "_rebuild_tensor").op(b"((")
    program.text("storage").glob("torch", "FloatStorage").text("0").text("cpu").number(6)
    program.op(part + b"tQ").number(1).numbers(2).numbers(1).op(b"tRs.")
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(x, 2) for x in (pickles.STREAM_MAGIC, 1001, system)]
    parts += [program.code, pickle.dumps(["0"], 2), struct.pack("<q", 6), data]
    path.write_bytes(b"".join(parts))
    assert read_tensor_bytes(read_pickle_header(path)["a"]) == struct.pack("<2f", 3, 4)
    outside = program.code.replace(b"\x8a\x10\x03" + b"\0" * 15, b"\x8a\x10\x09" + b"\0" * 15)
    assert outside != program.code
    path.write_bytes(b"".join([*parts[:3], outside, *parts[4:]]))
    with pytest.raises(CheckpointError, match="elements 2 to 11 of storage '0', which has 6"):
        read_pickle_header(path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_refuses_and_does_not_run_a_malicious_pickle(
    path: Path, tmp_path: Path, form: str, protocol: int
) -> None:
    marker = tmp_path / "marker"
    save({"a": torch.ones(2), "b": Call(os.system, f"touch {marker}")}, path, form, protocol)
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: names posix\.system.*Nothing was executed"
    ):
        read_pickle_header(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("collections", "Counter"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy.core.multiarray", "scalar"),
        ("hanok.checkpoint.pickles", "_Known"),
    ],
)
def test_refuses_every_unknown_global(path: Path, module: str, name: str) -> None:
    write_zip(path, Program().glob(module, name).op(b".").code)
    with pytest.raises(CheckpointError, match=rf"names {module}\.{name}, .* is refused"):
        read_pickle_header(path)


@pytest.mark.parametrize(
    ("code", "opcode"),
    [
        (b"(S'true'\nios\nsystem\n.", "STRING|INST"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(ccollections\nOrderedDict\no.", "OBJ"),
        (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x82\x01.", "EXT1"),
        (b"\x96" + struct.pack("<Q", 2**40) + b".", "cannot be read|BYTEARRAY8"),
        (b"P1\n.", "PERSID"),
    ],
)
def test_refuses_every_unknown_opcode(path: Path, code: bytes, opcode: str) -> None:
    write_zip(path, b"\x80\x02" + code)
    with pytest.raises(CheckpointError, match=opcode):
        read_pickle_header(path)


@pytest.mark.parametrize(
    "target",
    [
        Program().glob("torch._utils", "_rebuild_tensor_v2"),
        Program().glob("torch", "FloatStorage"),
        Program().storage(1),
        Program().view(1, 0, (1,), (1,)),
    ],
)
def test_no_pickle_can_change_a_stand_in(path: Path, target: Program) -> None:
    state = Program().op(b"(}").text("build").op(b"NstN").code[2:]
    write_zip(path, target.op(state + b"\x86b.").code, {"0": b"\0" * 4})
    with pytest.raises(CheckpointError, match="sets the state of"):
        read_pickle_header(path)


def test_the_attributes_of_a_dict_are_dropped(path: Path) -> None:
    state = Program().op(b"}").text("__class__").op(b"Nsb").code[2:]
    program = Program().glob("collections", "OrderedDict").op(b")R" + state).text("a")
    write_zip(path, program.view(1, 0, (1,), (1,)).op(b"s.").code, {"0": b"\0" * 4})
    assert list(read_pickle_header(path)) == ["a"]


def test_reads_an_ordered_dict_of_pairs(path: Path) -> None:
    program = Program().glob("collections", "OrderedDict").op(b"](").text("a")
    program.view(1, 0, (1,), (1,)).op(b"ta\x85R.")
    write_zip(path, program.code, {"0": b"\0" * 4})
    assert list(read_pickle_header(path)) == ["a"]


def test_refuses_a_memory_bomb(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(path, b"\x80\x02}r" + struct.pack("<I", 2**31) + b".")
    with pytest.raises(CheckpointError, match="numbers a pickled object 2147483648 after"):
        read_pickle_header(path)
    write_zip(path, one_view(2**40, 0, (2**40,), (0,)), {"0": b"\0" * 4})
    with pytest.raises(CheckpointError, match="expects 4398046511104 bytes in storage"):
        read_pickle_header(path)
    write_zip(path, one_view(1, 0, (2**40,), (0,)), {"0": b"\0" * 4})
    with pytest.raises(CheckpointError, match=r"'a' of shape .* repeats 4 bytes until"):
        read_pickle_header(path)
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 100)
    write_zip(path, one_view(1, 0, (1,), (1,), "a" * 100), {"0": b"\0" * 4})
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        read_pickle_header(path)


@pytest.mark.parametrize(
    ("count", "offset", "shape", "strides", "message"),
    [
        (4, 0, (5,), (1,), "uses bytes 0 to 20 of a storage of 16 bytes"),
        (4, 1, (4,), (1,), "uses bytes 4 to 20 of a storage of 16 bytes"),
        (4, 0, (2, 2), (3, 1), "uses bytes 0 to 20 of a storage of 16 bytes"),
        (4, 5, (0,), (1,), "uses bytes 20 to 20 of a storage of 16 bytes"),
        (5, 0, (5,), (1,), "expects 20 bytes in storage '0', and the file has 16"),
        (3, 0, (3,), (1,), "expects 12 bytes in storage '0', and the file has 16"),
        (4, -1, (4,), (1,), "no valid offset"),
        (4, 0, (-4,), (1,), "no integers >= 0"),
        (4, 0, (4,), (-1,), "no integers >= 0"),
        (4, 0, (2, 2), (1,), r"has the shape \(2, 2\), but the strides \(1,\)"),
        (4, 0, (2**40, 2**40), (0, 0), r"2\*\*63 elements or more"),
    ],
)
def test_refuses_a_view_outside_its_storage(
    path: Path,
    count: int,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    message: str,
) -> None:
    write_zip(path, one_view(count, offset, shape, strides), {"0": b"\0" * 16})
    with pytest.raises(CheckpointError, match=f"tensor 'a' .*{message}"):
        read_pickle_header(path)


def test_refuses_a_missing_storage(path: Path) -> None:
    write_zip(path, one_view(4, 0, (4,), (1,)))
    with pytest.raises(CheckpointError, match="'a' needs storage '0' of 16 bytes, which the file"):
        read_pickle_header(path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (Program().op(b"NQ."), "names something outside the pickle"),
        (Program().op(b"(").text("module").op(b"NtQ."), "names something outside the pickle"),
        (Program().storage(-1).op(b"."), "takes elements 0 to -1 of storage '0'"),
        (Program().storage(1).op(b"0").storage(2).op(b"."), "holds 4 bytes and 8 bytes"),
        (
            Program().op(b"(").text("storage").glob("torch", "float32").text("0").op(b"NK\x01tQ."),
            "names something outside the pickle",
        ),
        (
            Program()
            .op(b"(")
            .text("storage")
            .glob("torch", "FloatStorage")
            .text("0")
            .op(b"NK\x01K\x01tQ."),
            "describes no part of storage '0'",
        ),
    ],
)
def test_refuses_a_storage_that_is_none(path: Path, program: Program, message: str) -> None:
    write_zip(path, program.code)
    with pytest.raises(CheckpointError, match=message):
        read_pickle_header(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], "holds a list, not a state_dict"),
        (torch.ones(1), "holds a View, not a state_dict"),
        ({"a": 1, "b": {"c": torch.ones(1)}}, r"holds no tensors .* its keys are \['a', 'b'\]"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "a dict of tensors, 'b', is next to"),
        ({"a": torch.ones(1), "b": [torch.ones(1)]}, "a list of tensors, 'b', is next to"),
        ({0: torch.ones(1)}, "a tensor is named by a int"),
        ({"a": torch.ones(1, dtype=torch.complex64).conj()}, "'a' .* conjugate"),
    ],
)
def test_refuses_what_is_no_flat_dict_of_tensors(path: Path, value: Any, message: str) -> None:
    save(value, path)
    with pytest.raises(CheckpointError, match=message):
        read_pickle_header(path)


def test_refuses_other_formats(path: Path) -> None:
    for data, message in [
        (b"", "starts with b'' and was not written by torch.save"),
        (b"GGUF1234", "starts with b'GGUF1234'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (
            pickle.dumps({"a": 1}, 2),
            "is marked by dict, where torch.save writes 119547037146038801333356",
        ),
        (pickle.dumps(7, 2) * 3, "is marked by 7, where torch.save"),
        (pickle.dumps(pickles.STREAM_MAGIC, 2), "the pickle at byte 15 cannot be read"),
        (b"\x80\x02N", "the pickle at byte 0 cannot be read .* cut off"),
    ]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_pickle_header(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_pickle_header(path)


def test_refuses_the_tar_format(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(CheckpointError, match="tar format of the first PyTorch"):
        read_pickle_header(path)


def test_refuses_a_damaged_archive(path: Path) -> None:
    save({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"no readable directory at its end .* cut off"):
        read_pickle_header(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(CheckpointError, match=r"'archive/data\.pkl' is compressed"):
        read_pickle_header(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(CheckpointError, match=r"0 entries NAME/data\.pkl"):
        read_pickle_header(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", b"big")
    with pytest.raises(CheckpointError, match="byte order b'big'"):
        read_pickle_header(path)


def test_refuses_an_entry_given_twice_or_elsewhere(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(CheckpointError, match=r"'archive/data\.pkl' is there twice"):
        read_pickle_header(path)
    write_zip(path, b"\x80\x02}.", {"0": b"1234"})
    data = path.read_bytes()
    second = data.index(b"PK\x03\x04", 4)
    offset_field = data.index(b"PK\x01\x02") + 42
    for at in (second, offset_field):
        path.write_bytes(data[:at] + b"\xfe\xfe" + data[at + 2 :])
        with pytest.raises(CheckpointError, match="does not lie where the directory says"):
            read_pickle_header(path)


def stream(system: Any, keys: Any, tail: bytes) -> bytes:
    parts = [pickle.dumps(x, 2) for x in (pickles.STREAM_MAGIC, 1001, system)]
    return b"".join([*parts, one_view(4, 0, (4,), (1,)), pickle.dumps(keys, 2), tail])


@pytest.mark.parametrize(
    ("system", "keys", "tail", "message"),
    [
        ({"little_endian": False}, ["0"], b"", "little-endian"),
        ([], ["0"], b"", "little-endian"),
        ({"little_endian": True}, "0", b"", "list of storages is damaged"),
        ({"little_endian": True}, ["1"], b"\0" * 24, "storage '1' is not used"),
        ({"little_endian": True}, ["0"], b"\0" * 7, "storage '0' .* cut off"),
        ({"little_endian": True}, ["0"], struct.pack("<q", 4) + b"1", "'0' needs 16 bytes"),
        ({"little_endian": True}, ["0"], struct.pack("<q", -4) + b"1", "'0' needs -16 bytes"),
        ({"little_endian": True}, ["0"], struct.pack("<q", 1) + b"1234", "'a' expects 16 bytes"),
        ({"little_endian": True}, [], b"", "'a' needs storage '0' of 16 bytes"),
    ],
)
def test_refuses_a_damaged_stream(
    path: Path, system: Any, keys: Any, tail: bytes, message: str
) -> None:
    path.write_bytes(stream(system, keys, tail))
    with pytest.raises(CheckpointError, match=message):
        read_pickle_header(path)


def test_a_truncated_stream_is_an_error_at_every_length(path: Path) -> None:
    save({"a": torch.ones(2), "b": torch.ones(3)}, path, "stream")
    whole = path.read_bytes()
    assert len(read_pickle_header(path)) == 2
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            read_pickle_header(path)


def check_refs(refs: dict[str, TensorRef], file_bytes: int) -> None:
    for ref in refs.values():
        assert 0 <= ref.offset_bytes <= ref.offset_bytes + ref.size_bytes <= file_bytes
        assert len(read_tensor_bytes(ref)) == ref.dense_bytes


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32),
    num_changes=st.integers(1, 8),
)
def test_a_damaged_file_is_an_error_or_consistent(
    tmp_path: Path, form: str, seed: int, num_changes: int
) -> None:
    clean = tmp_path / f"{form}.bin"
    if not clean.exists():
        state = collections.OrderedDict(a=torch.arange(6.0).reshape(2, 3).T, b=torch.ones(2))
        save(state, clean, form)
    data = bytearray(clean.read_bytes())
    source = random.Random(seed)
    for _ in range(num_changes):
        data[source.randrange(len(data))] = source.randrange(256)
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        check_refs(read_pickle_header(damaged), len(data))
