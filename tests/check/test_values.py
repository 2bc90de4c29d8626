"""The values of weights: what one pass finds is what looking at every number finds."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from hanok.check import values as values_module
from hanok.check.values import TensorValues, same_bytes, scan_values, scanned_bytes
from hanok.checkpoint.files import open_checkpoint
from hanok.checkpoint.safetensors import TensorRef, read_header
from hanok.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
ODD = [float("nan"), float("inf"), float("-inf")]


def refs_of(folder: Path, tensors: dict[str, Tensor]) -> list[TensorRef]:
    save_file(tensors, folder / "model.safetensors")
    return list(read_header(folder / "model.safetensors")[0].values())


def scan(refs: list[TensorRef], threads: int = 2) -> dict[str, TensorValues]:
    names = {ref.name for ref in refs if len(ref.shape) > 1}
    return scan_values(refs, with_rows=names, with_twins=names, threads=threads)


def plainly(tensor: Tensor) -> TensorValues:
    """Look at every number, in the widest dtype."""
    wide = tensor.double()
    bad = (~torch.isfinite(wide)).flatten().nonzero().view(-1)
    found = TensorValues(
        num_not_finite=len(bad), first_not_finite=int(bad[0]) if len(bad) else None
    )
    seen: dict[bytes, int] = {}
    for number, row in enumerate(tensor.reshape(-1, tensor.shape[-1])):
        values = row.double()
        if bool((values == values[0]).all()):
            (found.zero_rows if values[0] == 0 else found.constant_rows).append(number)
        data = row.contiguous().view(torch.uint8).numpy().tobytes()
        if number not in found.zero_rows:
            if data in seen:
                found.twins.append((seen[data], number))
            seen.setdefault(data, number)
    found.twins.sort()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(data=st.data(), rows=st.integers(1, 70), columns=st.integers(16, 80))
def test_one_pass_finds_what_looking_at_each_number_finds(
    dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    rows: int,
    columns: int,
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    tensor = torch.randn((rows, columns), generator=generator)
    for _ in range(data.draw(st.integers(0, 3))):
        value = data.draw(st.sampled_from(ODD))
        if dtype == torch.float8_e4m3fn and math.isinf(value):
            continue  # it has no infinity
        tensor[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))] = value
    for value in data.draw(st.lists(st.sampled_from([0.0, -0.0, 0.5]), max_size=3)):
        tensor[data.draw(st.integers(0, rows - 1))] = value
    for _ in range(data.draw(st.integers(0, 2))):
        first, second = (data.draw(st.integers(0, rows - 1)) for _ in range(2))
        tensor[second] = tensor[first]
    written = tensor.to(dtype)
    refs = refs_of(tmp_path_factory.mktemp("values"), {"x": written})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values_module, "CHUNK_BYTES", 2048)
        found = scan(refs)["x"]
    found.twins.sort()
    assert found == plainly(written)


def test_numbers_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    large = {"x": torch.full((4, 64), 3e38), "y": torch.full((100,), 60000.0, dtype=torch.float16)}
    found = scan(refs_of(tmp_path, large))
    assert found["x"].num_not_finite == found["y"].num_not_finite == 0


def test_rows_that_agree_where_they_are_probed_are_looked_at_whole(tmp_path: Path) -> None:
    almost = torch.zeros(3, 64)
    almost[0, 5], almost[1, 63] = 1.0, 1.0  # between the probed columns
    found = scan(refs_of(tmp_path, {"x": almost}))["x"]
    assert found.zero_rows == [2]
    assert found.twins == []


def test_integers_are_not_read_and_rows_longer_than_a_chunk_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = torch.ones(2, 4096)
    long[1, 4000] = float("nan")
    refs = refs_of(tmp_path, {"codes": torch.ones(4, 64, dtype=torch.uint8), "long": long})
    monkeypatch.setattr(values_module, "CHUNK_BYTES", 1024)
    found = scan(refs)
    assert found.keys() == {"long"}
    assert found["long"].first_not_finite == 4096 + 4000
    assert scanned_bytes(refs) == 2 * 4096 * 4


def test_views_of_a_pickle_are_read(tmp_path: Path) -> None:
    base = torch.randn(32, 48)
    base[3] = 0.0
    torch.save({"x": base.T, "y": base}, tmp_path / "pytorch_model.bin")
    refs = list(open_checkpoint(tmp_path, needs_config=False).tensors.values())
    found = scan(refs)
    assert found["y"].zero_rows == [3]
    assert found["x"].zero_rows == []


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    refs = refs_of(tmp_path, {"x": torch.ones(64, 64)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"'x' ends after .* was changed while it was checked"
    ):
        scan(refs)


def test_the_number_of_threads_is_as_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    scan(refs_of(tmp_path, {"x": torch.ones(64, 64)}), threads=3)
    assert torch.get_num_threads() == before


def test_bytes_are_compared_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "CHUNK_BYTES", 64)
    first = torch.randn(40)
    second = first.clone()
    second[-1] += 1
    a, b, c = refs_of(tmp_path, {"a": first, "b": first.clone(), "c": second})
    assert same_bytes(a, b)
    assert not same_bytes(a, c)
