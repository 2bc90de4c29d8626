"""The parts of benchmarks/gpu.py: processes that answer, fail, or take longer than there is time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_checks import Case, Checked
from gpu_contestants import Turn
from gpu_workers import Failure, Worker, WorkerError, ready

ANSWER_TIMEOUT_S = 100.0  # a CUDA context, a model or a dozen compilations take less
Log = Callable[[dict[str, Any]], None]
Start = Callable[[str], Worker]
"""Starts the process of a row of kernels, or of a contestant, by its name."""
Round = Mapping[Turn, float]
"""What each turn gave, as `Contestant.take` returns it."""


class Clock:
    """How much time is left."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s
        self._end = time.perf_counter() + budget_s

    def left_s(self) -> float:
        """Return the seconds left, negative when they are over."""
        return self._end - time.perf_counter()

    def part(self, name: str, shares: Mapping[str, float]) -> "Clock":
        """Return the clock of a part: its share of what is left for it and the parts behind it."""
        names = list(shares)
        behind = sum(shares[item] for item in names[names.index(name) :])
        return Clock(self.left_s() * shares[name] / behind)


# Kernels


def check_kernels(
    table: Mapping[str, tuple[Case, ...]], start: Start, clock: Clock, log: Log, processes: int
) -> list[Checked]:
    """Return what came of each row of a table, `processes` rows at a time."""
    checks = [RowCheck(row, cases, log) for row, cases in table.items()]
    waiting, running = list(checks), dict[Worker, RowCheck]()
    while (waiting or running) and clock.left_s() > 0:
        while waiting and len(running) < processes:
            check = waiting.pop(0)
            running[check.begin(start)] = check
        for worker in ready(running, min(clock.left_s(), 1.0)):
            running[worker].hear()
        running = {worker: check for worker, check in running.items() if check.is_running()}
    for check in [*running.values(), *waiting]:
        check.end("the part's time was over", is_out_of_time=True)
    return [check.checked() for check in checks]


class RowCheck:
    """A row of the table while it is computed."""

    def __init__(self, row: str, cases: tuple[Case, ...], log: Log) -> None:
        self._row, self._cases, self._log = row, cases, log
        self._answers: list[float | Failure] = []
        self._worker: Worker | None = None
        self._heard = 0.0
        self._end = ""
        self._is_out_of_time = False

    def begin(self, start: Start) -> Worker:
        """Start the row's process, which sends an answer for each case in turn."""
        self._worker, self._heard = start(self._row), time.perf_counter()
        return self._worker

    def hear(self) -> None:
        """Take the answer that has come, or the news that the process has ended."""
        assert self._worker is not None
        case = self._cases[len(self._answers)]
        try:
            answer = self._worker.receive(0.0)
        except WorkerError as error:
            self.end(str(error))
            return
        self._answers.append(answer)
        self._heard = time.perf_counter()
        told = {"failure": answer.text} if isinstance(answer, Failure) else {"error": answer}
        self._log({"row": self._row, "case": case.name, "tolerance": case.tolerance, **told})
        if len(self._answers) == len(self._cases):
            self.end("")

    def is_running(self) -> bool:
        """Return whether the row is still computed; one that hangs is ended."""
        if self._worker is not None and time.perf_counter() - self._heard > ANSWER_TIMEOUT_S:
            self.end(f"no answer within {ANSWER_TIMEOUT_S:.0f} s")
        return self._worker is not None

    def end(self, why: str, *, is_out_of_time: bool = False) -> None:
        """End the row's process, if there is one."""
        self._end, self._is_out_of_time = why, is_out_of_time
        if why:
            self._log({"row": self._row, "end": why})
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def checked(self) -> Checked:
        """Return what came of the row."""
        return Checked(
            row=self._row,
            cases=self._cases,
            answers=tuple(self._answers),
            end=self._end,
            is_out_of_time=self._is_out_of_time,
        )


# Contestants


