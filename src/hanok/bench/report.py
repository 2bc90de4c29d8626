"""The report of a benchmark: plain data, written as JSON and read back exactly, or refused."""

import json
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hanok.bench.grid import Skipped
from hanok.bench.intervals import Interval, Verdict
from hanok.bench.settings import Setting, Workload
from hanok.checkpoint.writer import write_json
from hanok.errors import OptionError

FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer, timed."""

    seconds: float
    first_token_s: float
    foreign: float | None
    """CPU cores that other programs used meanwhile; None: this system does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where a text leaves the reference's."""

    prompt: int
    """Which of the batch, from 0."""
    token: int
    """Which new token, from 0."""
    gap: float
    """By how much the reference's own token scores above this one there, in the reference's logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How a setting scores a text, and how far that is from the reference."""

    perplexity: float | None
    """None if the model computes NaN."""
    kl_mean: float | None
    """KL divergence from the reference, in nats for each token."""
    kl_p99: float | None
    same_top1: float
    """Share of tokens whose likeliest continuation is the reference's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting with one workload."""

    setting: Setting
    workload: Workload
    label: str
    is_reference: bool
    """Whether it is what the other rows of its workload are compared with."""
    samples: tuple[Sample, ...]
    """One for each round."""
    warmup_s: float
    """The answer before the first round, which is not counted."""
    seconds: float
    """Median, as are the next four."""
    seconds_min: float
    seconds_max: float
    s_per_token: float
    """Of the whole answer, its prompt included."""
    tokens_per_s: float | None
    """Behind the first token, of all sequences together; None where there is only one token."""
    first_token_s: float
    ratio: Interval
    """How many times as fast as the reference, for the whole answer."""
    verdict: Verdict
    peak_bytes: int | None
    """Of a process that loads and answers once and nothing else, libraries included; None: no time."""
    peak_device_bytes: int | None
    """Of a GPU's memory; None without a GPU."""
    bandwidth_share: float | None
    """What decoding reads, weights, keys and values, over what the memory can; None: not known."""
    flop_share: float | None
    """What the prompt computes over what the machine can; None: not known."""
    is_same_text: bool
    difference: Difference | None
    quality: Quality | None
    """None where it was not measured."""
    proposed: int | None
    """Drafted tokens; None without speculation."""
    accepted: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRow:
    """One load, which several rows share."""

    label: str
    seconds: float
    """From the start of its process until the model is there."""
    load_s: float
    """Of loading alone."""
    weight_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the machine could do in one round, by torch alone."""

    gb_per_s: float
    gflop_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What was measured."""

    name: str
    fingerprint: str
    family: str
    num_parameters: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows of one run."""

    format: Literal[1] = 1
    checkpoint: Subject
    machine: dict[str, str]
    versions: dict[str, str]
    command: str
    started: str
    seconds: float
    rounds: int
    level: float
    """Certainty that each comparison was asked for."""
    quality_tokens: int
    """Tokens that were scored; 0: none."""
    gb_per_s: float
    """At which the machine reads memory, the best of several tries; what shares are of."""
    gflop_per_s: float
    probes: tuple[Probe, ...]
    """One for each round."""
    loads: tuple[LoadRow, ...]
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


def write_report(report: Report, path: Path) -> None:
    """Write a report as JSON, all of it or nothing."""
    write_json(path, asdict(report))


def read_report(path: Path) -> Report:
    """Read a report; OptionError for another file, or one of another format."""
    kind = FileKind(
        key="format", number=FORMAT, what="a report of `hanok bench`", writer="its --json"
    )
    return read_file(Report, path, kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """What a JSON file has to be."""

    key: str
    """The field that holds the format's number."""
    number: int
    what: str
    writer: str


def read_file(data: type[T], path: Path, kind: FileKind) -> T:
    """Read a JSON file as plain data; OptionError when it is not of its kind."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise OptionError(f"{path} is not JSON; give a file that {kind.writer} wrote.") from None
    if not isinstance(values, dict) or values.get(kind.key) != kind.number:
        raise OptionError(
            f"{path} is not {kind.what} in format {kind.number}; give a file that {kind.writer} wrote."
        )
    found: T = read_as(data, values, str(path))
    return found


def read_as(kind: Any, value: Any, where: str) -> Any:
    """Return plain data as what a type says; OptionError names the place where it is not."""
    if is_dataclass(kind):
        return _read_fields(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = next(item for item in arguments if item is not type(None))
        return None if value is None else read_as(inner, value, where)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, list):
        return tuple(
            read_as(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)
        )
    elif origin is dict and isinstance(value, dict):
        return {key: read_as(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise OptionError(f"{where} is {value!r}, which does not belong there.")


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    names = {item.name for item in fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        wrong = (
            sorted(names.symmetric_difference(value)) if isinstance(value, dict) else "no object"
        )
        raise OptionError(f"{where} does not have the fields of {kind.__name__}: {wrong}.")
    hints = get_type_hints(kind)
    return kind(**{name: read_as(hints[name], value[name], f"{where}.{name}") for name in names})
