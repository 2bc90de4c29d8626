"""A benchmark's time on machines of any speed: a made-up clock, and processes that only let it run.

Whatever the machine, a run ends about when its time is over, and the short grid has its core or says in
a line why not.
"""

from dataclasses import replace
from typing import Any

import pytest

import hanok
from hanok.bench import measure
from hanok.bench.grid import MIN_ROUNDS, NO_TIME, QUALITY_SHARE
from hanok.bench.measure import BenchOptions, run_bench
from hanok.bench.report import Probe, Report
from hanok.bench.settings import Axes, Load, Setting, core_axes, default_axes
from hanok.bench.workers import Shared
from hanok.errors import DeadlineError, GenerationError

TEXT = (hanok.BUNDLED / "quality.txt").read_text(encoding="utf-8")
LOAD = Shared(path=hanok.BUNDLED, draft=None, threads=None, max_memory=None)
CORE = ["eager", "sdpa", "native", "native, int8", "native, int4"]
IMPORT_S, PROCESS_S, LOAD_S, PROBE_S = 1.4, 1.3, 0.1, 0.1
PROMPT_TOKEN_S, STEP_S, SCORED_TOKEN_S = 1.5e-4, 1.5e-3, 1.5e-4
ATTENTION = {"eager": 2.0, "sdpa_math": 1.5}  # times as long


class Machine:
    """A machine so many times as slow as the one that the numbers above are of, with its clock."""

    def __init__(self, slow: float, patch: pytest.MonkeyPatch) -> None:
        self.slow, self.now = slow, 0.0
        self.scored_token_s, self.scoring_s = SCORED_TOKEN_S, 0.0
        self.probes = 0
        self.quant_slow: dict[str, float] = {}
        """Recipes with which everything takes so many times as long."""
        patch.setattr(measure.time, "perf_counter", lambda: self.now)
        patch.setattr(measure, "set_threads", lambda asked: None)
        patch.setattr(measure, "MachineProbe", lambda device: self)
        patch.setattr(measure, "Process", lambda: FakeProcess(self))
        patch.setattr(measure, "Workers", lambda options, rooms: FakeWorkers(self))

    def spend(self, seconds: float, limit_s: float | None = None) -> None:
        seconds *= self.slow
        if limit_s is not None and seconds > limit_s:
            self.now += limit_s
            raise DeadlineError(f"had not answered after {limit_s:.2g} s")
        self.now += seconds

    def best(self) -> Probe:
        self.spend(PROBE_S)
        return Probe(gb_per_s=10.0, gflop_per_s=100.0)

    def measure(self) -> Probe:
        self.spend(PROBE_S)
        self.probes += 1
        return Probe(gb_per_s=9.0 + self.probes, gflop_per_s=99.0 + self.probes)

    def answer_s(self, setting: Setting, request: dict[str, Any]) -> tuple[float, float]:
        """How long an answer and its first token take on the machine that is not slow."""
        times = ATTENTION.get(setting.attention, 1.0) * self.quant_slow.get(setting.quant, 1.0)
        tokens = sum(map(len, request["prompts"]))
        first_s = times * (PROMPT_TOKEN_S * tokens + STEP_S)
        steps = request["new_tokens"] - 1
        return first_s + steps * (times * STEP_S if setting.cache else first_s), first_s


class FakeWorker:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.setting = machine, Setting()
        self.seconds = machine.slow * (PROCESS_S + LOAD_S)
        self.told = {
            "load_s": machine.slow * LOAD_S,
            "weight_bytes": 10**7,
            "peak_bytes": 10**8,
            "token_bytes": 10**7,
            "dtype": "bfloat16",
        }

    def use(self, setting: Setting) -> None:
        self.setting = setting

    def ask(self, kind: str, *, limit_s: float | None = None, **request: Any) -> dict[str, Any]:
        if kind == "answer":
            seconds, first_s = self.machine.answer_s(self.setting, request)
            self.machine.spend(seconds, limit_s)
            same = [[1] * request["new_tokens"] for _ in request["prompts"]]
            slow = self.machine.slow
            return {
                "seconds": slow * seconds,
                "first_token_s": slow * first_s,
                "foreign": None,
                "token_ids": same,
                "proposed": None,
                "accepted": None,
            }
        assert kind in ("keep", "compare")
        began = self.machine.now
        tokens = sum(len(window) - 1 for window in request["windows"])
        self.machine.spend(self.machine.scored_token_s * tokens)
        self.machine.scoring_s += self.machine.now - began
        return {"perplexity": 50.0, "kl_mean": 0.0, "kl_p99": 0.0, "same_top1": 1.0}


