"""The report of benchmarks/gpu.py: a page that is written anew after every part."""

import importlib.metadata
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import measure
import torch
from gpu_checks import Checked
from gpu_contestants import COPY, LARGEST_ERROR, PLAIN, TRANSFORMERS, Turn
from gpu_parts import Clock, Contender, Round
from gpu_workers import Failure

from hanok.bench.spread import Spread

# What issue 3 asks for.
COPY_SHARE, INT8_RATIO, INT4_RATIO, CALL_RATIO = 0.8, 1.6, 2.5, 0.9
COPY_TURN = Turn(contestant=COPY, kind="copy")
DRY_NOTE = "**Dry run on a CPU: the figures mean nothing.**"
NONE = "–"
LISTED_CASES = 3  # of a row; the JSON lines have all


class Report:
    """A heading and sections; each is printed when it comes, and all are written to the file."""

    def __init__(self, output: Path | None, *, note: str, is_dry: bool) -> None:
        title = "One GPU: kernels, decoding, calls and training of an 8B-shaped model"
        self._output, self._is_dry = output, is_dry
        self._parts: list[str] = []
        self._append(
            "\n".join(
                [
                    measure.heading(title, torch.get_num_threads()),
                    f"- GPU: {'none, Triton interpreted on this CPU' if is_dry else gpu_line()}",
                    f"- CUDA {torch.version.cuda}, triton {importlib.metadata.version('triton')}",
                    *([f"- Note: {note}"] if note else []),
                ]
            )
        )

    def add(self, title: str, clock: Clock | None, *paragraphs: str) -> None:
        """Add a section about a part, whose clock this is; empty paragraphs are left out."""
        note = DRY_NOTE if self._is_dry else ""
        took = ""
        if clock is not None:
            bound_s = max(0.0, clock.budget_s)
            took = f"Took {clock.budget_s - clock.left_s():.0f} s of at most {bound_s:.0f} s."
        self._append("\n\n".join(filter(None, [f"## {title}", note, took, *paragraphs])))

    def _append(self, text: str) -> None:
        print(text, end="\n\n", flush=True)
        self._parts.append(text)
        if self._output is not None:
            self._output.write_text("\n\n".join(self._parts) + "\n", encoding="utf-8")


def gpu_line() -> str:
    """Return the GPU's name, driver, memory, power limit and highest clock."""
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"{torch.cuda.get_device_name()}, its driver is not known: there is no nvidia-smi"
    name, driver, memory, power, clock = found.splitlines()[0].split(", ")
    return f"{name}, driver {driver}, {memory}, power limit {power}, up to {clock}"


def bullets(lines: Iterable[str]) -> str:
    """Return a list, or nothing."""
    return "\n".join(f"- {line}" for line in lines)


# Kernels


def kernel_table(checked: Sequence[Checked]) -> str:
    """Return one line for each row."""
    lines = []
    for item in checked:
        closest, error, tolerance = NONE, NONE, NONE
        if item.closest:
            case, value = item.closest
            closest, error, tolerance = case.name, f"{value:.2g}", f"{case.tolerance:.2g}"
        tried = f"{len(item.answers)} of {len(item.cases)}"
        lines.append([item.row, tried, closest, error, tolerance, item.verdict])
    header = ("kernel", "shapes", "closest to its tolerance", "error", "tolerance", "verdict")
    return measure.table(header, lines)


def kernel_failures(checked: Sequence[Checked]) -> list[str]:
    """Return a line for the first cases of a row that failed, and for rows that ended by themselves."""
    found = []
    for item in checked:
        for case, answer in item.wrong[:LISTED_CASES]:
            text = (
                answer.text
                if isinstance(answer, Failure)
                else f"error {answer:.2g} > {case.tolerance:.2g}"
            )
            found.append(f"FAILED: {item.row}: {case.name}: {text}")
        if len(item.wrong) > LISTED_CASES:
            found.append(f"FAILED: {item.row}: {len(item.wrong)} of {len(item.answers)} shapes")
        if item.end and not item.is_out_of_time:
            case = item.cases[len(item.answers)]
            found.append(f"FAILED: {item.row}: {case.name}: {item.end}")
    return found


def kernels_left_out(checked: Sequence[Checked]) -> list[str]:
    """Return what there was no time for, in one line."""
    cases = sum(len(item.cases) - len(item.answers) for item in checked if item.is_out_of_time)
    rows = sum(item.is_out_of_time for item in checked)
    return [f"Left out for want of time: {cases} shapes in {rows} rows"] if rows else []


# Contestants and rounds


def contestant_table(contenders: Sequence[Contender]) -> str:
    """Return one line for each contestant."""
    lines = []
    for item in contenders:
        error = max(item.recorded_errors.values(), default=None)
        lines.append(
            [
                item.name,
                f"{item.bytes_per_step / 1e9:.2f}",
                len(item.turns),
                NONE if error is None else f"{error:.2g}",
                NONE if error is None else f"{LARGEST_ERROR:.2g}",
                "FAILED" if contestant_failures([item]) else "left out" if item.left_out else "ok",
            ]
        )
    header = ("contestant", "GB a step", "turns", "recorded logits, error", "tolerance", "verdict")
    return measure.table(header, lines)


def contestant_failures(contenders: Sequence[Contender]) -> list[str]:
    """Return a line for each turn that failed, or whose recorded step is wrong."""
    found = []
    for item in contenders:
        found += [f"FAILED: {line}" for line in item.failures]
        found += [
            f"FAILED: {turn}: recorded logits are wrong, error {error:.2g} > {LARGEST_ERROR:.2g}"
            for turn, error in item.recorded_errors.items()
            if not error <= LARGEST_ERROR
        ]
    return found


