"""The comparison of what is learnt: both sides on the bundled model, for a few steps, and its report."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    *("learning", "learning_hanok", "learning_peft"),
    *("checkpoints", "corpus", "corpus.harbour", "measure"),
)


@pytest.fixture(scope="module")
def programs() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(
            **{name.replace(".", "_"): importlib.import_module(name) for name in NAMES}
        )
    for name in NAMES:
        sys.modules.pop(name, None)


def in_this_process(
    programs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run both sides here and not in processes of their own: importing takes longer than learning."""

    def run_cold(command: list[str], **_: Any) -> Any:
        monkeypatch.setattr(sys, "argv", command[1:])
        capsys.readouterr()
        getattr(programs, Path(command[1]).stem).main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(programs.learning.measure, "run_cold", run_cold)


@pytest.mark.filterwarnings("ignore")  # of PEFT's
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_both_sides_learn_the_same(
    programs: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    output = tmp_path / "report.md"
    words = ["--quick", "--kinds", kind, "--epochs", "2", "--documents", "9", "--held-out", "2"]
    arguments = ["learning.py", *words, "--output", str(output), "--threads", "1"]
    in_this_process(programs, monkeypatch, capsys)
    for _ in range(2):  # the second time nothing is computed
        monkeypatch.setattr(sys, "argv", arguments)
        programs.learning.main()
    (line,) = map(json.loads, output.with_suffix(".jsonl").read_text().splitlines())
    ours, theirs = line["sides"].values()
    assert len(ours["losses"]) == line["options"]["max_steps"] >= 6
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["rates"] == pytest.approx(theirs["rates"])
    steps, losses = zip(*ours["held_out"], strict=True)
    assert losses == pytest.approx([loss for _, loss in theirs["held_out"]], rel=1e-5)
    assert losses[-1] < losses[0] - 1
    assert (steps[0], steps[-1]) == (0, len(ours["losses"]))
    page = output.read_text()
    assert f"| bundled-{kind}-0 |" in page
    picture = ElementTree.fromstring((tmp_path / f"report-bundled-{kind}-0.svg").read_text())
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2


def line_of(*last: float, first: float = 4.0) -> dict[str, Any]:
    sides = {
        side: {"held_out": [[0, first], [2, loss]], "losses": [first, loss], "rates": [1.0, 1.0]}
        for side, loss in zip(("hanok", "transformers + peft"), last, strict=True)
    }
    return {"lesson": "x", "sides": sides}


@pytest.mark.parametrize(
    ("last", "is_met"), [((2.01, 2.0), True), ((2.03, 2.0), False), ((3.9, 3.9), False)]
)
def test_what_differs_or_is_not_learnt_is_not_met(
    programs: SimpleNamespace, last: tuple[float, float], is_met: bool
) -> None:
    table = programs.learning.summary_table([line_of(*last)])
    assert table.splitlines()[-1].split("|")[-2].strip() == ("yes" if is_met else "no")


def test_a_side_that_fails_is_said(
    programs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a command ended with status 1:\nValueError: no")

    monkeypatch.setattr(programs.learning.measure, "run_cold", fails)
    output = tmp_path / "report.md"
    words = ["--quick", "--kinds", "full", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["learning.py", *words])
    programs.learning.main()
    page = output.read_text()
    assert "Not computed: ValueError: no" in page
    assert "not computed |" in page
