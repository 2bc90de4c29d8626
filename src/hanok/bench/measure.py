"""Measures a grid: loads, one answer of each row to warm up, quality, then rounds of all rows in turn.

What a row takes is known after its first answer; what does not fit the time is left out then, by what
the answers before it say, and the report says so.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hanok.bench.grid import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    GridPlan,
    GridRow,
    Skipped,
    Timing,
    estimate_s,
    has_time_for_a_round,
    pilot,
    plan_grid,
    quality_tokens,
    rotated,
    why_too_slow,
)
from hanok.bench.machine import MachineProbe, machine_facts, versions
from hanok.bench.report import Difference, LoadRow, Probe, Quality, Report, Sample
from hanok.bench.rows import Measured, finished_rows
from hanok.bench.settings import Axes, Load, Setting
from hanok.bench.subject import SubjectModel, rooms
from hanok.bench.workers import LoadOptions, Process, Workers, chosen_settings
from hanok.errors import HanokError, OptionError

# Until Python has imported torch; to copy such a process and end it takes a fourth.
PROCESS_S = 1.5
DISTURBED_CORES = 0.2  # used by others, beyond which a report says so
Progress = Callable[[str, float, float | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured, and for how long."""

    load: LoadOptions
    axes: tuple[Axes, ...]
    text: str
    """What prompts are cut from, and what is scored."""
    reference: Setting | None = None
    """What the others are compared with; None: the first row of each workload."""
    budget_s: float | None = None
    """How long all of it may take; None: as long as it does."""
    rounds: int | None = None
    """None: as many as the time allows."""
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
        self._began = time.perf_counter()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        if options.load.threads is not None:
            import torch

            torch.set_num_threads(options.load.threads)
        self._subject = SubjectModel(options.load)
        combinations = [item for axes in options.axes for item in axes.combinations()]
        self._plan: GridPlan = plan_grid(combinations, self._subject.facts(), options.reference)
        self._skipped: list[Skipped] = list(self._plan.skipped)
        self._measured: dict[GridRow, Measured] = {}
        self._loads: dict[Load, LoadRow] = {}
        self._token_bytes: dict[Load, tuple[int, int]] = {}
        self._notes: list[str] = []
        self._workers = Workers(
            options.load, rooms([(row.setting.load, row.workload) for row in self._plan.rows])
        )
        self._probe = MachineProbe(self._subject.device)
        self._best = self._probe.best()
        self._probes: list[Probe] = []
        self._num_scored = 0

    def report(self) -> Report:
        """Measure, and return what was found."""
        rows = self._plan.rows
        with self._workers:
            self._warm_up(rows)
            kept = [row for row in rows if row in self._measured]
            if not kept:
                reasons = "\n".join(f"  {item.reason}" for item in self._skipped)
                raise OptionError(f"no row could be measured:\n{reasons}")
            self._score(kept)
            self._rounds(kept)
            self._compare_texts(kept)
            self._workers.close_all()
            self._find_peaks(kept)
        return self._finished(kept)

    # Time

    def _left_s(self) -> float | None:
        budget = self._options.budget_s
        return None if budget is None else budget - (time.perf_counter() - self._began)

    def _show(self, what: str, to_come_s: float | None) -> None:
        done = time.perf_counter() - self._began
        self._progress(what, done, None if to_come_s is None else done + to_come_s)

    def _round_s(self) -> float:
        return sum(item.warm_up.seconds for item in self._measured.values())

    # The parts of a run

    def _warm_up(self, rows: Sequence[GridRow]) -> None:
        """Let each row answer once; leave out what does not fit the time, or fails."""
        first = pilot(rows)
        for row in (first, *(row for row in rows if row != first)):
            timings = {
                other: Timing(
                    seconds=item.warm_up.seconds, first_token_s=item.warm_up.first_token_s
                )
                for other, item in self._measured.items()
            }
            expected_s = estimate_s(row, timings)
            to_come = sum(estimate_s(other, timings) or 0.0 for other in rows)
            self._show(f"first answer: {self._label(row)}", to_come * (1 + MIN_ROUNDS))
            reason = self._why_too_slow(row, expected_s) if expected_s is not None else None
            if reason is None:
                try:
                    self._measured[row] = self._first_answer(row)
                except HanokError as error:
                    reason = str(error)
            if reason is not None:
                self._skipped.append(Skipped(row=row, reason=reason))

    def _why_too_slow(self, row: GridRow, expected_s: float) -> str | None:
        budget, left = self._options.budget_s, self._left_s()
        if budget is None or left is None:
            return None
        if row.setting.load not in self._loads and self._loads:
            expected_s += max(item.seconds for item in self._loads.values()) / (1 + MIN_ROUNDS)
        return why_too_slow(expected_s, self._round_s(), left, budget)

    def _first_answer(self, row: GridRow) -> Measured:
        load = row.setting.load
        worker = self._workers.get(load)
        if load not in self._loads:
            told = worker.told
            self._loads[load] = LoadRow(
                label=load.label,
                seconds=worker.seconds,
                load_s=told["load_s"],
                weight_bytes=told["weight_bytes"],
                peak_bytes=told["peak_bytes"],
            )
            self._token_bytes[load] = (told["token_bytes"], told["cache_token_bytes"])
        found = self._answer(row)
        return Measured(
            warm_up=_sample(found),
            token_ids=found["token_ids"],
            proposed=found["proposed"],
            accepted=found["accepted"],
        )

    def _answer(self, row: GridRow) -> dict[str, Any]:
        worker = self._workers.get(row.setting.load)
        worker.use(row.setting)
        return worker.ask("answer", **self._request(row))

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
        for row in rows:
            alike.setdefault(row.setting.numerics, row)
        per_token = min(
            self._measured[row].warm_up.first_token_s
            / (row.workload.prompt_tokens * row.workload.batch)
            for row in rows
        )
        most = self._options.quality_tokens
        if most:
            most = quality_tokens(most, per_token, len(alike), self._options.budget_s)
        windows = self._subject.windows(self._options.text, most) if most else []
        if not windows:
            if most:
                self._notes.append("there is no tokenizer, so quality was not measured")
            return
        self._num_scored = sum(len(window) - 1 for window in windows)
        with tempfile.TemporaryDirectory(prefix="hanok-bench-") as folder:
            file = str(Path(folder, "log_probabilities"))
            for number, (numerics, row) in enumerate(alike.items()):
                rest = (len(alike) - number) * per_token * self._num_scored
                self._show(f"quality: {self._label(row)}", rest + MIN_ROUNDS * self._round_s())
                worker = self._workers.get(row.setting.load)
                worker.use(row.setting)
                kind = "compare" if number else "keep"
                quality = Quality(**worker.ask(kind, windows=windows, file=file))
                for other in rows:
                    if other.setting.numerics == numerics:
                        self._measured[other].quality = quality

    def _rounds(self, rows: Sequence[GridRow]) -> None:
        """Let all rows answer in turn, each round beginning one further on."""
        options, done = self._options, 0
        asked = options.rounds
        if asked is None and options.budget_s is None:
            asked = MIN_ROUNDS + 2
        longest, peaks_s = self._round_s(), self._peaks_s(rows)
        while has_time_for_a_round(done, longest + peaks_s, self._left_s(), asked):
            began = time.perf_counter()
            self._probes.append(self._probe.measure())
            for number, row in enumerate(rotated(rows, done)):
                rest = (asked - done - 1 if asked is not None else 0) * longest
                in_round = longest * (len(rows) - number) / len(rows)
                left = self._left_s()
                if asked is None and left is not None:
                    rest = max(
                        0.0, min(left - peaks_s - in_round, (MAX_ROUNDS - done - 1) * longest)
                    )
                to_come = rest + in_round + peaks_s
                self._show(f"round {done + 1}: {self._label(row)}", to_come)
                found = self._answer(row)
                self._measured[row].samples.append(_sample(found))
                if found["token_ids"] != self._measured[row].token_ids:
                    self._note(f"{self._label(row)}: its text differs from time to time")
            done += 1
            longest = max(longest, time.perf_counter() - began)

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

    def _peaks_s(self, rows: Sequence[GridRow]) -> float:
        """Return about how long it takes to find the peaks."""
        loads = sum(self._loads[row.setting.load].load_s for row in rows)
        return PROCESS_S * (1 + len(rows) / 4) + loads + 2 * self._round_s()

    def _find_peaks(self, rows: Sequence[GridRow]) -> None:
        """Let each row answer once in a process of its own, as far as there is time.

        What libraries keep of earlier rows would count against later ones otherwise: torch keeps code
        for each shape it multiplies, 100 MB of it after a few hundred lengths.
        """
        whole, missing = self._peaks_s(rows), 0
        process = Process()
        try:
            for number, row in enumerate(rows):
                left, load = self._left_s(), row.setting.load
                if left is not None and left < self._loads[load].load_s:
                    missing += 1
                    continue
                self._show(f"peak: {self._label(row)}", whole * (1 - number / len(rows)))
                steps = [
                    {"do": "load", **self._workers.load_request(load)},
                    {"do": "use", **chosen_settings(row.setting)},
                    {"do": "answer", **self._request(row)},
                    {"do": "peak"},
                ]
                told = process.ask("apart", steps=steps)
                self._measured[row].peak_bytes = told["peak_bytes"]
                self._measured[row].peak_device_bytes = told["peak_device_bytes"]
        finally:
            process.close()
        if missing:
            self._note(
                f"there was no time to find {missing} of {len(rows)} peaks of memory (--budget)"
            )

    def _finished(self, rows: Sequence[GridRow]) -> Report:
        made, level = finished_rows(
            [(row, self._measured[row]) for row in rows],
            self._subject.config,
            self._token_bytes,
            self._best,
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
            seconds=time.perf_counter() - self._began,
            rounds=len(self._probes),
            level=level,
            quality_tokens=self._num_scored,
            gb_per_s=self._best.gb_per_s,
            gflop_per_s=self._best.gflop_per_s,
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


def _sample(found: dict[str, Any]) -> Sample:
    return Sample(
        seconds=found["seconds"], first_token_s=found["first_token_s"], foreign=found["foreign"]
    )
