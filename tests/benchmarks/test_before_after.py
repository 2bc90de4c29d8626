"""What the comparison of two versions makes of its numbers."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("before_after")
    for name in ("before_after", "measure"):
        sys.modules.pop(name, None)


def test_rounds_begin_with_one_and_the_other(program: ModuleType) -> None:
    assert program.turns(3) == [("before", "after"), ("after", "before"), ("before", "after")]


def test_each_kind_of_figure_has_its_bound(program: ModuleType) -> None:
    found = {
        name: {"decoding": [speed], "start to first token, s": [start], "hanok --help, s": [shown]}
        for name, speed, start, shown in (("before", 10, 1.0, 0.2), ("after", 9.7, 1.02, 0.31))
    }
    rows = program.rows_of("int8", found)
    assert [(str(row[0]), str(row[-2]), row[-1]) for row in rows] == [
        ("int8: decoding", "≥ 0.98", "no"),
        ("int8: start to first token, s", "≤ 1.03", "yes"),
        ("int8: hanok --help, s", "≤ 0.3", "no"),
    ]
    assert str(rows[0][3]) == "0.970"
