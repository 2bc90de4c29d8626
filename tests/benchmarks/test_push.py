"""The benchmark of pushes, on files that take no time: what it counts. No test looks at a speed."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield importlib.import_module("push")
    for name in ("push", "measure"):
        sys.modules.pop(name, None)


def test_what_is_pushed_and_what_a_kill_costs(program: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    program.make_files(folder, 400_000)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) == 400_000
    rows = {
        program.COPY: [program.copy_once(folder, tmp_path)],
        program.STORE: [program.push_once(folder, tmp_path, stores=True, connections=1)],
    }
    assert "share of the plain copy's speed" in program.speed_table(rows, 400_000)
    row = program.kill_once(folder, tmp_path, 150_000)
    assert 0 <= row["again"] <= 100_000  # a file of one part
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
