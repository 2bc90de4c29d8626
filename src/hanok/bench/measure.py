"""Measures a grid: loads, one answer of each row to warm up, quality, then rounds of all rows in turn.

What a row takes is known after its first answer. Where not everything fits the time, prompts and answers
of the default grid become shorter before rows are left out, and rounds, scoring and peaks are given up
before rows are. The report says what was.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hanok.bench.grid import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    NO_TIME,
    PILOT_SHARE,
    QUALITY_SHARE,
    Costs,
    GridRow,
    Skipped,
    Timing,
    answer_order,
    divisor_that_fits,
    divisors,
    estimate_s,
    has_time_for_a_round,
    peak_s,
    pilot,
    plan_grid,
    rotated,
    rows_s,
    scored,
    scoring_s,
    shrink_note,
    shrunk_rows,
    why_too_slow,
)
from hanok.bench.machine import MachineProbe, machine_facts, versions
from hanok.bench.report import Difference, LoadRow, Probe, Quality, Report, Sample
from hanok.bench.rows import Measured, finished_rows
from hanok.bench.settings import Axes, Load, Setting, Workload
from hanok.bench.subject import SubjectModel, rooms
from hanok.bench.workers import Process, Shared, Workers, chosen_settings
from hanok.errors import DeadlineError, HanokError, OptionError
from hanok.memory.threads import set_threads

LEAST_LIMIT_S = 1.0  # for a first answer, of what has begun
DISTURBED_CORES = 0.2  # used by others, beyond which a report says so
Progress = Callable[[str, float, float | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured, and for how long."""

    load: Shared
    axes: tuple[Axes, ...]
    text: str
    """What prompts are cut from, and what is scored."""
    reference: Setting | None = None
    """What the others are compared with; None: the first row of each workload."""
    budget_s: float | None = None
    """How long all of it may take, from `began` on; None: as long as it does."""
    began: float | None = None
    """When the program began, of `time.perf_counter`; None: now."""
    may_shrink: bool = False
    """Whether prompts and answers may be shorter than the axes say, so that all rows fit the budget."""
    core: tuple[Axes, ...] = ()
    """Rows of the axes that are to be there however short the time is; they answer first."""
    rounds: int | None = None
    """At the most; None: as many as the time allows."""
    quality_tokens: int = 1024
    """Tokens to score at the most; 0: none."""


def run_bench(options: BenchOptions, progress: Progress = lambda what, done, whole: None) -> Report:
    """Measure a grid. `progress` is called with what is done, the seconds done, and those of all."""
    if options.rounds is not None and options.rounds < 1:
        raise OptionError(f"rounds is {options.rounds}; it must be at least 1.")
    if options.budget_s is not None and options.budget_s <= 0:
        raise OptionError(f"the budget is {options.budget_s} s; it must be more than 0.")
    return _Run(options, progress).report()


