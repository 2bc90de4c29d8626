"""The GPU program without a GPU: a dry run of all of it, and what it makes of kernels that are wrong."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hanok.attention.base import reference as attention_reference
from hanok.quant.base import QuantizedWeight, reference
from hanok.quant.int4 import Int4
from hanok.quant.recipe import read_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    *("gpu", "gpu_checks", "gpu_contestants", "gpu_interpreter", "gpu_parts", "gpu_report"),
    *("gpu_training", "gpu_workers", "measure", "checkpoints"),
)
CPU = torch.device("cpu")
TINY = {"shape": "tiny", "prompt": 3, "tokens": 2, "call_tokens": 8, "copy_bytes": 2**10}


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        found = {name: importlib.import_module(name) for name in MODULES}
        names = {name.removeprefix("gpu_"): module for name, module in found.items()}
        yield SimpleNamespace(**names | {"program": found["gpu"]})
    for name in MODULES:
        sys.modules.pop(name, None)


def cells(page: str) -> list[list[str]]:
    """Return the rows of all tables of a page."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# A dry run


@dataclass
class DryRun:
    page: str
    log: list[dict[str, Any]]

    def section(self, title: str) -> str:
        return self.page.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.9.0")
    output = tmp_path_factory.mktemp("gpu") / "report.md"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--dry", "--output", output, "--note", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert output.read_text().strip() == done.stdout.strip()
    lines = output.with_suffix(".jsonl").read_text().splitlines()
    return DryRun(output.read_text(), [json.loads(line) for line in lines])


def test_a_dry_run_finds_every_kernel_right(dry_run: DryRun, gpu: SimpleNamespace) -> None:
    rows = cells(dry_run.section("Kernels against their references"))[2:]
    expected = gpu.checks.rows(gpu.checks.DRY)
    assert [row[0] for row in rows] == list(expected)
    assert [row[1] for row in rows] == [f"{len(item)} of {len(item)}" for item in expected.values()]
    assert {row[-1] for row in rows} == {"ok"}
    assert sum("row" in line for line in dry_run.log) == sum(map(len, expected.values()))


def test_a_dry_run_takes_every_turn(dry_run: DryRun, gpu: SimpleNamespace) -> None:
    options = gpu.program.options_of(["--dry"])
    turns = [turn for items in gpu.program.turns_of(options).values() for turn in items]
    assert len(turns) == 1 + 3 * 5 + 3
    learning = [turn for items in gpu.training.turns_of().values() for turn in items]
    taken = [line["turn"] for line in dry_run.log if "turn" in line]
    assert sorted(taken) == sorted([str(turn) for turn in turns + learning] * options.runs)
    timed = [line for line in dry_run.log if "turn" in line and "memory" not in line["turn"]]
    assert all(line["value"] > 0 for line in timed)
    decoding = cells(dry_run.section("Decoding"))[2:]
    assert [row[:3] for row in decoding] == [
        [turn.contestant, str(turn.batch), "yes" if turn.graphs else "no"]
        for turn in turns
        if turn.kind == "decode"
    ]
    contestants = cells(dry_run.section("Contestants"))[2:]
    assert {row[-1] for row in contestants} == {"ok"}
    for name in ("bfloat16", "int8", "int4"):
        row = next(row for row in contestants if row[0] == name)
        assert float(row[3]) <= float(row[4])
    trained = [row[0] for row in cells(dry_run.section("Training"))[2:]]
    assert trained == [name for name in gpu.training.turns_of() if name != "products"]


def test_a_dry_run_says_what_it_is(dry_run: DryRun, gpu: SimpleNamespace) -> None:
    sections = dry_run.page.split("\n## ")[1:]
    assert len(sections) == 6
    assert all(gpu.report.DRY_NOTE in section for section in sections)
    for line in ("- Date: ", "- Machine: ", "- Versions: ", "- GPU: none", "- Note: abc"):
        assert line in dry_run.page
    assert "Command: `python benchmarks/gpu.py --dry --output" in dry_run.page


