"""`hanok bench serve`: what the users of a server see under a load."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from hanok.errors import OptionError

if TYPE_CHECKING:
    from hanok.bench.serving import Percentiles, Schedule, ServingReport

DEFAULT_CLIENTS, DEFAULT_DURATION_S = 8, 30.0
HEADER = ("milliseconds", "p50", "p90", "p99")


@click.command("serve", short_help="Put a load on a server: latency, throughput, goodput.")
@click.argument("url")
@click.option(
    "--protocol",
    type=click.Choice(["auto", "tgi", "openai"]),
    default="auto",
    show_default=True,
    help="auto: OpenAI's where /v1/models answers, else TGI's.",
)
@click.option("--model", help="Name of the model.  [default: the first that the server lists]")
@click.option("--api-key", envvar="HANOK_API_KEY", help="Sent as a bearer token.")
@click.option(
    "--clients", type=int, help=f"Closed loop: clients at a time.  [default: {DEFAULT_CLIENTS}]"
)
@click.option("--rate", type=float, help="Open loop: requests a second, Poisson arrivals.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Open loop: arrivals of Azure's CSV or Mooncake's JSON lines.",
)
@click.option("--time-scale", type=float, help="Multiplies a trace's times.  [default: 1]")
@click.option("--length-scale", type=float, help="Multiplies a trace's lengths.  [default: 1]")
@click.option("--input-tokens", type=click.IntRange(min=1), help="Of a prompt.  [default: 256]")
@click.option("--output-tokens", type=click.IntRange(min=1), help="Of an answer.  [default: 128]")
@click.option(
    "--duration",
    type=float,
    help=f"Seconds in which requests begin.  [default: {DEFAULT_DURATION_S:g}; a trace: all of it]",
)
@click.option("--slo-ttft", type=float, help="Bound for goodput: milliseconds to the first token.")
@click.option(
    "--slo-itl", type=float, help="Bound for goodput: mean milliseconds between a request's tokens."
)
@click.option("--seed", default=0, show_default=True, help="Of arrivals and prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the table to this file.",
)
def command(  # noqa: PLR0913 (click passes each option as an argument)
    url: str,
    protocol: Literal["auto", "tgi", "openai"],
    model: str | None,
    api_key: str | None,
    clients: int | None,
    rate: float | None,
    trace: Path | None,
    time_scale: float | None,
    length_scale: float | None,
    input_tokens: int | None,
    output_tokens: int | None,
    duration: float | None,
    slo_ttft: float | None,
    slo_itl: float | None,
    seed: int,
    as_json: bool,
    markdown: Path | None,
) -> None:
    """Drive the server at URL, which speaks OpenAI's or TGI's protocol, and say what its users see.

    With --clients each client sends its next request when its last has ended; with --rate or --trace
    requests are sent at times fixed beforehand, and times to first token count from those. Answers are
    greedy. Goodput is requests per second, those answered in full within --slo-ttft and --slo-itl.
    """
    from hanok.bench.serving import Bound, measure_serving

    if markdown is not None and not markdown.parent.is_dir():
        raise OptionError(f"{markdown} cannot be written: there is no folder {markdown.parent}.")
    bound = Bound(
        first_token_s=None if slo_ttft is None else slo_ttft / 1000,
        between_s=None if slo_itl is None else slo_itl / 1000,
    )
    _check_one_loop(clients, rate, trace)
    if trace is None and (time_scale is not None or length_scale is not None):
        raise OptionError("--time-scale and --length-scale belong to --trace, which is missing.")
    if trace is not None and (input_tokens is not None or output_tokens is not None):
        raise OptionError(
            "--trace brings the lengths: leave out --input-tokens and --output-tokens, or use "
            "--length-scale."
        )
    if trace is not None:
        schedule = _traced(trace, time_scale, length_scale, duration)
    else:
        schedule = _drawn(
            clients,
            rate,
            DEFAULT_DURATION_S if duration is None else duration,
            (input_tokens or 256, output_tokens or 128),
            seed,
        )
    report = measure_serving(
        url,
        schedule,
        protocol=protocol,
        model=model,
        api_key=api_key,
        bound=bound,
        seed=seed,
        progress=lambda text: click.echo(text, err=True),
    )
    if markdown is not None:
        markdown.write_text(markdown_of(report), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2, allow_nan=False))
    else:
        _print(report)


def _check_one_loop(clients: int | None, rate: float | None, trace: Path | None) -> None:
    named = {"--clients": clients, "--rate": rate, "--trace": trace}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} exclude each other: give one of them.")


def _traced(
    file: Path, time_scale: float | None, length_scale: float | None, duration: float | None
) -> "Schedule":
    from hanok.bench.arrivals import read_trace
    from hanok.bench.serving import OpenLoop

    arrivals = read_trace(
        file,
        time_scale=1.0 if time_scale is None else time_scale,
        length_scale=1.0 if length_scale is None else length_scale,
        duration_s=duration,
    )
    if not arrivals:
        raise OptionError(f"no request of {file} comes within {duration:g} s.")
    scales = [f"times × {time_scale:g}"] if time_scale is not None else []
    scales += [f"lengths × {length_scale:g}"] if length_scale is not None else []
    return OpenLoop(arrivals=arrivals, origin=", ".join([f"trace {file.name}", *scales]))


def _drawn(
    clients: int | None, rate: float | None, duration: float, tokens: tuple[int, int], seed: int
) -> "Schedule":
    from hanok.bench.arrivals import poisson
    from hanok.bench.serving import ClosedLoop, OpenLoop

    if rate is None:
        return ClosedLoop(
            clients=DEFAULT_CLIENTS if clients is None else clients,
            duration_s=duration,
            prompt_tokens=tokens[0],
            new_tokens=tokens[1],
        )
    arrivals = poisson(rate, duration, prompt_tokens=tokens[0], new_tokens=tokens[1], seed=seed)
    return OpenLoop(arrivals=arrivals, origin=f"Poisson, {rate:g} requests/s, seed {seed}")


def rows(report: "ServingReport") -> list[tuple[str, ...]]:
    """Return the table of times as text, in the order of HEADER."""
    named = (
        ("time to first token", report.first_token_s),
        ("between tokens", report.between_s),
        ("between tokens, mean of a request", report.mean_between_s),
        ("whole request", report.whole_s),
        ("sent late", report.late_s),
    )
    return [(name, *_milliseconds(found)) for name, found in named if found is not None]


def _milliseconds(found: "Percentiles") -> Iterator[str]:
    for value in (found.p50, found.p90, found.p99):
        yield f"{value * 1000:,.0f}" if value >= 0.09995 else f"{value * 1000:.3g}"


def sentences(report: "ServingReport") -> Iterator[str]:
    """Yield what the table does not say."""
    yield f"{report.url}, {report.protocol}, {report.model}: {report.schedule}; {report.prompts}."
    statuses = ", ".join(f"{count} × {status}" for status, count in report.statuses.items())
    yield (
        f"{report.complete} of {report.requests} requests answered in full ({statuses}) in "
        f"{report.seconds:.1f} s: {report.requests_per_s:.3g} requests/s, "
        f"{report.tokens_per_s:,.1f} tokens/s."
    )
    if report.goodput_per_s is not None:
        bounds = (
            ("first token", report.bound.first_token_s),
            ("mean between tokens", report.bound.between_s),
        )
        said = ", ".join(
            f"{name} within {value * 1000:g} ms" for name, value in bounds if value is not None
        )
        yield f"Goodput: {report.goodput_per_s:.3g} requests/s ({said})."
    yield f"The client used {report.client_cores:.0%} of a core."
    yield from (f"Warning: {text}" for text in report.warnings)


def markdown_of(report: "ServingReport") -> str:
    """Return the report as a Markdown table under its sentences."""
    lines = [HEADER, ("---",) + ("---:",) * (len(HEADER) - 1), *rows(report)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([*sentences(report), table]) + "\n"


def _print(report: "ServingReport") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, padding=(0, 1))
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows(report):
        table.add_row(*row)
    for text in sentences(report):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(table)


COMMAND = command