def notes(contenders: Sequence[Contender]) -> list[str]:
    """Return what failed so far and what there was no time for."""
    late = [f"Left out: {line}" for item in contenders for line in item.left_out]
    return contestant_failures(contenders) + late


def rounds_left_out(turns: Sequence[Turn], rounds: Sequence[Round], runs: int) -> list[str]:
    """Return which turns have no figure, and how many rounds there was no time for."""
    missing = [str(turn) for turn in turns if not any(turn in item for item in rounds)]
    found = [f"Left out, without a figure: {'; '.join(missing)}"] if missing else []
    if len(rounds) < runs:
        found.append(f"Left out: {runs - len(rounds)} of {runs} rounds")
    return found


def decode_table(
    turns: Sequence[Turn], rounds: Sequence[Round], bytes_per_step: Mapping[str, int]
) -> str:
    """Return one line for each turn that has a figure."""
    lines = []
    for turn in turns:
        values = [item[turn] for item in rounds if turn in item]
        if turn.kind != "decode" or not values:
            continue
        plain = replace(turn, contestant=PLAIN)
        theirs = replace(turn, contestant=TRANSFORMERS, graphs=False)
        size = bytes_per_step[turn.contestant]
        lines.append(
            [
                turn.contestant,
                turn.batch,
                "yes" if turn.graphs else "no",
                Spread.of(values),
                times(rounds, turn, replace(turn, graphs=False)) if turn.graphs else NONE,
                times(rounds, turn, plain),
                times(rounds, turn, theirs),
                Spread.of(gb_per_s(turn, value, size) for value in values),
                times_copies(rounds, turn, size),
            ]
        )
    header = (
        *("weights", "batch", "CUDA graphs", "tokens/s", "× without graphs", "× our bfloat16"),
        *("× transformers", "weights read, GB/s", "× copies"),
    )
    return measure.table(header, lines)


def call_table(turns: Sequence[Turn], rounds: Sequence[Round]) -> str:
    """Return one line for each contestant that has a figure."""
    lines = []
    for turn in turns:
        values = [item[turn] for item in rounds if turn in item]
        if turn.kind == "call" and values:
            others = (
                times(rounds, turn, replace(turn, contestant=n)) for n in (PLAIN, TRANSFORMERS)
            )
            lines.append([turn.contestant, Spread.of(values), *others])
    return measure.table(("weights", "tokens/s", "× our bfloat16", "× transformers"), lines)


def copy_line(rounds: Sequence[Round]) -> str:
    """Return the copy bandwidth in a sentence, or nothing."""
    values = [item[COPY_TURN] for item in rounds if COPY_TURN in item]
    if not values:
        return ""
    return (
        f"Copies within the device: {Spread.of(values)} GB/s, a byte counted once. What only "
        "reads can be up to twice as fast."
    )


def asked_table(
    decoding: Sequence[Round],
    calls: Sequence[Round],
    batch: int,
    bytes_per_step: Mapping[str, int],
) -> str:
    """Return what issue 3 asks for, what was measured, and whether that is enough."""
    plain = Turn(contestant=PLAIN, kind="decode", batch=batch, graphs=True)
    call = Turn(contestant=PLAIN, kind="call")
    size = bytes_per_step.get(PLAIN, 0)
    read = [
        {**item, plain: gb_per_s(plain, item[plain], size)} for item in decoding if plain in item
    ]
    wanted = [
        ("bfloat16 decoding, share of the copy bandwidth", COPY_SHARE, read, plain, COPY_TURN),
        *(
            (
                f"{name} decoding, times our bfloat16",
                least,
                decoding,
                replace(plain, contestant=name),
                plain,
            )
            for name, least in (("int8", INT8_RATIO), ("int4", INT4_RATIO))
        ),
        (
            "int4, calls of many tokens, times our bfloat16",
            CALL_RATIO,
            calls,
            replace(call, contestant="int4"),
            call,
        ),
    ]
    lines = []
    for what, least, rounds, first, second in wanted:
        pair = both(rounds, first, second)
        if not pair[0]:
            lines.append([what, f"≥ {least:g}", NONE, "not measured"])
            continue
        found = Spread.of_ratio(*pair)
        lines.append([what, f"≥ {least:g}", found, "yes" if found.median >= least else "no"])
    return measure.table(("asked", "", "measured", "met"), lines)


def gb_per_s(turn: Turn, tokens_per_s: float, bytes_per_step: int) -> float:
    """Return the GB of weights that a turn read per second."""
    return bytes_per_step * tokens_per_s / turn.batch / 1e9


def times_copies(rounds: Sequence[Round], turn: Turn, bytes_per_step: int) -> str:
    """Return a turn's reading as a multiple of the copy bandwidth, a copied byte counted once."""
    tokens, copies = both(rounds, turn, COPY_TURN)
    read = [gb_per_s(turn, item, bytes_per_step) for item in tokens]
    return str(Spread.of_ratio(read, copies)) if read else NONE


def times(rounds: Sequence[Round], first: Turn, second: Turn) -> str:
    """Return how many times as fast the first is, with the spread of the rounds."""
    pair = both(rounds, first, second)
    return str(Spread.of_ratio(*pair)) if pair[0] and first != second else NONE


def both(rounds: Sequence[Round], first: Turn, second: Turn) -> tuple[list[float], list[float]]:
    """Return the values of two turns in the rounds that have both."""
    found = [item for item in rounds if first in item and second in item]
    return [item[first] for item in found], [item[second] for item in found]