def test_what_the_budget_has_no_room_for_is_left_out(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "report.md"
    monkeypatch.setattr(gpu.interpreter, "choose_interpreter", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--budget", "0", "--output", str(output)])
    monkeypatch.setattr(gpu.report.importlib.metadata, "version", lambda name: "0")
    gpu.program.main()
    page = output.read_text()
    rows = gpu.checks.rows(gpu.checks.DRY)
    cases = sum(map(len, rows.values()))
    assert f"Left out for want of time: {cases} shapes in {len(rows)} rows" in page
    assert page.count("Left out: 2 of 2 rounds") == 3
    assert "bfloat16, batch 1; " in page
    assert "ok" not in {row[-1] for row in cells(page)}


def test_without_a_gpu_it_says_so(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU: torch finds no CUDA device"):
        gpu.program.main()


# Kernels


def verdict(gpu: SimpleNamespace, *answers: Any, tolerance: float = 0.1, **how: Any) -> str:
    def error(device: torch.device) -> float:
        raise AssertionError

    case = gpu.checks.Case(
        row="x", shape="1", dtype=torch.float32, tolerance=tolerance, error=error
    )
    cases = (case,) * 2
    return str(gpu.checks.Checked(row="x", cases=cases, answers=answers, **how).verdict)


def test_a_verdict_is_ok_only_when_all_cases_are(gpu: SimpleNamespace) -> None:
    failure = gpu.workers.Failure("RuntimeError: no")
    assert verdict(gpu, 0.1, 0.0) == "ok"
    assert verdict(gpu, 0.0, 0.0, tolerance=0.0) == "ok"
    assert verdict(gpu, 1.0, 0.0, tolerance=0.0) == "FAILED"
    assert verdict(gpu, 0.0, 0.11) == "FAILED"
    assert verdict(gpu, float("nan"), 0.0) == "FAILED"
    assert verdict(gpu, failure, 0.0) == "FAILED"
    assert verdict(gpu, 0.0, end="its process ended") == "FAILED"
    assert verdict(gpu, 0.0, end="no time", is_out_of_time=True) == "ok as far as tried"
    assert verdict(gpu, 0.2, end="no time", is_out_of_time=True) == "FAILED"
    assert verdict(gpu, end="no time", is_out_of_time=True) == "not tried"


def test_errors_are_shares_of_rows_and_what_is_missing_is_infinite(gpu: SimpleNamespace) -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 100.0]])
    found = expected.clone()
    found[0, 1] += 0.5
    rms = 12.5**0.5
    assert gpu.contestants.largest_error(found, expected) == pytest.approx(0.5 / (4 + rms))
    found[1, 0] = float("nan")
    assert gpu.contestants.largest_error(found, expected) == float("inf")


