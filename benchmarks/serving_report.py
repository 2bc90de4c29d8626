"""The report of benchmarks/serving.py: a table for each part, and what was asked beside it."""

from collections.abc import Callable, Sequence
from typing import Any

import measure
from serving_servers import BARE, BATCHED, HANOK, LLAMA_CPP, TRANSFORMERS

from hanok.bench.spread import Spread, rounded

Part = tuple[str, list[Sequence[object]]]


def demand(what: str, spread: Spread | float, limit: float, *, at_least: bool) -> list[object]:
    """Return a row of what was asked for."""
    value = spread.median if isinstance(spread, Spread) else spread
    is_met = value >= limit if at_least else value <= limit
    text = str(spread) if isinstance(spread, Spread) else rounded(spread)
    return [what, text, f"{'≥' if at_least else '≤'} {limit:g}", "yes" if is_met else "no"]


def throughput_report(rows: list[measure.Row]) -> Part:
    groups: dict[tuple[str, int, str], list[measure.Row]] = {}
    for row in rows:
        if "failed" not in row:
            groups.setdefault((row["shape"], row["clients"], row["who"]), []).append(row)
    failures = [
        f"{row['shape']}, {row['clients']} clients: {row['who']} gave none: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    table, demands = [], []
    for (shape, clients, who), mine in groups.items():
        cells = [f"{shape}, {clients} clients: {who}"]
        for key in ("tokens_per_s", "first_token_s", "between_p99_s", "client_cores"):
            values = [row[key] for row in mine if key in row]
            cells.append(str(Spread.of(values)) if values else "")
        table.append([*cells, sum(row["is_disturbed"] for row in mine)])
    fewest = min(clients for _, clients, _ in groups)
    for shape, clients in dict.fromkeys((shape, clients) for shape, clients, _ in groups):
        ours = groups[shape, clients, HANOK]
        place = f"{shape}, {clients} clients"

        for who, limit in ((LLAMA_CPP, 1.5), (TRANSFORMERS, 5.0), (BATCHED, 5.0), (BARE, 0.93)):
            spread = against(ours, groups.get((shape, clients, who)), "tokens_per_s")
            if spread is not None:
                what = f"{place}: throughput, of that of {who}"
                demands.append(demand(what, spread, limit, at_least=True))
        spread = against(ours, groups.get((shape, clients, LLAMA_CPP)), "first_token_s")
        if spread is not None and clients == fewest:
            what = f"{place}: time to first token of llama.cpp's"
            demands.append(demand(what, spread, 0.7, at_least=False))
    header = (
        *("", "tokens/s", "first token p50, s", "between tokens p99, s"),
        *("client, cores", "disturbed"),
    )
    return "\n\n".join([measure.table(header, table), *failures]), demands


def against(ours: list[measure.Row], theirs: list[measure.Row] | None, key: str) -> Spread | None:
    """Return the ratio to another's rounds, or to its only one; None where it was not there."""
    if theirs is None:
        return None
    several = [row[key] for row in theirs] * (len(ours) if len(theirs) == 1 else 1)
    return Spread.of_ratio([row[key] for row in ours], several)


def turns_report(rows: list[measure.Row]) -> Part:
    table, demands = [], []
    for row in rows:
        first, second = (Spread.of(row[key]) for key in ("first_s", "second_s"))
        table.append([row["shape"], first, second, row["is_disturbed"]])
        spread = Spread.of_ratio(row["second_s"], row["first_s"])
        what = f"{row['shape']}: first token of a second turn, of the first's"
        demands.append(demand(what, spread, 0.15, at_least=False))
    return measure.table(("", "first turn, s", "second turn, s", "disturbed"), table), demands


def overload_report(rows: list[measure.Row]) -> Part:
    keys = ("first_token_p50_s", "first_token_p99_s", "late_p99_s")
    table = [
        [
            f"{row['factor']} x {row['capacity']:.2f} requests/s",
            ", ".join(f"{count} x {status}" for status, count in sorted(row["statuses"].items())),
            row["broken"],
            row["without_retry_after"],
            *(rounded(row[key]) for key in keys),
        ]
        for row in rows
    ]
    others = sum(
        count
        for row in rows
        for status, count in row["statuses"].items()
        if status not in ("200", "429")
    )
    broken = sum(row["broken"] + row["without_retry_after"] for row in rows)
    slower = rows[-1]["first_token_p99_s"] / rows[0]["first_token_p99_s"]
    demands = [
        demand(
            "overload: answers that are neither 200, whole, nor 429",
            others + broken,
            0,
            at_least=False,
        ),
        demand(
            "overload: p99 to the first token, of its value at capacity", slower, 2, at_least=False
        ),
    ]
    header = (
        *("arrivals", "answers", "200 but not whole", "429 without Retry-After"),
        *("first token p50, s", "p99, s", "sent late p99, s"),
    )
    return measure.table(header, table), demands


def disconnects_report(rows: list[measure.Row]) -> Part:
    table, demands = [], []
    for row in rows:
        table.append(
            [
                row["shape"],
                row["requests"],
                row["left"],
                row["given_up"],
                row["blocks_left"],
                row["most_tokens_after"],
            ]
        )
        place = f"{row['shape']}, {row['requests']:,} requests"
        demands += [
            demand(f"{place}: blocks that leaked", row["blocks_left"], 0, at_least=False),
            demand(
                f"{place}: tokens after it was noticed", row["most_tokens_after"], 1, at_least=False
            ),
        ]
    header = ("", "requests", "clients left", "given up", "blocks in use", "most tokens after")
    return measure.table(header, table), demands


def soak_report(rows: list[measure.Row]) -> Part:
    table = [
        [
            row["requests"],
            row["preemptions"],
            *(
                f"{row[key] / 2**20:.1f}"
                for key in ("after_first_minute_bytes", "largest_bytes", "last_bytes")
            ),
        ]
        for row in rows
    ]
    header = ("requests", "preemptions", "MiB after a minute", "at the most", "at the end")
    growth = 100 * rows[0]["growth"]
    return measure.table(header, table), [
        demand("soak: growth of memory after the first minute, %", growth, 1, at_least=False)
    ]


REPORTS: dict[str, Callable[[list[measure.Row]], Part]] = {
    "throughput": throughput_report,
    "turns": turns_report,
    "overload": overload_report,
    "disconnects": disconnects_report,
    "soak": soak_report,
}


def report(found: dict[str, Any], method: str, threads: int) -> str:
    """Return the report of all parts that were measured; `method` says how."""
    lines = [measure.heading("Servers on a CPU", threads), "", method, ""]
    demands: list[Sequence[object]] = []
    for part, body in found.items():
        lines += [
            f"## {part.capitalize()}",
            "",
            f"Measured {body['date']}, threads: {body['threads']}, at {body['versions']}.",
            "",
        ]
        table, asked = REPORTS[part](body["rows"])
        lines += [table, ""]
        demands += asked
    header = ("", "measured", "asked", "met")
    return "\n".join([*lines, "## Asked", "", measure.table(header, demands), ""])