@dataclass(slots=True, kw_only=True)
class Contender:
    """A contestant in its process, and what became of it."""

    name: str
    worker: Worker
    asked: tuple[Turn, ...]
    """What it was told to prepare, in this order."""
    turns: list[Turn] = field(default_factory=list)
    """What it is ready for."""
    untried: list[Turn] = field(default_factory=list)
    """What its process did not come to."""
    bytes_per_step: int = 0
    recorded_errors: dict[Turn, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    is_broken: bool = False
    """Whether its process ended or hangs."""

    def prepare(self, clock: Clock) -> None:
        """Wait until its model is made and its turns are prepared."""
        made = self._receive(self.name, clock)
        if isinstance(made, Failure):
            return
        self.bytes_per_step, self.untried = made, list(self.asked)
        while self.untried and not self.is_broken:
            turn = self.untried.pop(0)
            answer = self._receive(str(turn), clock)
            if isinstance(answer, Failure):
                continue
            self.turns.append(turn)
            if answer is not None:
                self.recorded_errors[turn] = answer

    def take(self, turn: Turn, clock: Clock) -> float | None:
        """Return what a turn gives, or None where it fails; it is not taken again then."""
        self.worker.send(("take", turn))
        answer = self._receive(str(turn), clock)
        if isinstance(answer, Failure):
            self.turns = [item for item in self.turns if item != turn and not self.is_broken]
            return None
        return float(answer)

    def _receive(self, what: str, clock: Clock) -> Any:
        """Return the next answer, or a `Failure` when there is none; failures are noted."""
        limit_s = min(ANSWER_TIMEOUT_S, clock.left_s())
        try:
            answer = self.worker.receive(limit_s)
        except WorkerError as error:
            self.is_broken, answer = True, Failure(str(error))
        except TimeoutError:
            self.is_broken, answer = True, Failure(f"no answer within {limit_s:.0f} s")
            if limit_s < ANSWER_TIMEOUT_S:
                self.left_out.append(f"{what}: the part's time was over")
                return answer
        if isinstance(answer, Failure):
            self.failures.append(f"{what}: {answer.text}")
        return answer


def make_contestants(
    turns: Mapping[str, Sequence[Turn]], start: Start, clock: Clock
) -> list[Contender]:
    """Return the contestants, made and prepared at the same time.

    What goes wrong on a GPU can spoil all that its process does later. A contestant with a turn that
    failed is therefore made once more, without that turn.
    """

    def started(name: str, asked: Sequence[Turn]) -> Contender:
        worker = start(name)
        for turn in asked:
            worker.send(("prepare", turn))
        return Contender(name=name, worker=worker, asked=tuple(asked))

    if clock.left_s() <= 0:
        return []
    contenders = [started(name, asked) for name, asked in turns.items()]
    for index, contender in enumerate(contenders):
        contender.prepare(clock)
        others = [*contender.turns, *contender.untried]
        if contender.failures and others and clock.left_s() > 0:
            contender.worker.end()
            contenders[index] = again = started(contender.name, others)
            again.failures += contender.failures
            again.prepare(clock)
        if contenders[index].is_broken:
            contenders[index].turns = []
    return contenders


def take_rounds(
    contenders: Sequence[Contender], turns: Sequence[Turn], runs: int, clock: Clock, log: Log
) -> list[Round]:
    """Return up to `runs` rounds in which all that are ready take turns, each round from another one on.

    A round begins only when one as long as the last would end in time. The first one begins anyway, and
    leaves out what it does not come to.
    """
    by_name = {item.name: item for item in contenders}

    def ready_turns() -> set[Turn]:
        return {turn for item in contenders for turn in item.turns}

    rounds: list[Round] = []
    last_s = 0.0
    while len(rounds) < runs and clock.left_s() > last_s:
        began = time.perf_counter()
        live = [turn for turn in turns if turn in ready_turns()]
        if not live:
            break
        first = len(rounds) % len(live)
        found: dict[Turn, float] = {}
        for turn in live[first:] + live[:first]:
            if clock.left_s() <= 0 or turn not in ready_turns():
                continue
            value = by_name[turn.contestant].take(turn, clock)
            if value is not None:
                found[turn] = value
                log({"turn": str(turn), "round": len(rounds), "at": time.time(), "value": value})
        rounds.append(found)
        last_s = time.perf_counter() - began
    return rounds