def scaled_up(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Multiply with a weight, one of whose scales is twice as large."""
    assert isinstance(weight.scale, Tensor)
    scale = weight.scale.clone()
    scale[-1, -1] *= 2
    return reference(x, replace(weight, scale=scale), bias)


def shifted(q: Tensor, keys: Tensor, values: Tensor, spec: Any) -> Tensor:
    """Attend without the newest key."""
    return attention_reference(q, keys[:, :-1], values[:, :-1], spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_kernel_that_disagrees_fails(
    gpu: SimpleNamespace, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    checks, tolerance = gpu.checks, gpu.checks.TOLERANCES[dtype]
    product = {"method": Int4(), "shape": (24, 70), "tokens": 3, "dtype": dtype, "has_bias": True}
    assert checks.product_error(kernel_device, **product) <= tolerance
    assert checks.product_error(kernel_device, **product, oracle=scaled_up) > tolerance
    heads = checks.Heads(num_heads=4, num_kv_heads=2, head_dim=16, lengths=(5, 20))
    attention = {"heads": heads, "dtype": dtype}
    assert checks.attention_error(kernel_device, **attention) <= tolerance
    assert checks.attention_error(kernel_device, **attention, oracle=shifted) > tolerance


def test_keys_in_the_wrong_place_are_counted(
    gpu: SimpleNamespace, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hanok.kernels import triton_attention

    heads = gpu.checks.Heads(
        num_heads=2, num_kv_heads=1, head_dim=16, lengths=(5, 20), block_size=8
    )
    how = {"heads": heads, "dtype": torch.float32}
    assert gpu.checks.append_error(kernel_device, **how) == 0
    append = triton_attention.append

    def misplaced(
        k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, block_table: Tensor
    ) -> None:
        append(k, v, keys, values, lengths - 1, block_table)

    monkeypatch.setattr(triton_attention, "append", misplaced)
    # Of two sequences the old key and value that are overwritten, the new ones that are missing.
    assert gpu.checks.append_error(kernel_device, **how) == 2 * 2 * 2 * 16


def test_a_case_that_raises_fails_and_the_next_one_runs(gpu: SimpleNamespace) -> None:
    def raises(device: torch.device) -> float:
        raise RuntimeError("CUDA error:\nan illegal memory access")

    case = gpu.checks.Case(row="x", shape="1", dtype=torch.float32, tolerance=0.0, error=raises)
    answer = gpu.checks.answer_of(case, CPU)
    assert answer == gpu.workers.Failure("RuntimeError: CUDA error: an illegal memory access")


def test_rows_are_processes_that_may_die_or_hang(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answers, one is wrong, one ends at once; one waits for what never comes."""
    targets: dict[str, tuple[Callable[..., Any], *tuple[Any, ...]]] = {
        "right": (Connection.send, 0.05),
        "wrong": (Connection.send, 0.2),
        "dies": (Connection.close,),
    }
    case = gpu.checks.Case(
        row="x", shape="1", dtype=torch.float32, tolerance=0.1, error=lambda device: 0.0
    )
    log: list[dict[str, Any]] = []

    def checked(table: dict[str, Any], budget_s: float) -> list[Any]:
        found: list[Any] = gpu.parts.check_kernels(
            {row: (case,) for row in table},
            lambda row: gpu.workers.Worker(*table[row]),
            gpu.parts.Clock(budget_s),
            log.append,
            2,
        )
        return found

    found = checked(targets, 600.0)
    assert [item.verdict for item in found] == ["ok", "FAILED", "FAILED"]
    assert found[2].end == "its process ended with status 0"
    lines = gpu.report.kernel_failures(found)
    assert [line.split(": ")[1] for line in lines] == ["wrong", "dies"]
    # The two run at the same time, and either may be the first to answer.
    assert sorted(line["error"] for line in log if "error" in line) == [0.05, 0.2]

    hanging = {"hangs": (Connection.recv,)}
    (late,) = checked(hanging, 0.2)
    assert late.verdict == "not tried"
    monkeypatch.setattr(gpu.parts, "ANSWER_TIMEOUT_S", 0.0)
    (hung,) = checked(hanging, 600.0)
    assert hung.verdict == "FAILED"
    assert hung.end == "no answer within 0 s"


def test_what_workers_are_forked_from_touches_no_gpu(gpu: SimpleNamespace) -> None:
    """A process with a CUDA context cannot be forked into others that use one."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.9.0")
    code = (
        "import importlib, sys, torch\n"
        "def touched(*_, **__): raise AssertionError('the GPU is touched')\n"
        "names = 'is_available device_count init _lazy_init current_device get_device_properties'\n"
        "for name in names.split():\n"
        "    setattr(torch.cuda, name, touched)\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *gpu.workers.PRELOADED],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Contestants


def test_the_shape_is_that_of_llama_8b(gpu: SimpleNamespace) -> None:
    config = gpu.contestants.read_config(gpu.contestants.LLAMA_8B.config(), "8b")[1]
    assert config.num_parameters() == 8_030_261_248  # counted from its published sizes


@pytest.mark.parametrize("quant", [None, "int8:group_size=32", "int4"])
def test_contestants_read_the_bytes_that_are_counted(
    gpu: SimpleNamespace, quant: str | None
) -> None:
    recipe = None if quant is None else read_recipe(quant)
    decoder = gpu.contestants.make_decoder(gpu.contestants.GPU_SHAPES["tiny"], recipe, CPU)
    parameters = decoder.config.num_parameters()
    embedding = 512 * 64
    read = gpu.contestants.bytes_per_step(decoder)
    if quant is None:
        assert read == 2 * (parameters - embedding)
    else:
        assert read < 1.5 * (parameters - embedding)


def test_transformers_reads_as_many_bytes(gpu: SimpleNamespace) -> None:
    sizes = gpu.contestants.Sizes(**TINY)
    ours, theirs = (
        gpu.contestants.contestant_of(name, sizes, CPU)
        for name in ("bfloat16", "transformers bfloat16")
    )
    assert theirs.bytes_per_step == ours.bytes_per_step


def test_a_step_that_was_not_recorded_is_not_measured_as_one(gpu: SimpleNamespace) -> None:
    ours = gpu.contestants.contestant_of("bfloat16", gpu.contestants.Sizes(**TINY), CPU)
    turn = gpu.contestants.Turn(contestant="bfloat16", kind="decode", batch=2)
    assert ours.prepare(turn) is None
    assert ours.take(turn) > 0
    with pytest.raises(RuntimeError, match="nothing was recorded: needs a CUDA device"):
        ours.prepare(replace(turn, graphs=True))


@dataclass(eq=False)
class ScriptedWorker:
    """Gives what it is told to, and raises what of that is an exception."""

    script: list[Any]
    sent: list[Any] = field(default_factory=list)
    is_ended: bool = False

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def receive(self, timeout_s: float) -> Any:
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self.is_ended = True


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_contestant_that_fails_is_made_again_without_what_failed(
    gpu: SimpleNamespace, is_killed: bool
) -> None:
    turns = [
        gpu.contestants.Turn(contestant="int4", kind="decode", batch=batch, graphs=graphs)
        for graphs in (False, True)
        for batch in (1, 16)
    ]
    broken = gpu.workers.WorkerError("its process ended with status -11")
    failed = gpu.workers.Failure("RuntimeError: capture")
    # The third turn fails. If it ends the process nobody comes to the fourth; else that is spoilt too.
    first = ScriptedWorker([10, None, None, *([broken] if is_killed else [failed, failed])])
    second = ScriptedWorker([10, None, None, 0.001])
    workers = [first, second]
    (contender,) = gpu.parts.make_contestants(
        {"int4": turns}, lambda name: workers.pop(0), gpu.parts.Clock(600.0)
    )
    kept = [*turns[:2], turns[3]] if is_killed else turns[:2]
    assert first.is_ended
    assert contender.worker is second
    assert [turn for _, turn in second.sent] == kept
    assert contender.turns == kept
    assert len(contender.failures) == (1 if is_killed else 2)
    assert contender.failures[0].startswith("int4, batch 1, CUDA graphs: ")
    table = cells(gpu.report.contestant_table([contender]))
    assert table[2][2:] == [
        str(len(kept)),
        *(["0.001", "0.016"] if is_killed else ["–", "–"]),
        "FAILED",
    ]


def test_of_many_failures_of_a_row_the_first_are_listed(gpu: SimpleNamespace) -> None:
    case = gpu.checks.Case(
        row="x", shape="1", dtype=torch.float32, tolerance=0.1, error=lambda device: 0.0
    )
    answers = (gpu.workers.Failure("RuntimeError: no"), 0.0, 0.5, 0.5, 0.5)
    item = gpu.checks.Checked(row="x", cases=(case,) * 5, answers=answers)
    assert gpu.report.kernel_failures([item]) == [
        "FAILED: x: 1, float32: RuntimeError: no",
        "FAILED: x: 1, float32: error 0.5 > 0.1",
        "FAILED: x: 1, float32: error 0.5 > 0.1",
        "FAILED: x: 4 of 5 shapes",
    ]


def test_recorded_logits_that_differ_fail(gpu: SimpleNamespace) -> None:
    turn = gpu.contestants.Turn(contestant="int4", kind="decode", graphs=True)
    worker = ScriptedWorker([10, 0.5])
    (contender,) = gpu.parts.make_contestants(
        {"int4": [turn]}, lambda name: worker, gpu.parts.Clock(600.0)
    )
    assert cells(gpu.report.contestant_table([contender]))[2][-1] == "FAILED"
    assert gpu.report.contestant_failures([contender]) == [
        "FAILED: int4, batch 1, CUDA graphs: recorded logits are wrong, error 0.5 > 0.016"
    ]


# Training


def test_what_learns_is_that_of_the_counted_shape(gpu: SimpleNamespace) -> None:
    """One step of ours: the adapter has moved, and nothing else is there to learn."""
    shape = gpu.contestants.GPU_SHAPES["tiny"]
    learner = gpu.training.Ours(shape, None, 8, CPU)
    learnt = {name for name, item in learner._decoder.named_parameters() if item.requires_grad}
    assert learnt
    assert all(".lora." in name for name in learnt)
    turn = gpu.contestants.Turn(contestant="hanok bfloat16", kind="train")
    assert learner.prepare(turn) is None
    moved = [item for item in learner._decoder.parameters() if item.requires_grad]
    assert any(item.abs().sum() > 0 for item in moved if item.shape[-1] == gpu.training.RANK)
    assert learner.take(turn) > 0
    # q, k, v, o and three matrices of the MLP in two layers, and the head.
    layer = 64 * 128 + 64 * 64 + 3 * 64 * 160
    assert gpu.training.multiplied_weights(shape) == 2 * layer + 512 * 64 + 2 * 128


def test_training_is_a_share_of_products_and_a_multiple_of_peft(gpu: SimpleNamespace) -> None:
    turns = {
        "products": [gpu.contestants.Turn(contestant="products", kind="products")],
        **{
            name: [gpu.contestants.Turn(contestant=name, kind=kind) for kind in ("train", "memory")]
            for name in ("hanok bfloat16", "hanok nf4", "peft bfloat16")
        },
    }
    shape = gpu.contestants.LLAMA_8B
    work = 4 * gpu.training.multiplied_weights(shape)
    found = {turns["products"][0]: 2000.0 * work}
    for name, rate in (
        ("hanok bfloat16", 1500.0),
        ("hanok nf4", 1000.0),
        ("peft bfloat16", 1250.0),
    ):
        found |= dict(zip(turns[name], (rate, 20.0), strict=True))
    rows = cells(gpu.training.training_table(turns, [found], shape))[2:]
    assert rows == [
        ["hanok bfloat16", "1500", "1.20", "20.0", "0.750"],
        ["hanok nf4", "1000", "–", "20.0", "0.500"],
        ["peft bfloat16", "1250", "–", "20.0", "0.625"],
    ]


def test_who_cannot_train_is_left_out_with_the_reason(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.training, "find_spec", lambda name: None)
    assert list(gpu.training.turns_of()) == ["products", *gpu.training.OURS]
    assert gpu.training.why_not("hanok nf4") is None
    assert gpu.training.why_not("peft nf4") == "peft nf4 is left out: peft is not installed"


# Rounds


class ScriptedClock:
    """Says what is left, one value after another; the last one for ever."""

    def __init__(self, *left: float) -> None:
        self._left = list(left)

    def left_s(self) -> float:
        return self._left.pop(0) if len(self._left) > 1 else self._left[0]


def contenders_of(gpu: SimpleNamespace, **scripts: list[Any]) -> list[Any]:
    return [
        gpu.parts.Contender(
            name=name,
            worker=ScriptedWorker(script),
            asked=(),
            turns=[gpu.contestants.Turn(contestant=name, kind="decode")],
        )
        for name, script in scripts.items()
    ]


def test_each_round_begins_with_another_turn(gpu: SimpleNamespace) -> None:
    contenders = contenders_of(gpu, a=[1.0, 2.0, 3.0], b=[4.0, 5.0, 6.0])
    turns = [turn for item in contenders for turn in item.turns]
    log: list[dict[str, Any]] = []
    rounds = gpu.parts.take_rounds(contenders, turns, 3, gpu.parts.Clock(600.0), log.append)
    assert [[item[turn] for turn in turns] for item in rounds] == [[1, 4], [2, 5], [3, 6]]
    assert [line["turn"][0] for line in log] == ["a", "b", "b", "a", "a", "b"]


def test_a_turn_that_fails_is_not_taken_again(gpu: SimpleNamespace) -> None:
    failure = gpu.workers.Failure("RuntimeError: no")
    contenders = contenders_of(gpu, a=[1.0, 2.0, 3.0], b=[4.0, failure])
    turns = [turn for item in contenders for turn in item.turns]
    rounds = gpu.parts.take_rounds(contenders, turns, 3, gpu.parts.Clock(600.0), lambda row: None)
    assert [[item.get(turn) for turn in turns] for item in rounds] == [[1, 4], [2, None], [3, None]]
    assert gpu.report.contestant_failures(contenders) == ["FAILED: b, batch 1: RuntimeError: no"]
    assert gpu.report.times(rounds, *turns) == "0.250"


def test_a_round_that_would_not_end_in_time_does_not_begin(gpu: SimpleNamespace) -> None:
    contenders = contenders_of(gpu, a=[1.0], b=[])
    turns = [turn for item in contenders for turn in item.turns]
    # The first round begins, has time for one turn, and no other round begins.
    clock = ScriptedClock(1.0, 1.0, 1.0, -1.0)
    rounds = gpu.parts.take_rounds(contenders, turns, 3, clock, lambda row: None)
    assert rounds == [{turns[0]: 1.0}]
    assert gpu.report.rounds_left_out(turns, rounds, 3) == [
        "Left out, without a figure: b, batch 1",
        "Left out: 2 of 3 rounds",
    ]


def test_the_report_says_what_was_asked_and_measured(gpu: SimpleNamespace) -> None:
    def turn(name: str, kind: str = "decode", **how: Any) -> Any:
        return gpu.contestants.Turn(contestant=name, kind=kind, **how)

    decoding = [
        {
            gpu.report.COPY_TURN: 1500.0,
            turn("bfloat16", graphs=True): 100.0,
            turn("bfloat16"): 40.0,
            turn("int8", graphs=True): 150.0,
            turn("int4", graphs=True): 260.0,
            turn("transformers bfloat16"): 50.0,
        }
    ]
    calls = [{turn("bfloat16", "call"): 1000.0, turn("int4", "call"): 950.0}]
    sizes = {"bfloat16": 16 * 10**9, "int8": 8 * 10**9, "int4": 4 * 10**9}
    asked = {row[0]: row[1:] for row in cells(gpu.report.asked_table(decoding, calls, 1, sizes))}
    assert asked["bfloat16 decoding, share of the copy bandwidth"] == ["≥ 0.8", "1.07", "yes"]
    assert asked["int8 decoding, times our bfloat16"] == ["≥ 1.6", "1.50", "no"]
    assert asked["int4 decoding, times our bfloat16"] == ["≥ 2.5", "2.60", "yes"]
    assert asked["int4, calls of many tokens, times our bfloat16"] == ["≥ 0.9", "0.950", "yes"]
    (row,) = cells(gpu.report.decode_table([turn("bfloat16", graphs=True)], decoding, sizes))[2:]
    assert row == ["bfloat16", "1", "yes", "100", "2.50", "–", "2.00", "1600", "1.07"]
    nothing = cells(gpu.report.asked_table([], [], 1, {}))[2:]
    assert {tuple(row[2:]) for row in nothing} == {("–", "not measured")}