class FakeWorkers:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.alive: dict[Load, FakeWorker] = {}

    def __enter__(self) -> "FakeWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, load: Load, limit_s: float | None = None) -> FakeWorker:
        if load not in self.alive:
            times = self.machine.quant_slow.get(load.quant, 1.0)
            self.machine.spend(PROCESS_S + times * LOAD_S, limit_s)
            self.alive[load] = FakeWorker(self.machine)
        return self.alive[load]

    def load_request(self, load: Load) -> dict[str, Any]:
        return {"load": load}

    def close_all(self) -> None:
        pass


class FakeProcess:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.spend(PROCESS_S)

    def ask(self, kind: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
        assert kind == "apart"
        attention = steps[1]["attention"]
        seconds, _ = self.machine.answer_s(Setting(attention=attention), steps[2])
        self.machine.spend(0.05 * PROCESS_S + LOAD_S + seconds)
        return {"peak_bytes": 10**8, "peak_device_bytes": None}

    def close(self) -> None:
        pass


def default_options(budget_s: float) -> BenchOptions:
    return BenchOptions(
        load=LOAD,
        axes=default_axes(),
        core=core_axes(),
        may_shrink=True,
        text=TEXT,
        budget_s=budget_s,
        began=0.0,
    )


def run(
    slow: float,
    options: BenchOptions,
    patch: pytest.MonkeyPatch,
    *,
    scored_token_s: float = SCORED_TOKEN_S,
    **quant_slow: float,
) -> tuple[Report, Machine]:
    machine = Machine(slow, patch)
    machine.quant_slow, machine.scored_token_s = quant_slow, scored_token_s
    machine.now += slow * IMPORT_S
    return run_bench(options), machine


@pytest.mark.parametrize("budget_s", [30.0, 45.0, 90.0])
@pytest.mark.parametrize("slow", [0.2, 1.0, 2.0, 3.0, 4.0])
def test_the_short_grid_has_all_rows_and_ends_in_time(
    slow: float, budget_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, machine = run(slow, default_options(budget_s), monkeypatch)
    assert machine.now == report.seconds
    assert report.seconds <= budget_s + 2.0
    assert machine.scoring_s <= QUALITY_SHARE * budget_s
    labels = [row.label for row in report.rows]
    has_time = budget_s / slow / 1.5 > IMPORT_S + 4 * (PROCESS_S + LOAD_S)
    assert all(label in labels for label in CORE)
    if has_time:
        assert {item.reason for item in report.skipped} == {
            "needs a CUDA device (found: cpu)",
            "needs a draft model (--draft)",
        }
        assert report.rounds >= 1
        assert report.quality_tokens > 0
    # Rows compare: all were asked for the same lengths.
    lengths = {(row.workload.prompt_tokens, row.workload.new_tokens) for row in report.rows}
    main = next(row.workload for row in report.rows)
    assert {label for label in CORE} <= {row.label for row in report.rows if row.workload == main}
    assert len({new for _, new in lengths}) == 1


def test_core_rows_are_there_before_others(monkeypatch: pytest.MonkeyPatch) -> None:
    quants = ("nf4", "fp8", "int8-outlier", "int4", "int8")
    axes = (Axes(quant=quants), Axes(attention=("eager",)))
    core = (Axes(quant=("int8",)), Axes(attention=("eager",)))
    options = replace(default_options(30.0), axes=axes, core=core)
    report, _ = run(4.0, options, monkeypatch)
    labels = [row.label for row in report.rows]
    assert {"native, int8", "eager"} <= set(labels)
    assert len(labels) < len(quants) + 1
    # They answer first, and stand in the table where they were.
    assert labels.index("eager") == len(labels) - 1


def test_scoring_takes_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(default_options(45.0), text=TEXT * 20, quality_tokens=20_000)
    report, machine = run(1.0, options, monkeypatch)
    assert 0 < report.quality_tokens < 20_000
    assert machine.scoring_s <= QUALITY_SHARE * 45.0
    assert report.rounds >= MIN_ROUNDS
    assert all(row.quality is not None for row in report.rows)


def test_scoring_that_takes_longer_than_was_expected_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, _ = run(2.0, default_options(45.0), monkeypatch, scored_token_s=25 * SCORED_TOKEN_S)
    assert report.seconds <= 45.0 + 2.0
    assert report.rounds >= 1
    settings = {row.setting.numerics for row in report.rows}
    scored = {row.setting.numerics for row in report.rows if row.quality is not None}
    assert 0 < len(scored) < len(settings)
    missing = len(settings) - len(scored)
    (note,) = (note for note in report.notes if "score text" in note)
    assert f"with {missing} of {len(settings)} settings" in note


def test_shares_are_of_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs may have disturbed the first probe; a round's reads may be of caches."""
    report, machine = run(1.0, default_options(45.0), monkeypatch)
    assert report.gflop_per_s == 99.0 + machine.probes > 100.0
    assert report.gb_per_s == 10.0


def test_a_fast_machine_gets_what_the_axes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = run(0.3, default_options(90.0), monkeypatch)
    assert {row.workload.prompt_tokens for row in report.rows} == {32, 128, 512}
    assert {row.workload.new_tokens for row in report.rows} == {32}
    assert report.notes == ()
    assert report.rounds > MIN_ROUNDS
    assert all(row.peak_bytes is not None for row in report.rows)


def test_a_slow_machine_gets_fewer_tokens_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, _ = run(3.0, default_options(45.0), monkeypatch)
    workload = report.rows[0].workload
    assert workload.prompt_tokens < 128
    assert workload.new_tokens < 32
    (note,) = (note for note in report.notes if "slow on this machine" in note)
    assert f"prompts of {workload.prompt_tokens}, " in note
    assert f"{workload.new_tokens} new tokens instead of 32" in note
    assert note.endswith("so that all rows fit into 45 s (--budget)")


def test_where_even_the_least_is_too_much_the_core_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, _ = run(8.0, default_options(45.0), monkeypatch)
    labels = [row.label for row in report.rows]
    assert {"eager", "sdpa", "native"} <= set(labels)
    missing = [label for label in CORE if label not in labels]
    assert missing
    for label in missing:
        (note,) = (note for note in report.notes if note.startswith(f"{label} is not there: "))
        assert NO_TIME in note
    assert report.rounds >= 1
    assert report.seconds <= 45.0 * 1.2


def test_a_load_that_never_ends_takes_its_own_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = run(1.0, default_options(45.0), monkeypatch, int8=1000.0)
    labels = {row.label for row in report.rows}
    assert "native, int8" not in labels
    assert {"eager", "sdpa", "native"} <= labels
    (note,) = (note for note in report.notes if note.startswith("native, int8 is not there"))
    assert "had not answered after" in note
    assert report.seconds <= 45.0 + 2.0


def test_a_grid_of_the_user_keeps_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(
        default_options(20.0),
        axes=(Axes(attention=("eager", "native"), cache=(True, False), prompt_tokens=(64, 900)),),
        core=(),
        may_shrink=False,
    )
    report, _ = run(3.0, options, monkeypatch)
    assert all(row.workload.prompt_tokens in (64, 900) for row in report.rows)
    assert all(row.workload.new_tokens == 32 for row in report.rows)
    assert any(item.reason.startswith(NO_TIME) for item in report.skipped)
    assert report.rounds >= MIN_ROUNDS  # rows are left out before rounds
    assert report.seconds <= 20.0 + 2.0


def test_what_is_given_up_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = run(6.0, default_options(60.0), monkeypatch)
    notes = "\n".join(report.notes)
    assert report.rounds < MIN_ROUNDS
    assert f"there was time for {report.rounds} of 3 rounds (--budget)" in notes
    without = sum(row.peak_bytes is None for row in report.rows)
    assert f"no time to find {without} of {len(report.rows)} peaks of memory" in notes
    settings = {row.setting.numerics for row in report.rows if row.quality is None}
    if settings:
        assert f"no time to score text with {len(settings)} of " in notes


def test_a_budget_ends_rounds_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(default_options(45.0), rounds=1000)
    report, _ = run(1.0, options, monkeypatch)
    assert MIN_ROUNDS <= report.rounds < 1000
    assert f"there was time for {report.rounds} of 1000 rounds (--budget)" in report.notes
    assert report.seconds <= 45.0 + 2.0


def test_without_a_budget_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(default_options(45.0), budget_s=None, rounds=2)
    report, _ = run(50.0, options, monkeypatch)
    assert report.rounds == 2
    assert report.notes == ()
    assert {row.workload.prompt_tokens for row in report.rows} == {32, 128, 512}
    assert all(row.peak_bytes is not None for row in report.rows)
    assert all(row.quality is not None for row in report.rows)


@pytest.mark.parametrize("failing", ["eager", "sdpa"])
def test_rows_that_fail_take_themselves_alone(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_answer = Machine.answer_s

    def answer_s(self: Machine, setting: Setting, request: dict[str, Any]) -> tuple[float, float]:
        if setting.attention == failing:
            raise GenerationError("it has no kernel.")
        return machine_answer(self, setting, request)

    monkeypatch.setattr(Machine, "answer_s", answer_s)
    report, _ = run(3.0, default_options(45.0), monkeypatch)
    labels = {row.label for row in report.rows}
    assert {label for label in CORE if label != failing} <= labels
    assert f"{failing} is not there: it has no kernel" in report.notes
    # Another row shows what all take.
    assert any("slow on this machine" in note for note in report.notes)


def test_the_time_before_the_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports take seconds on a slow machine, and the budget is that of the whole program."""
    early, late = (
        run(1.0, replace(default_options(45.0), began=began), monkeypatch)[0]
        for began in (0.0, -25.0)
    )
    assert late.rounds < early.rounds
    assert late.seconds <= 45.0 + 2.0
