"""benchmarks/bench_repeats.py: what it counts as a false change."""

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
        yield importlib.import_module("bench_repeats")
    for name in ("bench_repeats", "measure"):
        sys.modules.pop(name, None)


def test_pairs_with_a_change_are_counted_against_the_program(program: ModuleType) -> None:
    def pair(*false_changes: str) -> object:
        return program.Pair(
            rows=4, false_changes=false_changes, machine=(0.98, 1.03), largest=1.081
        )

    quiet = [pair() for _ in range(9)]
    good = program.report([*quiet, pair("sdpa: faster")], threads=2)
    assert "9 of 10 | yes" in good
    assert "sdpa: faster" in good
    assert "0.980–1.030" in good
    bad = program.report([*quiet[:8], pair("a: slower"), pair("b: faster")], threads=2)
    assert "8 of 10 |  no" in bad
