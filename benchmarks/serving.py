"""hanok's server on a CPU, beside llama.cpp's and transformers' in one run, under load and left alone.

    python benchmarks/serving.py [--parts throughput …] [--output FILE.md] [--llama-cpp BIN]
        [--transformers PROGRAM] [--trace FILE.csv]

Parts: `throughput` (so many clients at once, each with a request; the engine without a server takes
turns with them), `turns` (a conversation's second turn), `overload` (arrivals at one and
three times the capacity, whatever became of those before), `disconnects` (clients that go away at any
moment), `soak` (memory under full load). Each part's rows go to a .json file beside the report, which is
written anew from all parts that are there, so parts can be measured one by one. A server is a cold
process; everything is asked over loopback by one client process (`hanok.bench.traffic`) that shares the
two cores with it, for every server alike. `--quick` shows in a minute whether everything is there.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import cycle
from pathlib import Path

import checkpoints
import measure
import serving_servers as servers
from serving_report import report
from serving_servers import (
    BARE,
    BATCHED,
    HANOK,
    LLAMA_CPP,
    TRANSFORMERS,
    Running,
    Sizes,
    Start,
)

from hanok.bench.arrivals import Arrival, poisson, read_trace
from hanok.bench.serving import Percentiles
from hanok.bench.traffic import Answer, Ask, closed, opened, send

HERE = Path(__file__).parent
PARTS = ("throughput", "turns", "overload", "disconnects", "soak")
SHAPES = ("llama-1.1b", "qwen-0.5b")
CLIENTS = (8, 32)
QUEUE_S = 5  # what the server under overload is told its requests may wait
SERVERS = (HANOK, BARE, LLAMA_CPP, TRANSFORMERS, BATCHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is asked: what the report is about, or a quick look."""

    shapes: tuple[str, ...] = SHAPES
    clients: tuple[int, ...] = CLIENTS
    prompt_tokens: int = 256
    new_tokens: int = 128
    history_tokens: int = 1000
    conversations: int = 5
    overload_shape: str = "qwen-0.5b"
    overload_s: float = 60.0
    capacity_requests: int = 160
    disconnects: int = 10_000
    slow_disconnects: int = 200
    soak_s: float = 600.0
    soak_after_s: float = 60.0


FULL = Scale()
QUICK = Scale(
    shapes=("tiny",),
    clients=(2,),
    prompt_tokens=16,
    new_tokens=8,
    history_tokens=200,
    conversations=2,
    overload_shape="tiny",
    overload_s=1.0,
    capacity_requests=32,
    disconnects=60,
    soak_s=2.0,
    soak_after_s=0.5,
)


class Prompts:
    """Random prompts, the same in every run, no two with the same beginning."""

    def __init__(self, vocab_size: int, *, as_text: bool = False, seed: int = 0) -> None:
        self._numbers = random.Random(seed)
        self._vocab_size = vocab_size
        self._as_text = as_text

    def ids(self, count: int) -> list[int]:
        """Return so many token ids."""
        return [self._numbers.randrange(3, self._vocab_size) for _ in range(count)]

    def ask(self, prompt_tokens: int, new_tokens: int) -> Ask:
        """Return a request."""
        ids = self.ids(prompt_tokens)
        return Ask(prompt=servers.words(ids) if self._as_text else ids, new_tokens=new_tokens)


def percentiles(values: Sequence[float]) -> Percentiles:
    """Return the percentiles of some values; of none, zeros."""
    return Percentiles.of(values) or Percentiles(p50=0.0, p90=0.0, p99=0.0)


def demand_complete(answers: Sequence[Answer], running: Running) -> None:
    """Raise RuntimeError unless every request was answered in full."""
    broken = [answer for answer in answers if not answer.is_complete]
    if broken:
        log = "".join(running.log[-5:])
        raise RuntimeError(f"{len(broken)} of {len(answers)} failed: {broken[0]}\n{log}")


