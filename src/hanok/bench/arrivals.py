"""When requests come and how long they are: drawn, or read from a trace. All of it is fixed beforehand.

A trace is Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's JSON lines (timestamp in
milliseconds, input_length, output_length, hash_ids: the prompt's blocks, the same number for the same
tokens). Times count from the trace's first request.
"""

import csv
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hanok.errors import OptionError, RequestError
from hanok.text_files import read_text

HASHED_TOKENS = 512  # of Mooncake's blocks
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request to come."""

    at_s: float
    prompt_tokens: int
    new_tokens: int
    blocks: tuple[int, ...] = ()
    """What the prompt begins with: equal numbers are equal tokens, `block_tokens` of each."""
    block_tokens: int = HASHED_TOKENS


def poisson(
    rate: float, duration_s: float, *, prompt_tokens: int, new_tokens: int, seed: int
) -> list[Arrival]:
    """Return arrivals of a Poisson process: independent, exponentially distributed gaps."""
    for name, value in (("rate", rate), ("duration", duration_s)):
        if not (value > 0 and math.isfinite(value)):
            raise OptionError(f"the {name} is {value:g}; it must be greater than 0.")
    numbers, at, found = random.Random(seed), 0.0, []
    while (at := at + numbers.expovariate(rate)) < duration_s:
        found.append(Arrival(at_s=at, prompt_tokens=prompt_tokens, new_tokens=new_tokens))
    if not found:
        raise OptionError(
            f"no request comes within {duration_s:g} s at {rate:g} requests/s. Ask for a longer "
            "duration or a higher rate."
        )
    return found


def read_trace(
    file: Path,
    *,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
    duration_s: float | None = None,
) -> list[Arrival]:
    """Return a trace's requests in the order of their times.

    `time_scale` multiplies times (0.5: twice as fast), `length_scale` prompts and answers, which keep at
    least one token. What comes at `duration_s` or later, scaled, is left out.
    Raises OptionError for scales that are not positive, RequestError for a file that is not a trace.
    """
    for name, value in (("time scale", time_scale), ("length scale", length_scale)):
        if not (value > 0 and math.isfinite(value)):
            raise OptionError(f"the {name} is {value:g}; it must be greater than 0.")
    text = read_text(file)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise RequestError(f"{file} has no request.")
    read = _mooncake if lines[0][1].lstrip().startswith("{") else _azure
    raw = sorted(_checked(file, read, lines), key=lambda item: item.at_s)
    if not raw:
        raise RequestError(f"{file} has no request.")
    found = [
        Arrival(
            at_s=(item.at_s - raw[0].at_s) * time_scale,
            prompt_tokens=max(1, round(item.prompt_tokens * length_scale)),
            new_tokens=max(1, round(item.new_tokens * length_scale)),
            blocks=item.blocks,
            block_tokens=max(1, round(HASHED_TOKENS * length_scale)),
        )
        for item in raw
    ]
    return [item for item in found if duration_s is None or item.at_s < duration_s]


Lines = list[tuple[int, str]]
Row = tuple[int, Callable[[], Arrival]]


def _checked(file: Path, read: Callable[[Lines], Iterable[Row]], lines: Lines) -> Iterator[Arrival]:
    for number, parse in read(lines):
        try:
            arrival = parse()
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise RequestError(
                f"{file}, line {number} is not a request ({type(error).__name__}: {error}). A trace is "
                f"CSV with the columns {', '.join(AZURE)}, or JSON lines with {', '.join(MOONCAKE)}."
            ) from None
        if arrival.prompt_tokens < 0 or arrival.new_tokens < 0 or not math.isfinite(arrival.at_s):
            raise RequestError(f"{file}, line {number}: a time or a length cannot be: {arrival}.")
        yield arrival


def _azure(lines: Lines) -> Iterator[Row]:
    (number, first), *rest = lines
    header = [name.strip() for name in next(csv.reader([first]))]

    def parse(line: str) -> Arrival:
        at, prompt, new = (next(csv.reader([line]))[header.index(name)].strip() for name in AZURE)
        return Arrival(at_s=_seconds(at), prompt_tokens=int(prompt), new_tokens=int(new))

    yield from (
        (number, lambda line=line: parse(line)) for number, line in rest or [(number, first)]
    )


def _seconds(text: str) -> float:
    """Return a date and time, which is UTC where it names no zone, as seconds."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _mooncake(lines: Lines) -> Iterator[Row]:
    def parse(line: str) -> Arrival:
        found = json.loads(line)
        at, prompt, new = (found[name] for name in MOONCAKE)
        return Arrival(
            at_s=float(at) / 1000,
            prompt_tokens=int(prompt),
            new_tokens=int(new),
            blocks=tuple(map(int, found.get("hash_ids", ()))),
        )

    yield from ((number, lambda line=line: parse(line)) for number, line in lines)