class _Run:
    """One run of a grid."""

    def __init__(self, options: BenchOptions, progress: Progress) -> None:
        self._options = options
        self._progress = progress
        self._began = time.perf_counter() if options.began is None else options.began
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        set_threads(options.load.threads)
        self._subject = SubjectModel(options.load)
        plan = plan_grid(
            _combinations(options.axes),
            self._subject.facts(),
            options.reference,
            _combinations(options.core),
        )
        self._rows, self._core = list(plan.rows), list(plan.core)
        self._skipped: list[Skipped] = []
        self._measured: dict[GridRow, Measured] = {}
        self._loads: dict[Load, LoadRow] = {}
        self._weights_read: dict[Load, tuple[int, str]] = {}
        self._notes: list[str] = []
        for item in plan.skipped:
            self._leave_out(item.row, item.reason)
        self._workers = Workers(
            options.load, rooms([(row.setting.load, row.workload) for row in self._rows])
        )
        self._probe = MachineProbe(self._subject.device)
        self._best = self._probe.best()
        start = time.perf_counter()
        self._probe.measure()
        self._probe_s = time.perf_counter() - start
        self._probes: list[Probe] = []
        self._num_scored = 0

    def report(self) -> Report:
        """Measure, and return what was found."""
        with self._workers:
            self._shrink()
            self._warm_up()
            kept = [row for row in self._rows if row in self._measured]
            if not kept:
                reasons = "\n".join(f"  {item.reason}" for item in self._skipped)
                raise OptionError(f"no row could be measured:\n{reasons}")
            self._compare_texts(kept)
            self._score(kept)
            self._rounds(kept)
            self._workers.close_all()
            self._find_peaks(kept)
        return self._finished(kept)

    # Time

    def _left_s(self) -> float | None:
        budget = self._options.budget_s
        return None if budget is None else budget - self._done_s()

    def _done_s(self) -> float:
        return time.perf_counter() - self._began

    def _show(self, what: str, to_come_s: float | None) -> None:
        done = self._done_s()
        self._progress(what, done, None if to_come_s is None else done + to_come_s)

    def _round_s(self) -> float:
        """Return about how long a round of the kept rows takes."""
        return self._probe_s + sum(item.warm_up.seconds for item in self._measured.values())

    @property
    def _least_rounds(self) -> int:
        """For how many rounds the kept rows must have time: the short grid keeps rows rather."""
        return 1 if self._options.may_shrink else MIN_ROUNDS

    def _before_rounds_s(self) -> float | None:
        """Return how much time is left so that the kept rows still have their least rounds."""
        left = self._left_s()
        return None if left is None else left - self._least_rounds * self._round_s()

    def _costs(self) -> Costs:
        """Return what processes and loads take, by the slowest so far."""
        loads = self._loads.values()
        return Costs(
            process_s=max(item.seconds - item.load_s for item in loads),
            load_s=max(item.load_s for item in loads),
            probe_s=self._probe_s,
        )

    def _timings(self) -> dict[GridRow, Timing]:
        return {row: _timing(item) for row, item in self._measured.items()}

    # The parts of a run

    def _shrink(self) -> None:
        """Make prompts and answers shorter, the same for all rows, where not all rows fit the time."""
        budget_s, left_s = self._options.budget_s, self._left_s()
        if budget_s is None or left_s is None or not self._options.may_shrink:
            return
        timings = self._pilot_timings(left_s)
        if not timings:
            return
        costs = self._costs()

        def taken_s(rows: Sequence[GridRow]) -> tuple[float, float]:
            quality_s = scoring_s(rows, timings, self._options.quality_tokens, budget_s)
            peaks_s = sum(peak_s(estimate_s(item, timings) or 0.0, costs) for item in rows)
            return (
                rows_s(rows, timings, costs, self._loads) + quality_s,
                costs.process_s + peaks_s,
            )

        divisor, all_fit = divisor_that_fits(self._rows, taken_s, budget_s - self._done_s())
        if divisor > 1:
            self._note(shrink_note(self._rows, divisor, all_fit, budget_s))
            self._rows, self._core = (
                shrunk_rows(rows, divisor) for rows in (self._rows, self._core)
            )
            self._measured.clear()

    def _pilot_timings(self, left_s: float) -> dict[GridRow, Timing]:
        """Return what some answers take that show what others will; short ones where long ones last."""
        timings: dict[GridRow, Timing] = {}
        for row in dict.fromkeys((pilot(self._rows), *self._core_of(self._rows))):
            if timings and row.setting.load not in self._loads:
                continue  # no load just for this
            self._show(f"first answer: {self._label(row)}", None)
            try:
                if not timings:
                    (short,) = shrunk_rows([row], divisors([row])[-1])
                    timings = {short: _timing(self._first_answer(short))}
                if (estimate_s(row, timings) or 0.0) > PILOT_SHARE * left_s:
                    break
                self._measured[row] = self._first_answer(row)
            except HanokError:
                continue  # said when it is this row's turn
            timings = self._timings()
        return timings

    def _warm_up(self) -> None:
        """Let each row answer once; leave out what does not fit the time, or fails."""
        for row in answer_order(self._rows, self._core_of(self._rows)):
            if row in self._measured:
                continue
            timings = self._timings()
            expected_s = estimate_s(row, timings)
            to_come = sum(estimate_s(other, timings) or 0.0 for other in self._rows)
            self._show(f"first answer: {self._label(row)}", to_come * (1 + MIN_ROUNDS))
            reason = self._why_too_slow(row, expected_s) if expected_s is not None else None
            if reason is None:
                try:
                    self._measured[row] = self._first_answer(row)
                except DeadlineError as error:
                    reason = f"{NO_TIME} ({error})"
                except HanokError as error:
                    reason = str(error)
            if reason is not None:
                self._leave_out(row, reason)

    def _leave_out(self, row: GridRow, reason: str) -> None:
        self._skipped.append(Skipped(row=row, reason=reason))
        if row in self._core:
            self._note(f"{self._label(row)} is not there: {reason.rstrip('.')}")

    def _why_too_slow(self, row: GridRow, expected_s: float) -> str | None:
        left = self._left_s()
        if left is None:
            return None
        load_s = 0.0
        if row.setting.load not in self._loads and self._loads:
            load_s = max(item.seconds for item in self._loads.values())
        return why_too_slow(
            expected_s,
            load_s=load_s,
            kept_s=self._round_s(),
            left_s=left,
            rounds=self._least_rounds,
        )

    def _first_answer(self, row: GridRow) -> Measured:
        """Return the first answer of a row, loaded where it is not; DeadlineError without the time.

        The first of all rows has no limit: without it there is nothing to report.
        """
        load = row.setting.load
        worker = self._workers.get(load, self._limit_s())
        if load not in self._loads:
            told = worker.told
            self._loads[load] = LoadRow(
                label=load.label,
                seconds=worker.seconds,
                load_s=told["load_s"],
                weight_bytes=told["weight_bytes"],
                peak_bytes=told["peak_bytes"],
            )
            self._weights_read[load] = (told["token_bytes"], told["dtype"])
        found = self._answer(row, self._limit_s())
        return Measured(
            warm_up=_sample(found),
            token_ids=found["token_ids"],
            proposed=found["proposed"],
            accepted=found["accepted"],
        )

    def _limit_s(self) -> float | None:
        """Return how long a first answer may take, so that the kept rows have their rounds."""
        left = self._before_rounds_s()
        return None if left is None or not self._measured else max(LEAST_LIMIT_S, left)

    def _answer(self, row: GridRow, limit_s: float | None = None) -> dict[str, Any]:
        worker = self._workers.get(row.setting.load)
        worker.use(row.setting)
        return worker.ask("answer", limit_s=limit_s, **self._request(row))

    def _request(self, row: GridRow) -> dict[str, Any]:
        return {
            "prompts": self._subject.prompts(self._options.text, row.workload),
            "new_tokens": row.workload.new_tokens,
            "use_cache": row.setting.cache,
            "method": row.setting.speculation,
        }

    def _score(self, rows: Sequence[GridRow]) -> None:
        """Score the text once for all rows that compute alike, the first row's being the reference."""
        alike: dict[tuple[str, ...], GridRow] = {}
        for row in (rows[0], *answer_order(rows, self._core_of(rows))):
            alike.setdefault(row.setting.numerics, row)
        per_token = [
            self._measured[row].warm_up.first_token_s
            / (row.workload.prompt_tokens * row.workload.batch)
            for row in alike.values()
        ]
        budget, allowed = self._options.budget_s, self._before_rounds_s()
        if budget is not None and allowed is not None:
            allowed = min(QUALITY_SHARE * budget, allowed)
        asked = self._options.quality_tokens
        most, count = scored(asked, per_token, allowed) if asked else (0, 0)
        windows = self._subject.windows(self._options.text, most) if most else []
        if most and not windows:
            self._note("there is no tokenizer, so quality was not measured")
            return
        self._num_scored = sum(len(window) - 1 for window in windows)
        with tempfile.TemporaryDirectory(prefix="hanok-bench-") as folder:
            file, done, longest = str(Path(folder, "log_probabilities")), 0, 0.0
            for row, s_per_token in list(zip(alike.values(), per_token, strict=True))[:count]:
                left = self._before_rounds_s()
                longest = max(longest, s_per_token * self._num_scored)
                if left is not None and longest > left:
                    break
                to_come = (count - done) * longest + MIN_ROUNDS * self._round_s()
                self._show(f"quality: {self._label(row)}", to_come)
                began = time.perf_counter()
                self._score_one(row, rows, "compare" if done else "keep", windows, file)
                longest, done = max(longest, time.perf_counter() - began), done + 1
        if not done:
            self._num_scored = 0
        if asked and done < len(alike):
            self._note(
                f"there was no time to score text with {len(alike) - done} of {len(alike)} settings "
                "(--budget)"
            )

    def _core_of(self, rows: Sequence[GridRow]) -> list[GridRow]:
        return [row for row in self._core if row in rows]

    def _score_one(
        self,
        row: GridRow,
        rows: Sequence[GridRow],
        kind: str,
        windows: list[list[int]],
        file: str,
    ) -> None:
        """Score the text as one row computes it, for all rows that compute alike."""
        worker = self._workers.get(row.setting.load)
        worker.use(row.setting)
        quality = Quality(**worker.ask(kind, windows=windows, file=file))
        for other in rows:
            if other.setting.numerics == row.setting.numerics:
                self._measured[other].quality = quality

    def _rounds(self, rows: Sequence[GridRow]) -> None:
        """Let all rows answer in turn, each round beginning one further on."""
        options, done = self._options, 0
        asked = options.rounds
        if asked is None and options.budget_s is None:
            asked = MIN_ROUNDS + 2
        longest, peaks_s = self._round_s(), self._peaks_s(rows)
        while has_time_for_a_round(
            done, longest, left_s=self._left_s(), later_s=peaks_s, asked=asked
        ):
            began = time.perf_counter()
            self._probes.append(self._probe.measure())
            for number, row in enumerate(rotated(rows, done)):
                rest = ((asked or MAX_ROUNDS) - done - 1) * longest
                in_round = longest * (len(rows) - number) / len(rows)
                left = self._left_s()
                if left is not None:
                    rest = max(0.0, min(left - peaks_s - in_round, rest))
                self._show(f"round {done + 1}: {self._label(row)}", rest + in_round + peaks_s)
                found = self._answer(row)
                self._measured[row].samples.append(_sample(found))
                if found["token_ids"] != self._measured[row].token_ids:
                    self._note(f"{self._label(row)}: its text differs from time to time")
            done += 1
            longest = max(longest, time.perf_counter() - began)
        wanted = asked or MIN_ROUNDS
        if done < wanted:
            self._note(f"there was time for {done} of {wanted} rounds (--budget)")

    def _compare_texts(self, rows: Sequence[GridRow]) -> None:
        """Find where each row's text leaves that of its workload's first row, and by how little."""
        for row in rows:
            first = next(other for other in rows if other.workload == row.workload)
            ours, theirs = self._measured[row].token_ids, self._measured[first].token_ids
            place = first_difference(theirs, ours)
            if place is None:
                continue
            prompt, token = place
            worker = self._workers.get(first.setting.load)
            worker.use(first.setting)
            prompts = self._subject.prompts(self._options.text, row.workload)
            told = worker.ask(
                "gap",
                tokens=prompts[prompt] + theirs[prompt][:token],
                own=theirs[prompt][token],
                other=ours[prompt][token],
            )
            self._measured[row].difference = Difference(prompt=prompt, token=token, gap=told["gap"])

    def _peak_s(self, row: GridRow) -> float:
        load = self._loads[row.setting.load]
        costs = replace(self._costs(), load_s=load.load_s)
        return peak_s(self._measured[row].warm_up.seconds, costs)

    def _peaks_s(self, rows: Sequence[GridRow]) -> float:
        """Return about how long it takes to find the peaks."""
        return self._costs().process_s + sum(map(self._peak_s, rows))

    def _find_peaks(self, rows: Sequence[GridRow]) -> None:
        """Let each row answer once in a process of its own, as far as there is time.

        What libraries keep of earlier rows would count against later ones otherwise: torch keeps code
        for each shape it multiplies, 100 MB of it after a few hundred lengths.
        """
        whole, missing = self._peaks_s(rows), 0
        process, start_s = None, self._costs().process_s
        try:
            for number, row in enumerate(answer_order(rows, self._core_of(rows))):
                left = self._left_s()
                if left is not None and left < self._peak_s(row) + start_s:
                    missing += 1
                    continue
                self._show(f"peak: {self._label(row)}", whole * (1 - number / len(rows)))
                process, start_s = process or Process(), 0.0
                steps = [
                    {"do": "load", **self._workers.load_request(row.setting.load)},
                    {"do": "use", **chosen_settings(row.setting)},
                    {"do": "answer", **self._request(row)},
                    {"do": "peak"},
                ]
                told = process.ask("apart", steps=steps)
                self._measured[row].peak_bytes = told["peak_bytes"]
                self._measured[row].peak_device_bytes = told["peak_device_bytes"]
        finally:
            if process is not None:
                process.close()
        if missing:
            self._note(
                f"there was no time to find {missing} of {len(rows)} peaks of memory (--budget)"
            )

    def _finished(self, rows: Sequence[GridRow]) -> Report:
        # Other programs may have disturbed any product. Reads of a round may be of large caches.
        products = max(item.gflop_per_s for item in (self._best, *self._probes))
        best = replace(self._best, gflop_per_s=products)
        made, level = finished_rows(
            [(row, self._measured[row]) for row in rows],
            self._subject.config,
            self._weights_read,
            best,
            self._label,
        )
        cores = [
            sample.foreign for row in made for sample in row.samples if sample.foreign is not None
        ]
        if cores and sum(cores) / len(cores) > DISTURBED_CORES:
            self._note(
                f"other programs used {sum(cores) / len(cores):.1f} cores meanwhile: figures are "
                "disturbed"
            )
        return Report(
            checkpoint=self._subject.described(),
            machine=machine_facts(),
            versions=versions(),
            command=shlex.join(["hanok", *sys.argv[1:]]),
            started=self._started,
            seconds=self._done_s(),
            rounds=len(self._probes),
            level=level,
            quality_tokens=self._num_scored,
            gb_per_s=best.gb_per_s,
            gflop_per_s=best.gflop_per_s,
            probes=tuple(self._probes),
            loads=tuple(self._loads.values()),
            rows=tuple(made),
            skipped=tuple(self._skipped),
            notes=tuple(self._notes),
        )

    def _label(self, row: GridRow) -> str:
        return row.setting.label(self._subject.dtype)

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)


def first_difference(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]
) -> tuple[int, int] | None:
    """Return the first prompt whose tokens differ and the first of them that does; None: none."""
    for prompt, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        for token, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one != other:
                return prompt, token
    return None


def _combinations(axes: Sequence[Axes]) -> list[tuple[Setting, Workload]]:
    return [item for group in axes for item in group.combinations()]


def _timing(found: Measured) -> Timing:
    return Timing(seconds=found.warm_up.seconds, first_token_s=found.warm_up.first_token_s)


def _sample(found: dict[str, Any]) -> Sample:
    return Sample(
        seconds=found["seconds"], first_token_s=found["first_token_s"], foreign=found["foreign"]
    )
