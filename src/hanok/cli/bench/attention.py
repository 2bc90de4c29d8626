"""`hanok bench attention`: attention backends side by side, on the shapes that are asked for."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hanok.cli.bench_options import BUDGET_S
from hanok.cli.units import finite, size
from hanok.errors import OptionError

if TYPE_CHECKING:
    from hanok.bench.attention import AttentionCase, AttentionReport, CaseResult
    from hanok.bench.multiples import Group, MultiplesReport
    from hanok.bench.spread import Spread

PIPED_WIDTH = 160
HEADER = (
    "backend",
    "time, µs",
    "times as fast",
    "GB/s",
    "share",
    "GFLOP/s",
    "share",
    "memory",
    "largest error",
    "relative error",
)
MULTIPLES_HEADER = ("size", "multiple of", "time, µs", "time per FLOP")


class Counts(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them."""

    name = "N,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers; a number below 1 is refused."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 1,512", param, ctx)
        if min(found) < 1:
            self.fail(f"{value!r}: each number must be at least 1", param, ctx)
        return tuple(dict.fromkeys(found))


@click.command("attention", short_help="Compare attention backends: time, memory, error.")
@click.option("--batch", default=1, show_default=True, help="Sequences.")
@click.option("--heads", default=32, show_default=True, help="Query heads.")
@click.option("--kv-heads", default=4, show_default=True, help="KV heads.")
@click.option("--head-dim", default=64, show_default=True, help="Width of a head.")
@click.option(
    "--queries", type=Counts(), default="1,512", show_default=True, help="New tokens of a sequence."
)
@click.option(
    "--keys",
    type=Counts(),
    default="512,4096,16384",
    show_default=True,
    help="Tokens of a sequence in all, the new ones included.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Of queries, keys and values.",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    show_default=True,
    help="Of the cache; auto: as --dtype.",
)
@click.option("--window", type=int, help="Tokens a query sees.  [default: all]")
@click.option("--softcap", type=float, help="Cap of the scores.  [default: none]")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda:0, …")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]")
@click.option("--rounds", default=7, show_default=True, help="Rounds in which all take turns.")
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(0, min_open=True),
    default=BUDGET_S,
    show_default=True,
    help="Seconds that all of it may take: what is slow gets fewer rounds, or none.",
)
@click.option(
    "--ring-mib",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    help="Caches that calls go round, in MiB, so that they come from memory.",
)
@click.option(
    "--multiples",
    type=int,
    is_flag=False,
    flag_value=2048,
    metavar="[SIZE]",
    help="Measure instead what multiples of 8 and 64 bring: products around SIZE (2048), attention "
    "around --head-dim; --queries are the tokens, of --keys the largest counts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the tables to this file.",
)
def command(  # noqa: PLR0913 (click passes each option as an argument)
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: str,
    cache_dtype: str,
    window: int | None,
    softcap: float | None,
    device: str,
    threads: int | None,
    rounds: int,
    budget_s: float,
    ring_mib: int,
    multiples: int | None,
    as_json: bool,
    markdown: Path | None,
) -> None:
    """Compare every attention backend on layers of the given shape.

    Times are medians (smallest–largest) of rounds in which backends take turns, warm-up apart; ratios
    are to the first row. GB/s counts keys, values, queries and results once, GFLOP/s the two products
    over the keys that are seen; shares are of what this machine was measured to do. Memory is what the
    process grew by at most during a call, the result included, in whole pages. Errors are those to
    float64: the largest, and the root mean square over that of the result.
    """
    began = time.perf_counter()  # the budget counts what is imported now
    from hanok.bench.attention import AttentionCase, Conditions, grid, measure_attention
    from hanok.bench.multiples import measure_multiples
    from hanok.memory.threads import set_threads

    if markdown is not None and not markdown.parent.is_dir():
        raise OptionError(f"{markdown} cannot be written: there is no folder {markdown.parent}.")
    set_threads(threads)
    conditions = Conditions(
        device=_device(device),
        rounds=rounds,
        ring_bytes=ring_mib * 2**20,
        budget_s=max(1.0, budget_s - (time.perf_counter() - began)),
    )
    shape = AttentionCase(
        batch=batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
        window=window,
        softcap=softcap,
    )
    cases, left_out = grid(queries, keys, shape)
    if multiples is not None:
        tokens = tuple(dict.fromkeys(case.queries for case in cases))
        found = measure_multiples(
            multiples,
            tokens,
            replace(shape, keys=max(keys)),
            conditions,
            progress=lambda what: _say(f"measuring {what}"),
        )
        _publish(asdict(found), list(_multiples_parts(found)), as_json, markdown)
        return
    for text in left_out:
        _say(f"left out: {text}")
    report = measure_attention(
        cases, conditions, progress=lambda case: _say(f"measuring {case_name(case)}")
    )
    shown = report.as_object() | {"left_out": left_out}
    _publish(shown, list(_parts(report, left_out)), as_json, markdown)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(f"--device {name!r} cannot be used: {reason}") from None
    return device


