"""Rows of tensors in a file, beside torch's reading and rounding of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hanok.checkpoint import rows
from hanok.checkpoint.files import open_checkpoint
from hanok.checkpoint.rows import RowEdit, read_row, rewrite, row_bytes, to_bytes


@settings(max_examples=200)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_numbers_are_rounded_as_torch_rounds_them(numbers: list[float]) -> None:
    wide = torch.tensor(numbers, dtype=torch.float32)
    for dtype, name in ((torch.float32, "F32"), (torch.bfloat16, "BF16")):
        expected = wide.to(dtype).view(torch.int8)
        assert torch.equal(
            torch.frombuffer(bytearray(to_bytes(numbers, name)), dtype=torch.int8), expected
        )
    halves = [number for number in numbers if abs(number) < 60000] or [0.0]
    expected = torch.tensor(halves, dtype=torch.float32).half().view(torch.int8)
    assert torch.equal(
        torch.frombuffer(bytearray(to_bytes(halves, "F16")), dtype=torch.int8), expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_read_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"a": torch.ones(3), "rows": rows}, tmp_path / "model.safetensors")
    ref = open_checkpoint(tmp_path, needs_config=False).tensors["rows"]
    assert read_row(ref, 3) == rows[3].double().tolist()
    assert row_bytes(ref) == 7 * dtype.itemsize


@settings(max_examples=60)
@given(
    changed=st.sets(st.integers(0, 14), max_size=8),
    num_more=st.integers(0, 15),
    fill_bytes=st.sampled_from([1, 30, 2**20]),
)
def test_rows_are_changed_and_follow(
    changed: set[int], num_more: int, fill_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "model.safetensors"
    old = torch.arange(15.0).view(5, 3)
    save_file({"a": torch.ones(2), "rows": old, "z": torch.zeros(3)}, path, metadata={"by": "us"})
    num_rows = 5 + num_more
    new = {index: torch.full((3,), -1.0 - index) for index in changed if index < num_rows}
    edit = RowEdit(
        tensor=open_checkpoint(path, needs_config=False).tensors["rows"],
        num_rows=num_rows,
        rows={index: to_bytes(row.tolist(), "F32") for index, row in new.items()},
        filler=to_bytes([9.0, 9.0, 9.0], "F32"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "FILL_BYTES", fill_bytes)
        result = path.with_name("new.safetensors")
        with result.open("xb") as file:
            size = rewrite(path, file, [edit])
    assert result.stat().st_size == size
    expected = torch.cat([old, torch.full((num_more, 3), 9.0)])
    for index, row in new.items():
        expected[index] = row
    found = load_file(result)
    assert torch.equal(found["rows"], expected)
    assert torch.equal(found["a"], torch.ones(2))
    assert torch.equal(found["z"], torch.zeros(3))