def warm(running: Running, vocab_size: int) -> None:
    """Let the server compute each kind of step once, unmeasured."""
    prompts = Prompts(vocab_size, as_text=not running.takes_ids, seed=99)
    answers = asyncio.run(closed(running.target, [prompts.ask(64, 4) for _ in range(4)], 2))
    demand_complete(answers, running)


# Throughput


def throughput_row(
    start: Start, shape: checkpoints.Shape, clients: int, scale: Scale
) -> measure.Row:
    """Return what one cold server does for so many clients at a time."""
    length = scale.prompt_tokens + scale.new_tokens
    with start(Sizes(clients=clients, tokens=length + 128)) as running:
        warm(running, shape.vocab_size)
        prompts = Prompts(shape.vocab_size, as_text=not running.takes_ids)
        asks = [prompts.ask(scale.prompt_tokens, scale.new_tokens) for _ in range(clients)]
        before = os.times()
        began = time.perf_counter()
        answers = asyncio.run(closed(running.target, asks, clients))
        took = time.perf_counter() - began
        after = os.times()
        demand_complete(answers, running)
    first = [answer.first_token_s for answer in answers if answer.first_token_s is not None]
    between = [gap for answer in answers for gap in answer.between_s]
    return {
        "tokens_per_s": sum(answer.num_tokens for answer in answers) / took,
        "first_token_s": statistics.median(first),
        "between_p99_s": percentiles(between).p99,
        "client_cores": (after.user + after.system - before.user - before.system) / took,
    }


def bare_row(folder: Path, clients: int, scale: Scale, threads: int) -> measure.Row:
    """Return what the engine does for so many sequences without a server."""
    command = [sys.executable, str(HERE / "serving_engine.py"), str(folder)]
    command += ["--sequences", str(clients), "--prompt-tokens", str(scale.prompt_tokens)]
    command += ["--new-tokens", str(scale.new_tokens)]
    return measure.run_cold(command, threads=threads)


def measure_throughput(options: argparse.Namespace, scale: Scale) -> list[measure.Row]:
    """Return a row for each server, shape, number of clients and round."""
    found: list[measure.Row] = []
    for name in scale.shapes:
        shape = checkpoints.SHAPES[name]
        folder = servers.served_checkpoint(shape, options.checkpoints)
        contestants = contestants_of(options, folder)
        for clients in scale.clients:
            actions: dict[str, Callable[[], measure.Row]] = {
                who: partial(throughput_row, start, shape, clients, scale)
                for who, start in contestants.items()
                if who != TRANSFORMERS or clients == min(scale.clients)
            }
            if clients == max(scale.clients):
                actions[BARE] = partial(bare_row, folder, clients, scale, options.threads)
            for runs, whos in ((options.runs, SERVERS[:3]), (1, SERVERS[3:])):  # slow ones once
                asked = {
                    who: actions[who] for who in whos if who in actions and who in options.only
                }
                if not asked:
                    continue
                asked = {who: partial(row_or_reason, who, action) for who, action in asked.items()}
                guard = measure.guard_of(options)
                rows = measure.interleave(asked, runs=runs, guard=guard, log=print)
                found += [
                    {"shape": name, "clients": clients, "who": who, **row}
                    for who, mine in rows.items()
                    for row in mine
                ]
    return found


def row_or_reason(who: str, action: Callable[[], measure.Row]) -> measure.Row:
    """Return a row, or why another's server gave none: the others are measured all the same."""
    try:
        return action()
    except RuntimeError as error:
        if who in (HANOK, BARE):
            raise
        lines = str(error).strip().splitlines()
        return {"failed": next((line for line in lines[1:] if "Error" in line), lines[-1])[:200]}