Part = str | tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A sentence, or a table: title, header, rows."""


def case_name(case: "AttentionCase") -> str:
    """Return a case's lengths as words."""
    queries = "1 query" if case.queries == 1 else f"{case.queries:,} queries"
    return f"{queries} over {case.keys:,} keys"


def shape_name(case: "AttentionCase") -> str:
    """Return what all cases of a report share."""
    parts = [f"{case.batch} sequences"] if case.batch > 1 else []
    parts.append(f"{case.num_heads} heads, {case.num_kv_heads} KV heads, {case.head_dim} wide")
    parts.append(case.dtype if case.cache_dtype == "auto" else f"{case.dtype}, cache in int8")
    parts += [f"window {case.window}"] if case.window is not None else []
    parts += [f"softcap {case.softcap:g}"] if case.softcap is not None else []
    return ", ".join(parts)


def _parts(report: "AttentionReport", left_out: Sequence[str]) -> Iterator[Part]:
    yield (
        f"{shape_name(report.results[0].case)}; {report.device}, {report.threads} threads, "
        f"{report.rounds} rounds. This machine reads {report.gb_per_s:.1f} GB/s and multiplies at "
        f"{report.gflop_per_s:,.0f} GFLOP/s."
    )
    for result in report.results:
        if result.measured:
            yield case_name(result.case), HEADER, list(_rows(result))
            made = min(len(row.samples) for row in result.measured.values())
            if made < report.rounds:
                yield f"{made} of {report.rounds} rounds had time (--budget)"
        else:
            yield case_name(result.case)
        for name, reason in result.not_measured.items():
            yield f"not {name}: {reason}"
    for text in left_out:
        yield f"left out: {text}"


def _rows(result: "CaseResult") -> Iterator[tuple[str, ...]]:
    for name, row in result.measured.items():
        yield (
            name,
            spread(row.seconds, 1e6),
            spread(row.ratio),
            f"{row.gb_per_s:.3g}",
            f"{row.bandwidth_share:.0%}",
            f"{row.gflop_per_s:.3g}",
            f"{row.flop_share:.0%}",
            "unknown" if row.extra_bytes is None else size(row.extra_bytes),
            f"{row.max_error:.1e}",
            f"{row.relative_error:.1e}",
        )


def _multiples_parts(report: "MultiplesReport") -> Iterator[Part]:
    yield (
        f"{report.dtype}; {report.device}, {report.threads} threads, {report.rounds} rounds. Time per "
        "FLOP is that of the size over that of its base, a multiple of 64, in the same rounds."
    )
    for group in report.groups:
        yield group.what, MULTIPLES_HEADER, list(_multiples_rows(group))
        yield group.finding
    for text in report.left_out:
        yield f"left out: {text}"


def _multiples_rows(group: "Group") -> Iterator[tuple[str, ...]]:
    for row in group.rows:
        divisor = next((str(number) for number in (64, 8) if row.size % number == 0), "–")
        yield str(row.size), divisor, spread(row.seconds, 1e6), spread(row.per_flop)


def spread(values: "Spread", factor: float = 1.0) -> str:
    """Return median (smallest–largest) with three digits, or one value where they agree."""
    middle, low, high = (
        _digits(value * factor) for value in (values.median, values.low, values.high)
    )
    return middle if low == high else f"{middle} ({low}–{high})"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _publish(
    found: dict[str, Any], parts: Sequence[Part], as_json: bool, markdown: Path | None
) -> None:
    if markdown is not None:
        markdown.write_text("\n\n".join(map(_markdown, parts)) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(finite(found), indent=2, allow_nan=False))
    else:
        _print(parts)


def _markdown(part: Part) -> str:
    if isinstance(part, str):
        return part
    title, header, rows = part
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _print(parts: Sequence[Part]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console = Console(width=PIPED_WIDTH)
    for part in parts:
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False)
            continue
        title, header, rows = part
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table)


COMMAND = command
