"""What the comparison of two versions makes of its numbers."""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("before_after")
    for name in ("before_after", "checkpoints", "measure"):
        sys.modules.pop(name, None)


class FakeTree:
    """A tree whose processes take no time: what it was asked is kept in a list shared with others."""

    def __init__(self, name: str, asked: list[tuple[str, str]], tokens: list[int]) -> None:
        self.commit = name
        self._name, self._asked, self._tokens = name, asked, tokens

    def seconds(self, *arguments: str) -> float:
        self._asked.append((self._name, arguments[0]))
        return 0.2

    def load_and_ask(self, asked: Mapping[str, Any], threads: int) -> dict[str, Any]:
        self._asked.append((self._name, str(asked["quant"])))
        questions = [[0.5, 2.0] for _ in asked["questions"]]
        row = {"first_token_s": 1.0, "peak_bytes": 10**6, "tokens": self._tokens}
        return {**row, "questions": questions}


def compared(
    program: ModuleType, tokens_after: list[int], num_rounds: int = 2
) -> tuple[Any, list[tuple[str, str]]]:
    asked: list[tuple[str, str]] = []
    trees = {
        "before": FakeTree("before", asked, [1, 2]),
        "after": FakeTree("after", asked, tokens_after),
    }
    guard = program.measure.Guard(patience_s=0.0, attempts=1, limit=100.0)
    found = program.Comparison(trees, guard, lambda row: None)
    options = program.options_of(["earlier", "--quick", "--kinds", "bfloat16", "int4"])
    for order in program.rounds(num_rounds, 1e9):
        found.run_round(order, options, Path("checkpoint"))
    return found, asked


def test_trees_run_one_after_the_other_and_who_is_first_alternates(program: ModuleType) -> None:
    _, asked = compared(program, [1, 2])
    for number, order in enumerate((["before", "after"], ["after", "before"])):
        of_round = asked[number * 8 : number * 8 + 8]
        assert [tree for tree, _ in of_round] == order * 4
        what = [name for _, name in of_round]
        assert what[::2] == what[1::2] == ["--help", "generate", "None", "int4"]
    assert len(asked) == 16


def test_every_figure_has_a_value_of_each_round_and_tree(program: ModuleType) -> None:
    found, _ = compared(program, [1, 2], num_rounds=3)
    assert len(found.figures) == 2 + 2 * 6
    for figure in found.figures.values():
        assert {name: len(values) for name, values in figure.values.items()} == {
            "before": 3,
            "after": 3,
        }
        assert figure.cells()[-1] == "yes"


def test_other_tokens_are_seen(program: ModuleType) -> None:
    assert "bfloat16 equal, int4 equal" in compared(program, [1, 2])[0].notes()
    assert "bfloat16 DIFFER, int4 DIFFER" in compared(program, [1, 3])[0].notes()


class Clock:
    """A clock that goes on by what is added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("budget_s", "lasting", "expected"),
    [(10.0, (2, 4, 2, 1), 3), (9.9, (2, 4, 2, 1), 2), (1.0, (5, 5), 1), (99.0, (1, 1), 2)],
)
def test_no_round_begins_that_would_not_end_within_the_budget(
    program: ModuleType, budget_s: float, lasting: tuple[int, ...], expected: int
) -> None:
    clock, num_rounds = Clock(), 0
    for _ in program.rounds(len(lasting), budget_s, clock):
        clock.now += lasting[num_rounds]
        num_rounds += 1
    assert num_rounds == expected


def test_a_bound_is_kept_or_missed_by_the_whole_interval_alone(program: ModuleType) -> None:
    assert [program.SPEED.verdict(*item) for item in ((0.98, 1.1), (0.9, 1.1), (0.9, 0.97))] == [
        "yes",
        "open",
        "no",
    ]
    assert [program.START.verdict(*item) for item in ((0.9, 1.03), (0.9, 1.1), (1.04, 1.1))] == [
        "yes",
        "open",
        "no",
    ]


def figure(program: ModuleType, bound: Any, before: list[float], after: list[float]) -> Any:
    return program.Figure(bound=bound, values={"before": before, "after": after})


def test_what_slows_a_whole_round_is_in_no_ratio(program: ModuleType) -> None:
    found = figure(program, program.SPEED, [10.0, 1.0, 5.0], [20.0, 2.0, 10.0]).ratio()
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_rounds_that_disagree_decide_nothing(program: ModuleType) -> None:
    """Processes whose speed differs by chance look alike within a round and not between rounds."""
    assert figure(program, program.SPEED, [1.0, 1.0], [1.78, 0.6]).cells()[-1] == "open"
    assert figure(program, program.SPEED, [1.0], [1.78]).cells()[-1] == "open"


def test_the_help_is_held_to_its_seconds(program: ModuleType) -> None:
    assert figure(program, program.HELP, [0.1, 0.1], [0.28, 0.3]).cells()[-1] == "yes"
    assert figure(program, program.HELP, [0.1, 0.1], [0.28, 0.31]).cells()[-1] == "open"
    assert figure(program, program.HELP, [0.9, 0.9], [0.31, 0.33]).cells()[-1] == "no"


def test_there_is_no_ratio_to_nothing(program: ModuleType) -> None:
    assert figure(program, program.MEMORY, [0.0, 0.0], [0.0, 0.0]).cells()[-1] == "yes"
    cells = figure(program, program.MEMORY, [0.0, 2.0], [2.0, 2.0]).cells()
    assert cells[-3:] == ("unknown", program.MEMORY, "open")


def test_rates_count_what_was_computed_in_the_time(program: ModuleType) -> None:
    asked = {item.name: item for item in program.questions(program.options_of(["earlier"]))}
    assert len(asked) == 4
    assert asked["decode of 8 sequences"].tokens_per_s(9.0, 2.0) == 8 * (program.TOKENS - 1) / 2
    assert asked["decode of 1 sequence"].tokens_per_s(9.0, 2.0) == (program.TOKENS - 1) / 2
    for name in ("prefill of 1 sequence", "prefill of 8 sequences"):
        assert asked[name].tokens_per_s(2.0, 9.0) == program.LONG_PROMPT / 2


def test_a_process_that_imported_another_tree_is_refused(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "this" / "src" / "hanok" / "__init__.py"

    def answer(command: list[str], **_: Any) -> dict[str, Any]:
        assert json.loads(command[-1]) == {}
        return {"module": str(module)}

    monkeypatch.setattr(program.measure, "run_cold", answer)
    assert program.Tree(tmp_path / "this").load_and_ask({}, 1)["module"] == str(module)
    with pytest.raises(RuntimeError, match="imported in place of"):
        program.Tree(tmp_path / "other").load_and_ask({}, 1)