def contestants_of(options: argparse.Namespace, folder: Path) -> dict[str, Start]:
    """Return how to start each server that is there."""
    threads = options.threads
    found = {HANOK: servers.hanok(folder, "int8", threads=threads)}
    if options.llama_cpp is not None:
        model = servers.gguf(folder, "Q8_0", options.llama_cpp, threads)
        program = options.llama_cpp / "llama-server"
        found[LLAMA_CPP] = servers.llama_cpp(model, program, threads=threads)
    if options.transformers is not None:
        for who, more in ((TRANSFORMERS, []), (BATCHED, ["--continuous-batching"])):
            found[who] = servers.transformers(
                folder, options.transformers, threads=threads, options=more
            )
    return found


# The second turn


def measure_turns(options: argparse.Namespace, scale: Scale) -> list[measure.Row]:
    """Return the times to the first token of conversations' first and second turns."""
    rows = []
    for name in scale.shapes:
        shape = checkpoints.SHAPES[name]
        folder = servers.served_checkpoint(shape, options.checkpoints)
        start = servers.hanok(folder, "int8", threads=options.threads)
        run = measure.guard_of(options).run(partial(turns_row, start, shape, scale))
        rows.append({"shape": name, **run.result, "is_disturbed": run.is_disturbed})
        print(rows[-1])
    return rows


def turns_row(start: Start, shape: checkpoints.Shape, scale: Scale) -> measure.Row:
    """Return both turns' times to the first token, one conversation after the other."""
    firsts, seconds = [], []
    with start(Sizes(clients=4, tokens=scale.history_tokens + 256)) as running:
        warm(running, shape.vocab_size)
        prompts = Prompts(shape.vocab_size)
        for _ in range(scale.conversations):
            history = prompts.ids(scale.history_tokens)
            first = asyncio.run(send(running.target, Ask(prompt=history, new_tokens=32)))
            # Its words are its tokens.
            answer = [int(word.removeprefix("w")) for word in first.text.split()]
            second_prompt = [*history, *answer, *prompts.ids(20)]
            second = asyncio.run(send(running.target, Ask(prompt=second_prompt, new_tokens=32)))
            demand_complete([first, second], running)
            firsts.append(first.first_token_s)
            seconds.append(second.first_token_s)
    return {"first_s": firsts, "second_s": seconds}


# More than can be served


def requests_of(trace: Path | None) -> list[Arrival]:
    """Return the requests of a trace, an eighth as long; without one, random arrivals of one length."""
    if trace is None:
        return poisson(1.0, 1000.0, prompt_tokens=128, new_tokens=24, seed=0)
    return read_trace(trace, length_scale=1 / 8)


