"""Viewing and reading stored tensors, against the safetensors library and torch."""

import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hanok.checkpoint.files import TensorRef
from hanok.checkpoint.pickles import read_pickle_header
from hanok.checkpoint.safetensors import read_header
from hanok.errors import CheckpointError, UnsupportedError
from hanok.memory.tensors import DTYPES, Arena, MappedFiles, dtype_of, read_into, read_run

quick = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


@st.composite
def stored(draw: st.DrawFn) -> dict[str, Tensor]:
    kinds = st.tuples(SHAPES, st.sampled_from(list(DTYPES.values())))
    chosen = draw(st.lists(kinds, min_size=1, max_size=4))
    return {f"t{seed}": filled(*kind, seed) for seed, kind in enumerate(chosen)}


def written(path: Path, tensors: dict[str, Tensor]) -> dict[str, TensorRef]:
    save_file(tensors, path)
    return read_header(path)[0]


@quick
@given(tensors=stored())
def test_a_view_is_what_the_library_reads(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    refs = written(path, tensors)
    files = MappedFiles()
    with safe_open(path, "pt") as library:
        for name, tensor in tensors.items():
            expected = library.get_tensor(name)
            view = files.view(refs[name])
            assert view.dtype is dtype_of(refs[name]) is expected.dtype
            assert view.shape == expected.shape
            assert torch.equal(view, expected)
            assert torch.equal(view, tensor)


@quick
@given(tensors=stored(), target=st.sampled_from(FLOATS))
def test_reading_converts_as_torch_does(
    tmp_path: Path, tensors: dict[str, Tensor], target: torch.dtype
) -> None:
    refs = written(tmp_path / "model.safetensors", tensors)
    for name, tensor in tensors.items():
        found = torch.full(tensor.shape, 77, dtype=target)
        read_into(refs[name], found)
        assert torch.equal(found, tensor.to(target))


@quick
@given(tensors=stored())
def test_reading_a_run_takes_the_bytes_as_they_are(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    refs = written(tmp_path / "model.safetensors", tensors)
    for name, tensor in tensors.items():
        if tensor.numel():
            found = torch.empty_like(tensor)
            read_run(refs[name], found)
            assert torch.equal(found, tensor)


def test_a_run_spans_tensors_that_lie_together(tmp_path: Path) -> None:
    tensors = {"a": filled((3, 4), torch.float32, 0), "b": filled((2, 4), torch.float32, 1)}
    refs = written(tmp_path / "model.safetensors", tensors)
    assert refs["a"].offset_bytes + refs["a"].size_bytes == refs["b"].offset_bytes
    both = torch.cat([tensors["a"], tensors["b"]])
    assert torch.equal(MappedFiles().view(refs["a"], both.nbytes), both.flatten())
    found = torch.empty(5, 4)
    read_run(refs["a"], found)
    assert torch.equal(found, both)


def test_views_of_one_file_share_one_mapping_and_writing_to_one_leaves_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    ref = written(path, {"a": torch.zeros(4)})["a"]
    files = MappedFiles()
    first, second = files.view(ref), files.view(ref)
    assert first.data_ptr() == second.data_ptr()
    before = path.read_bytes()
    first.fill_(3)
    assert path.read_bytes() == before


def strided_cases() -> dict[str, Tensor]:
    base = filled((6, 8), torch.float32, 3)
    return {
        "transposed": base.t(),
        "column": base[:, 2],
        "every second": base[::2, 1::3],
        "expanded": base[0:1].expand(5, 8),
        "permuted": base.view(2, 3, 8).permute(2, 0, 1),
    }


@pytest.mark.parametrize("name", strided_cases())
@pytest.mark.parametrize("target", FLOATS)
def test_strided_tensors_of_a_pickle_are_put_in_order(
    tmp_path: Path, name: str, target: torch.dtype
) -> None:
    tensor = strided_cases()[name]
    path = tmp_path / "model.bin"
    torch.save({name: tensor}, path)
    ref = read_pickle_header(path)[name]
    assert ref.strides is not None
    assert torch.equal(MappedFiles().view(ref), tensor)
    found = torch.empty(tensor.shape, dtype=target)
    read_into(ref, found)
    assert torch.equal(found, tensor.to(target))


def test_what_was_forgotten_is_read_anew(tmp_path: Path) -> None:
    """Private changes go with the pages, so forgetting shows in the file's values coming back."""
    count = 5 * mmap.PAGESIZE // 4
    tensors = {"a": filled((count,), torch.float32, 0), "b": filled((64,), torch.float32, 1)}
    refs = written(tmp_path / "model.safetensors", tensors)
    files = MappedFiles()
    first, second = files.view(refs["a"]), files.view(refs["b"])
    first.fill_(7)
    second.fill_(7)
    files.forget(refs["a"], first.nbytes)
    # Pages that the run does not fill alone are kept: the ends of this one, and the neighbour.
    inside = slice(mmap.PAGESIZE // 4, count - mmap.PAGESIZE // 4)
    assert torch.equal(first[inside], tensors["a"][inside])
    assert (second == 7).all()
    files.forget(refs["b"], second.nbytes)
    assert (second == 7).all()


def test_a_file_that_ends_early_is_told_with_its_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ref = written(path, {"a": torch.zeros(100)})["a"]
    path.write_bytes(path.read_bytes()[:-150])
    message = rf"tensor a needs 400 bytes at offset {ref.offset_bytes}, .* after 250 of them"
    with pytest.raises(CheckpointError, match=message):
        read_into(ref, torch.empty(100))
    with pytest.raises(CheckpointError, match=message):
        read_into(ref, torch.empty(100, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=message):
        read_run(ref, torch.empty(100))


def test_a_dtype_without_arithmetic_is_refused_by_name(tmp_path: Path) -> None:
    ref = written(tmp_path / "model.safetensors", {"a": torch.zeros(4)})["a"]
    odd = replace(ref, dtype="F8_E4M3")
    for act in (lambda: dtype_of(odd), lambda: MappedFiles().view(odd)):
        with pytest.raises(UnsupportedError, match=r"tensor a is F8_E4M3.*BF16"):
            act()


@quick
@given(pieces=st.lists(st.tuples(SHAPES, st.sampled_from(FLOATS)), min_size=1, max_size=8))
def test_pieces_of_an_arena_do_not_overlap_and_are_aligned(
    pieces: list[tuple[tuple[int, ...], torch.dtype]],
) -> None:
    sizes = [torch.empty(shape, dtype=dtype).nbytes for shape, dtype in pieces]
    arena = Arena(sum(sizes), len(sizes))
    found = [arena.empty(*piece) for piece in pieces]
    for index, (tensor, (shape, dtype)) in enumerate(zip(found, pieces, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype is dtype
        assert not tensor.numel() or tensor.data_ptr() % 64 == 0
        tensor.fill_(index)
    assert all((tensor == index).all() for index, tensor in enumerate(found))
