"""The measurement of training, on shapes that take no time: what it asks, counts, keeps and says.

No test looks at a speed. The programs import one another as scripts do, from their own folder.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    *("train", "train_worker", "train_hanok", "train_peft", "train_products", "train_trainer"),
    *("before_after", "checkpoints", "corpus", "corpus.harbour", "engine_worker", "generate"),
    "measure",
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


@pytest.fixture(scope="module")
def tiny(programs: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = programs.checkpoints.SHAPES["tiny"]
    found: Path = programs.checkpoints.make_checkpoint(shape, tmp_path_factory.mktemp("tiny"))
    return found


def asked_of(programs: SimpleNamespace, model: Path, **settings: Any) -> Any:
    threads = torch.get_num_threads()
    return programs.train_worker.Asked(
        model=str(model), threads=threads, **{"pack_tokens": 20, "steps": 2, **settings}
    )


# What each program does


@pytest.mark.filterwarnings("ignore")  # of PEFT's
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_both_sides_compute_the_same_losses_of_the_same_tokens(
    programs: SimpleNamespace, tiny: Path, share: float
) -> None:
    asked = asked_of(programs, tiny, target_share=share)
    rows = {}
    for name in ("train_hanok", "train_peft", "train_products"):
        log = programs.train_worker.Log()
        details = getattr(programs, name).train(asked, log)
        rows[name] = log.result(asked.warmup) | details
        assert [step["tokens"] for step in log.steps] == [20] * 3
        assert [step["targets"] for step in log.steps] == [19 if share == 1 else 8] * 3
    ours, theirs = rows["train_hanok"], rows["train_peft"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
    assert "using" in ours["kernels"] or "not" in ours["kernels"]
    # Weights of a layer: q, k, v of 4, 2, 2 heads of 16, o, three of the MLP; all forward and backward
    # but the first layer's q, k, v backward; the head for targets only.
    qkv, others = 64 * 128, 64 * 64 + 3 * 64 * 160
    products = 20 * (2 * (qkv + others) * 2 - qkv) + 2 * (19 if share == 1 else 8) * 512 * 64
    assert rows["train_products"]["gflop_per_step"] == pytest.approx(2 * products / 1e9)


def test_quantized_bases_learn_what_the_float_one_does(
    programs: SimpleNamespace, tiny: Path
) -> None:
    losses = []
    for settings in ({}, {"quant": "int8"}, {"dtype": "bfloat16", "quant": "nf4"}):
        log = programs.train_worker.Log()
        programs.train_hanok.train(asked_of(programs, tiny, steps=1, **settings), log)
        losses.append(log.steps[0]["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-2)
    assert len(set(losses)) == 3


def test_the_trainer_counts_tokens_without_padding(
    programs: SimpleNamespace, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="the package accelerate is not installed")
    from transformers import AutoTokenizer

    material = programs.train.Material(programs.train.options_of(["--folder", str(tmp_path)]))
    path = material.rows("bundled")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    settings = {"is_full": True, "batch_size": 2, "steps": 1, "pack_tokens": 512}
    model = material.model("bundled")
    asked = asked_of(programs, model, rows=str(path), **settings)
    log = programs.train_worker.Log()
    programs.train_trainer.train(asked, log)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    rows = programs.train_worker.read_rows(asked.rows)
    tokens = sum(len(tokenizer(row["text"]).input_ids) + 1 for row in rows)
    assert sum(step["tokens"] for step in log.steps) == tokens  # an end token each
    assert all(2 < step["loss"] < 12 for step in log.steps)


def test_rates_are_those_of_all_measured_steps(programs: SimpleNamespace) -> None:
    log = programs.train_worker.Log(row={"load_peak_gib": 1e9, "loaded_gib": 1.0})
    for tokens, seconds in ((1000, 50.0), (10, 1.0), (30, 3.0)):
        log.end(tokens=tokens, targets=tokens - 1, loss=float(tokens), seconds=seconds)
    row = log.result(1)
    assert row["tokens_per_s"] == 10
    assert (row["num_steps"], row["tokens_per_step"], row["targets_per_step"]) == (2, 20, 19)
    assert (row["first_loss"], row["last_loss"], row["num_tokens"]) == (1000, 30, 1040)
    assert row["peak_gib"] == 1e9
    with pytest.raises(SystemExit, match="none is left"):
        log.result(3)


# The rows, and their report


def options_of(programs: SimpleNamespace, folder: Path, *words: str) -> Any:
    output = folder / "report.md"
    more = ["--quick", "--folder", str(folder), "--output", str(output), "--threads", "1"]
    return programs.train.options_of([*more, *words])


def test_every_demand_is_about_contestants_of_its_row(programs: SimpleNamespace) -> None:
    for row in programs.train.rows().values():
        names = [item.name for item in row.contestants]
        assert len(set(names)) == len(names)
        assert {demand.first for demand in row.demands} <= set(names)
        assert {demand.second for demand in row.demands} <= set(names)
        assert row.demands or row.plans
        for item in row.contestants:
            assert (BENCHMARKS / item.program).is_file()


def result(**values: Any) -> dict[str, Any]:
    row = {"tokens_per_s": 10.0, "tokens_per_cpu_s": 5.0, "peak_gib": 2.0, "steps_peak_gib": 1.5}
    row |= {"tokens_per_step": 32.0, "targets_per_step": 31.0, "num_steps": 1}
    return row | {"first_loss": 6.0, "last_loss": 5.0} | values


def answering(
    monkeypatch: pytest.MonkeyPatch, programs: SimpleNamespace, asked: list[tuple[str, Any]]
) -> None:
    """Let processes end at once: hanok's twice as fast, in half the memory."""

    def run_cold(command: list[str], **how: Any) -> dict[str, Any]:
        name = Path(command[1]).stem
        asked.append((name, json.loads(command[2]) | {"environment": dict(how["environment"])}))
        faster = {"tokens_per_s": 20.0, "tokens_per_cpu_s": 10.0, "peak_gib": 1.0}
        return result(**(faster if name == "train_hanok" else {}))

    monkeypatch.setattr(programs.train.measure, "run_cold", run_cold)


