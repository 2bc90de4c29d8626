"""The measurement of `hanok check`: both sides read the same files, and ratios are of one state."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import hanok

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("check")
    for name in ("check", "checkpoints", "measure", "tokens"):
        sys.modules.pop(name, None)


def test_both_sides_run_on_the_same_folder(program: ModuleType, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hanok.BUNDLED, tmp_path / "model"))
    actions = program.actions_of(folder, 1)
    rows = {
        name: [action()] for name, action in actions.items() if not name.startswith(program.COMMAND)
    }
    assert all(row["s"] > 0 for found in rows.values() for row in found)
    text = program.table(rows, 1000)
    assert text.count("\n") == 1 + len(rows)


def test_an_unsound_folder_is_not_measured(program: ModuleType, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hanok.BUNDLED, tmp_path / "model"))
    (folder / "config.json").write_text("{")
    with pytest.raises(RuntimeError, match="is not sound"):
        program.check(folder, values=False, threads=1)


def test_ratios_are_to_reading_in_the_same_state(program: ModuleType) -> None:
    rows = {
        f"{name}, {state}": [{"s": seconds, "grown_bytes": 0.0}]
        for name, state, seconds in (
            (program.READ, "cached", 1.0),
            (program.CHECK, "cached", 1.5),
            (program.READ, "from disk", 10.0),
            (program.CHECK, "from disk", 11.0),
        )
    }
    lines = program.table(rows, 10**9).splitlines()[2:]
    ratios = [line.split("|")[4].strip() for line in lines]
    assert [float(ratio.split()[0]) for ratio in ratios] == [1.0, 1.5, 1.0, 1.1]
