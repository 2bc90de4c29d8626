"""The GPU benchmark without a GPU: what it makes, what it counts, what it says."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hanok.quant.recipe import read_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("gpu")
    for name in ("gpu", "measure", "checkpoints"):
        sys.modules.pop(name, None)


def test_without_a_gpu_it_says_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU: torch finds no CUDA device"):
        gpu.main()


def test_the_shape_is_that_of_llama_8b(gpu: ModuleType) -> None:
    config = gpu.read_config(gpu.LLAMA_8B.config(), "8b")[1]
    assert config.num_parameters() == 8_030_261_248  # counted from its published sizes


@pytest.mark.parametrize("quant", [None, "int8:group_size=32", "int4"])
def test_contestants_are_made_and_measured(gpu: ModuleType, quant: str | None) -> None:
    recipe = None if quant is None else read_recipe(quant)
    decoder = gpu.make_decoder(gpu.GPU_SHAPES["tiny"], recipe, CPU)
    parameters = decoder.config.num_parameters()
    embedding = 512 * 64
    read = gpu.bytes_per_token(decoder)
    if quant is None:
        assert read == 2 * (parameters - embedding)
    else:
        assert read < 1.5 * (parameters - embedding)
    result = gpu.measure_ours("x", decoder, prompt=3, tokens=2, runs=2)
    assert len(result.decode) == 2
    assert min(*result.decode, *result.call) > 0


def test_transformers_is_measured_with_as_many_bytes(gpu: ModuleType) -> None:
    shape = gpu.GPU_SHAPES["tiny"]
    theirs = gpu.measure_transformers(shape, CPU, prompt=3, tokens=2, runs=1)
    assert theirs.bytes_per_token == gpu.bytes_per_token(gpu.make_decoder(shape, None, CPU))


def test_the_report_says_what_was_asked_and_measured(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])

    def result(name: str, size: int, decode: float, call: float) -> object:
        return gpu.Result(name=name, bytes_per_token=size, decode=(decode,), call=(call,))

    results = [
        result("bfloat16", 16 * 10**9, 100.0, 1000.0),
        result("int8", 8 * 10**9, 150.0, 1000.0),
        result("int4", 4 * 10**9, 260.0, 950.0),
    ]
    page = gpu.report(results, 1500.0, [("x", 0.5, 1.0), ("y", 0.9, 1.0)], "Some GPU")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    met = {row[0]: row[1:] for row in cells if len(row) == 4}
    assert met["bfloat16 decoding, share of the copy bandwidth"] == ["≥ 0.8", "1.07", "yes"]
    assert met["int8 decoding, times our bfloat16"] == ["≥ 1.6", "1.50", "no"]
    assert met["int4 decoding, times our bfloat16"] == ["≥ 2.5", "2.60", "yes"]
    assert met["int4, 256 tokens a call, times our bfloat16"] == ["≥ 0.9", "0.95", "yes"]
    assert "1600 (107%, 53%)" in page
    assert "90% of what rounding allows (y)" in page