def times_at(traced: Sequence[Arrival], rate: float, seconds: float) -> list[float]:
    """Return arrival times with the trace's pattern, at this mean rate."""
    count = max(2, int(rate * seconds))
    repeats = -(-count // len(traced))
    length = traced[-1].at_s
    times = [length * turn + item.at_s for turn in range(repeats) for item in traced][:count]
    return [at * seconds / times[-1] for at in times]


def measure_overload(options: argparse.Namespace, scale: Scale) -> list[measure.Row]:
    """Return what came of requests at the capacity and at three times of it."""
    shape = checkpoints.SHAPES[scale.overload_shape]
    folder = servers.served_checkpoint(shape, options.checkpoints)
    longest = 512
    traced = requests_of(options.trace)
    prompts = Prompts(shape.vocab_size)
    lengths = cycle(traced)

    def ask() -> Ask:
        wanted = next(lengths)
        return prompts.ask(min(wanted.prompt_tokens, longest - 64), min(wanted.new_tokens, 64))

    rows: list[measure.Row] = []
    sizes = Sizes(clients=32, tokens=longest)
    with servers.hanok(folder, "int8", threads=options.threads)(sizes) as running:
        warm(running, shape.vocab_size)
        asks = [ask() for _ in range(scale.capacity_requests)]
        began = time.perf_counter()
        demand_complete(asyncio.run(closed(running.target, asks, 32)), running)
        capacity = len(asks) / (time.perf_counter() - began)
    bound = ["--max-queue-seconds", str(QUEUE_S)]
    start = servers.hanok(folder, "int8", threads=options.threads, options=bound)
    with start(sizes) as running:
        warm(running, shape.vocab_size)
        for factor in (1, 3):
            times = times_at(traced, factor * capacity, scale.overload_s)
            answers = asyncio.run(opened(running.target, [(at, ask()) for at in times]))
            rows.append({"factor": factor, "capacity": capacity, **outcome(answers)})
            print(rows[-1])
    return rows


def outcome(answers: Sequence[Answer]) -> measure.Row:
    """Return the statuses of some requests, and how long the accepted ones waited."""
    served = [answer for answer in answers if answer.is_complete]
    first = [answer.first_token_s for answer in served if answer.first_token_s is not None]
    return {
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "broken": sum(answer.status == 200 and not answer.is_complete for answer in answers),
        "without_retry_after": sum(
            answer.status == 429 and not answer.retry_after for answer in answers
        ),
        "first_token_p50_s": percentiles(first).p50,
        "first_token_p99_s": percentiles(first).p99,
        "late_p99_s": percentiles([answer.sent - answer.due for answer in answers]).p99,
    }


# Clients that go away


def measure_disconnects(options: argparse.Namespace, scale: Scale) -> list[measure.Row]:
    """Return what is left of requests whose clients went away at any moment."""
    small = checkpoints.SHAPES["tiny"]
    large = checkpoints.SHAPES[scale.shapes[0]]
    rows = [disconnects_row(options, small, scale.disconnects, clients=64)]
    if large is not small:
        rows.append(disconnects_row(options, large, scale.slow_disconnects, clients=16))
    return rows


def disconnects_row(
    options: argparse.Namespace, shape: checkpoints.Shape, count: int, *, clients: int
) -> measure.Row:
    folder = servers.served_checkpoint(shape, options.checkpoints)
    start = servers.hanok(folder, "int8", threads=options.threads)
    numbers = random.Random(1)
    prompts = Prompts(shape.vocab_size)
    asks = []
    for _ in range(count):
        ask = prompts.ask(numbers.randrange(1, 200), numbers.randrange(1, 32))
        leave = numbers.choice((None, 0, 0, 1, 2, 5, 10))
        asks.append(Ask(prompt=ask.prompt, new_tokens=ask.new_tokens, leave_after=leave))
    with start(Sizes(clients=clients, tokens=256)) as running:
        answers = asyncio.run(closed(running.target, asks, clients))
        end = time.monotonic() + 60
        while running.metric("tgi_batch_current_size") + running.metric("tgi_queue_size"):
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        used = running.metric("hanok_cache_used_blocks")
        given_up = running.metric("hanok_requests_cancelled_total")
        most_after = running.metric("hanok_most_tokens_after_abort")
    row = {
        "shape": shape.name,
        "requests": count,
        "left": sum(answer.has_left for answer in answers),
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "blocks_left": used,
        "given_up": given_up,
        "most_tokens_after": most_after,
    }
    print(row)
    return row


# Memory


def measure_soak(options: argparse.Namespace, scale: Scale) -> list[measure.Row]:
    """Return the memory of a server that has as much to do as it may, as time goes by.

    Twice as many clients ask as there are slots, for answers that the cache does not hold all at once.
    """
    shape = checkpoints.SHAPES[scale.overload_shape]
    folder = servers.served_checkpoint(shape, options.checkpoints)
    start = servers.hanok(folder, "int8", threads=options.threads)
    samples: list[tuple[float, int]] = []
    statuses: Counter[int] = Counter()
    with start(Sizes(clients=8, tokens=512)) as running:
        warm(running, shape.vocab_size)
        prompts, numbers = Prompts(shape.vocab_size), random.Random(2)
        began = time.monotonic()

        async def client() -> None:
            while time.monotonic() - began < scale.soak_s:
                ask = prompts.ask(numbers.randrange(1, 400), numbers.randrange(1, 100))
                answer = await send(running.target, ask)
                statuses[answer.status] += 1
                if answer.status == 429:
                    await asyncio.sleep(float(answer.retry_after or 1))

        async def watch() -> None:
            while time.monotonic() - began < scale.soak_s:
                samples.append((time.monotonic() - began, running.resident_bytes()))
                await asyncio.sleep(scale.soak_s / 300)

        async def all_of_it() -> None:
            await asyncio.gather(watch(), *(client() for _ in range(16)))

        asyncio.run(all_of_it())
        preemptions = running.metric("hanok_preemptions_total")
    settled = [size for at, size in samples if at >= scale.soak_after_s]
    row = {
        "requests": sum(statuses.values()),
        "statuses": {str(status): count for status, count in statuses.items()},
        "preemptions": preemptions,
        "after_first_minute_bytes": settled[0],
        "largest_bytes": max(settled),
        "last_bytes": settled[-1],
        "growth": max(settled) / settled[0] - 1,
    }
    print(row)
    return [row]


# The report

MEASURES = {
    "throughput": measure_throughput,
    "turns": measure_turns,
    "overload": measure_overload,
    "disconnects": measure_disconnects,
    "soak": measure_soak,
}


METHOD = (
    "Weights are random and in int8 (hanok), Q8_0 (llama.cpp's server, a slot for each client) or "
    "bfloat16 (transformers serve). Throughput: so many clients at once, each with one request of "
    f"{FULL.prompt_tokens} prompt tokens and {FULL.new_tokens} new ones, streamed and greedy; tokens/s "
    "are new tokens over the time from the first request to the last answer. Median "
    "(smallest–largest) of cold processes that take turns; transformers' run once. Turns: a prompt of "
    f"{FULL.history_tokens:,} tokens, then the same with its answer and 20 more. Overload: requests "
    "of the trace, an eighth as long, at times with its pattern; capacity is what 32 clients get that "
    f"ask again and again, and the server is told `--max-queue-seconds {QUEUE_S}`. Disconnects: most "
    "clients close their connection at once, or behind 1 to 10 tokens. Soak: twice as many clients "
    f"as slots, for {FULL.soak_s / 60:.0f} minutes. Client cores: what the measuring client took of "
    "the processors."
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure hanok's server beside others.")
    measure.add_common_options(parser, runs=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--checkpoints", type=Path, default=checkpoints.DEFAULT_FOLDER)
    llama_cpp = os.environ.get("HANOK_LLAMA_CPP")
    parser.add_argument(
        "--llama-cpp", type=Path, default=llama_cpp, help="its build/bin, llama-server among it"
    )
    parser.add_argument(
        "--transformers",
        type=Path,
        default=os.environ.get("HANOK_TRANSFORMERS"),
        help=servers.TRANSFORMERS_HELP,
    )
    parser.add_argument("--trace", type=Path, help="arrivals and lengths, see hanok.bench.arrivals")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SERVERS,
        default=SERVERS,
        help="whose throughput to measure; the others' is kept as it is in the file",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="the same of shapes")
    parser.add_argument("--quick", action="store_true", help="next to nothing of everything")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    if options.shapes:
        scale = replace(scale, shapes=tuple(options.shapes))
    if options.quick:
        options.runs, options.patience, options.foreign = 1, 0.0, float(measure.num_cores())
    kept = options.output.with_suffix(".json") if options.output else None
    found = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
    for part in options.parts:
        rows = MEASURES[part](options, scale)
        if part == "throughput":
            asked = {(shape, who) for shape in scale.shapes for who in options.only}
            known = found.get(part, {"rows": []})["rows"]
            rows = [row for row in known if (row["shape"], row["who"]) not in asked] + rows
        today = datetime.now().astimezone().date().isoformat()
        found[part] = {
            "date": today,
            "versions": measure.versions_line(),
            "threads": options.threads,
            "rows": rows,
        }
        if kept is not None:
            kept.write_text(json.dumps(found, indent=1) + "\n")
    known = {part: found[part] for part in PARTS if part in found}
    measure.publish(report(known, METHOD, options.threads), options.output)


if __name__ == "__main__":
    main()