def cells(page: str) -> dict[str, list[str]]:
    """Return the rows of all tables of a page by their first cell."""
    lines = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def main(
    programs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, options: Any, *words: str
) -> str:
    more = ["--quick", "--folder", str(options.folder), "--output", str(options.output)]
    monkeypatch.setattr(sys, "argv", ["train.py", *more, *words])
    programs.train.main()
    page: str = options.output.read_text()
    return page


def test_rows_are_measured_one_by_one_and_never_twice(
    programs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []
    answering(monkeypatch, programs, asked)
    options = options_of(programs, tmp_path)
    page = main(programs, monkeypatch, options, "--rows", "masked")
    assert [name for name, _ in asked] == ["train_peft", "train_hanok", "train_hanok", "train_peft"]
    assert {item["target_share"] for _, item in asked} == {0.4}
    assert {(item["pack_tokens"], item["steps"]) for _, item in asked} == {(32, 1)}
    assert cells(page)["tokens/s: hanok float32 / peft float32"][-2:] == ["≥ 1.4 ×", "yes"]
    assert page.count("\n## ") == 1

    main(programs, monkeypatch, options, "--rows", "masked")
    assert len(asked) == 4
    page = main(programs, monkeypatch, options, "--rows", "nf4-avx2")
    assert page.count("\n## ") == 2
    assert [item["environment"]["HANOK_ISA"] for _, item in asked[4:]] == ["avx2"] * 4
    assert [item["quant"] for _, item in asked[4:]] == [None, "nf4", "nf4", None]
    assert cells(page)["peak memory: hanok nf4 / hanok bfloat16"][-1] == "no"

    page = main(programs, monkeypatch, options, "--rows", "masked", "--runs", "3")
    assert [name for name, _ in asked[8:]] == ["train_peft", "train_hanok"]
    assert "3 rounds; 0 of 6 runs" in page
    main(programs, monkeypatch, options, "--rows", "masked", "--again")
    assert len(asked) == 14
    lines = list(map(json.loads, options.output.with_suffix(".jsonl").read_text().splitlines()))
    assert sum(line.get("row") == "masked" for line in lines) == 4
    assert sum(line.get("row") == "nf4-avx2" for line in lines) == 4


def test_what_cannot_be_measured_is_said_and_the_next_row_is(
    programs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []
    answering(monkeypatch, programs, asked)
    options = options_of(programs, tmp_path)
    page = main(programs, monkeypatch, options, "--rows", "chat", "all-targets")
    assert "Not measured to the end: no trl: name a Python that has it by --trl-python" in page
    assert cells(page)["tokens/s: hanok float32 / products float32"][-1] == "yes"
    python = tmp_path / "python"
    words = ["--rows", "chat", "--trl-python", str(python)]
    page = main(programs, monkeypatch, options, *words)
    assert "Not measured to the end: no conversations" in page

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a command ended with status 1:\nImportError: no module x")

    monkeypatch.setattr(programs.train.measure, "run_cold", fails)
    page = main(programs, monkeypatch, options, "--rows", "all-targets", "--runs", "3")
    assert "2 rounds; " in page
    assert "Not measured to the end: ImportError: no module x" in page


def test_conversations_are_read_alike_by_both_sides(
    programs: SimpleNamespace, tmp_path: Path
) -> None:
    """The checkpoint has a tokenizer, and hanok learns the answers of the rows alone."""
    rows = [
        {"instruction": "Say it.", "input": "", "output": "It."},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    chat = tmp_path / "alpaca.json"
    chat.write_text(json.dumps(rows))
    options = options_of(programs, tmp_path, "--chat", str(chat), "--trl-python", "python")
    material = programs.train.Material(options)
    (item,) = (c for c in programs.train.rows()["chat"].contestants if c.name == "hanok float32")
    asked = programs.train.asked_of(item, material, options)
    found = programs.train_worker.read_rows(asked.rows)
    questions = sorted(row["prompt"][0]["content"] for row in found)
    assert questions == ["Add.\n1 and 2", "Say it."]
    log = programs.train_worker.Log()
    programs.train_hanok.train(
        programs.train_worker.Asked(**{**asdict(asked), "warmup": 0, "threads": 1}), log
    )
    (step,) = log.steps
    assert 0 < step["targets"] < step["tokens"]


def test_plans_are_compared_with_what_was_measured(programs: SimpleNamespace) -> None:
    row = programs.train.rows()["plan"]
    measured = {"close": (2.0, 1.95), "far": (2.0, 1.8)}
    rounds = {
        name: [result(peak_gib=peak, planned_gib=plan)] for name, (peak, plan) in measured.items()
    }
    table = cells(programs.train.demands_table(row, rounds))
    assert table["close: measured / planned (1.95 GiB)"] == ["1.03", "0.95 to 1.05", "yes"]
    assert table["far: measured / planned (1.80 GiB)"] == ["1.11", "0.95 to 1.05", "no"]


def test_a_round_that_would_not_end_in_time_does_not_begin(programs: SimpleNamespace) -> None:
    guard = programs.measure.Guard(limit=1e9, patience_s=0.0, attempts=1, sample_s=0.0)
    taken: list[str] = []

    def action(name: str) -> Any:
        return lambda: taken.append(name) or {}

    actions = {name: action(name) for name in "ab"}
    programs.measure.interleave(actions, runs=3, guard=guard, budget_s=0.0)
    assert taken == ["a", "b"]
    taken.clear()
    programs.measure.interleave(actions, runs=3, guard=guard, done=1)
    assert taken == ["b", "a", "a", "b"]


# The texts


def test_reports_are_the_same_every_time_and_differ(programs: SimpleNamespace) -> None:
    harbour = programs.corpus_harbour
    texts = harbour.texts(400)
    assert texts == harbour.texts(400)
    assert len(set(texts)) == 400
    assert texts[7] == harbour.text(7) != harbour.text(7, seed=1)
    for text in texts:
        assert text.startswith("Harbour report, ")
        assert text.endswith("Keep a dry rope.")
        assert ("Nobody went out." in text) == ("doors shut" in text)
