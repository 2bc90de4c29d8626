"""Loads on a server whose every token is scripted, in a time of its own.

Connections are streams in memory and the event loop's clock jumps to the next thing to do, so times are
exact and nobody waits.
"""

import asyncio
import json
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from hanok.bench import traffic
from hanok.bench.arrivals import Arrival
from hanok.bench.prompts import FULL_LENGTH, Prompts
from hanok.bench.serving import (
    Bound,
    ClosedLoop,
    OpenLoop,
    Percentiles,
    ServingReport,
    run,
    summary,
)
from hanok.bench.traffic import Answer, Protocol, Target
from hanok.errors import OptionError

IDS = Prompts(pieces=range(5, 90), is_exact=True)
TARGET = Target(url="http://server:1", options=FULL_LENGTH)


class Jumping(selectors.DefaultSelector):
    """Waits for nothing: the time is then that of the next timer."""

    now = 100.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("everyone waits for ever")
        if not ready:
            self.now += max(0.0, timeout or 0.0)
        return ready


def in_its_own_time(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[], Coroutine[Any, Any, list[Answer]]]
) -> list[Answer]:
    selector = Jumping()

    def new_loop() -> asyncio.SelectorEventLoop:
        loop = asyncio.SelectorEventLoop(selector)
        monkeypatch.setattr(loop, "time", lambda: selector.now)
        return loop

    monkeypatch.setattr(traffic, "time", SimpleNamespace(perf_counter=lambda: selector.now))
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main())


@dataclass
class Scripted:
    """A server: each request's first token comes after `first_s`, the others `between_s` apart."""

    protocol: Protocol = "openai"
    first_s: float = 1.0
    between_s: float = 0.5
    statuses: Sequence[int] = (200,)
    breaks_off: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    at_a_time: int = 0
    most_at_a_time: int = 0

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, Any]:
        reader = asyncio.StreamReader()
        tasks: list[asyncio.Task[None]] = []

        def write(data: bytes) -> None:
            body = json.loads(data.partition(b"\r\n\r\n")[2])
            self.moments.append(asyncio.get_running_loop().time())
            status = self.statuses[len(self.bodies) % len(self.statuses)]
            self.bodies.append(body)
            tasks.append(asyncio.create_task(self.answer(reader, body, status)))

        async def drain() -> None:
            pass

        return reader, SimpleNamespace(write=write, drain=drain, close=lambda: tasks.clear())

    async def answer(self, reader: asyncio.StreamReader, body: dict[str, Any], status: int) -> None:
        if status == 0:
            reader.feed_eof()
            return
        reader.feed_data(f"HTTP/1.1 {status} X\r\nconnection: close\r\n\r\n".encode())
        if status != 200:
            reader.feed_data(b'{"error": "busy"}')
            reader.feed_eof()
            return
        self.at_a_time += 1
        self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
        count = body["max_tokens"] if "max_tokens" in body else body["parameters"]["max_new_tokens"]
        for index in range(count):
            await asyncio.sleep(self.between_s if index else self.first_s)
            if self.breaks_off and index == 1:
                break
            reader.feed_data(b"data: " + json.dumps(self.event(index, count)).encode() + b"\n\n")
        if self.breaks_off:
            reader.feed_data(b'data: {"error": "out of memory"}\n\n')
        self.at_a_time -= 1
        reader.feed_eof()

    def event(self, index: int, count: int) -> dict[str, Any]:
        if self.protocol == "tgi":
            details = {"generated_tokens": count} if index == count - 1 else None
            return {"token": {"id": 1, "text": "a"}, "details": details}
        return {"choices": [{"text": "a", "finish_reason": None}]}


def loaded(
    monkeypatch: pytest.MonkeyPatch,
    server: Scripted,
    schedule: ClosedLoop | OpenLoop,
    bound: Bound | None = None,
) -> ServingReport:
    monkeypatch.setattr(traffic.asyncio, "open_connection", server.connect)
    target = replace(TARGET, protocol=server.protocol)
    answers = in_its_own_time(monkeypatch, lambda: run(target, schedule, IDS, 0))
    return summary(target, schedule, IDS, answers, bound=bound or Bound(), client_cores=0.01)


def arrivals(*times: float, new_tokens: int = 3) -> OpenLoop:
    return OpenLoop(
        arrivals=[Arrival(at_s=at, prompt_tokens=4, new_tokens=new_tokens) for at in times],
        origin="made up",
    )


@pytest.mark.parametrize("protocol", ["openai", "tgi"])
def test_a_closed_loop_keeps_its_clients_busy(
    monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    server = Scripted(protocol=protocol)
    schedule = ClosedLoop(clients=2, duration_s=3.0, prompt_tokens=4, new_tokens=3)
    report = loaded(monkeypatch, server, schedule)
    # Each request takes 2 seconds: they begin at 0 and 2, and none does after 3.
    assert server.moments == pytest.approx([100.0, 100.0, 102.0, 102.0])
    assert server.most_at_a_time == 2
    assert (report.requests, report.complete, report.statuses) == (4, 4, {"200": 4})
    assert report.seconds == pytest.approx(4.0)
    assert report.requests_per_s == pytest.approx(1.0)
    assert report.tokens_per_s == pytest.approx(3.0)
    assert report.first_token_s == Percentiles(p50=1.0, p90=1.0, p99=1.0)
    assert report.between_s == Percentiles(p50=0.5, p90=0.5, p99=0.5)
    assert report.mean_between_s == Percentiles(p50=0.5, p90=0.5, p99=0.5)
    assert report.whole_s == Percentiles(p50=2.0, p90=2.0, p99=2.0)
    assert report.late_s is None
    assert report.goodput_per_s is None
    assert report.warnings == ()


def test_an_open_loop_does_not_wait_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Scripted(first_s=50.0)
    report = loaded(monkeypatch, server, arrivals(0.0, 1.0, 1.25, 7.0))
    assert server.moments == pytest.approx([100.0, 101.0, 101.25, 107.0])
    assert server.most_at_a_time == 4
    assert report.first_token_s == Percentiles(p50=50.0, p90=50.0, p99=50.0)
    assert report.seconds == pytest.approx(58.0)
    assert report.late_s == Percentiles(p50=0.0, p90=0.0, p99=0.0)
    assert report.num_late == 0
    assert str(arrivals(0.0, 7.0)) == "open loop, 2 requests in 7.0 s, made up"


def test_requests_have_the_lengths_of_their_arrivals(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Scripted()
    schedule = OpenLoop(
        arrivals=[
            Arrival(at_s=0.0, prompt_tokens=3, new_tokens=1),
            Arrival(at_s=1.0, prompt_tokens=9, new_tokens=6),
        ],
        origin="made up",
    )
    report = loaded(monkeypatch, server, schedule)
    assert [len(body["prompt"]) for body in server.bodies] == [3, 9]
    assert [body["max_tokens"] for body in server.bodies] == [1, 6]
    assert all(body["ignore_eos"] is True for body in server.bodies)
    assert report.tokens_per_s == pytest.approx(7 / 4.5)


def test_every_outcome_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Scripted(statuses=(200, 429, 0, 429))
    report = loaded(monkeypatch, server, arrivals(0.0, 1.0, 2.0, 3.0, 4.0))
    assert report.statuses == {"200": 2, "429": 2, "no answer": 1}
    assert report.complete == 2
    assert report.whole_s == Percentiles(p50=2.0, p90=2.0, p99=2.0)
    assert report.warnings[-1].startswith(
        '3 of 5 requests failed, the first with: {"error": "busy"}'
    )


def test_answers_that_break_off_are_not_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Bound(first_token_s=2.0)
    report = loaded(monkeypatch, Scripted(breaks_off=True), arrivals(0.0, 1.0), bound)
    assert report.statuses == {"200, broken off": 2}
    assert report.goodput_per_s == 0.0
    assert "out of memory" in report.warnings[-1]


def test_goodput_counts_requests_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for bound, share in (
        (Bound(first_token_s=1.01), 1),
        (Bound(first_token_s=0.99), 0),
        (Bound(first_token_s=1.01, between_s=0.51), 1),
        (Bound(first_token_s=1.01, between_s=0.49), 0),
        (Bound(between_s=0.51), 1),
    ):
        report = loaded(monkeypatch, Scripted(), arrivals(0.0, 2.0), bound)
        assert report.goodput_per_s == pytest.approx(share * report.requests_per_s)
        assert report.requests_per_s == pytest.approx(0.5)


def answer(due: float, sent: float, *moments: float, num_tokens: int = 0) -> Answer:
    return Answer(
        due=due,
        sent=sent,
        status=200,
        moments=list(moments),
        ended=moments[-1],
        num_tokens=num_tokens or len(moments),
    )


def test_late_requests_count_from_when_they_were_due() -> None:
    answers = [answer(0.0, 0.0, 1.0, 2.0), answer(1.0, 1.5, 2.5, 3.0), answer(2.0, 2.009, 3.0, 4.0)]
    report = summary(TARGET, arrivals(0.0, 1.0, 2.0), IDS, answers, bound=Bound(), client_cores=0.5)
    assert report.first_token_s == Percentiles(p50=1.0, p90=1.5, p99=1.5)
    assert report.late_s == Percentiles(p50=pytest.approx(0.009), p90=0.5, p99=0.5)
    assert report.num_late == 1
    busy, late = report.warnings
    assert "the client used 50% of a core" in busy
    assert "1 of 3 requests were sent more than 10 ms after their time" in late


def test_a_mean_counts_tokens_and_not_events() -> None:
    """Servers may send several tokens at a time, where they guess ahead."""
    answers = [answer(0.0, 0.0, 1.0, 2.0, 5.0, num_tokens=9)]
    report = summary(TARGET, arrivals(0.0), IDS, answers, bound=Bound(), client_cores=0.0)
    assert report.mean_between_s == Percentiles(p50=0.5, p90=0.5, p99=0.5)
    assert report.between_s == Percentiles(p50=1.0, p90=3.0, p99=3.0)
    assert report.tokens_per_s == pytest.approx(9 / 5)


def test_what_is_estimated_is_said() -> None:
    estimate = Prompts(pieces=["a"], is_exact=False)
    report = summary(
        replace(TARGET, options={}),
        arrivals(0.0),
        estimate,
        [answer(0.0, 0.0, 1.0)],
        bound=Bound(),
        client_cores=0.0,
    )
    assert report.prompts == "text of estimated length"
    assert [text.partition(":")[0] for text in report.warnings] == [
        "the server does not show how it counts tokens",
        "the server knows no ignore_eos",
    ]
    assert report.between_s is None


def test_percentiles_are_values_that_were_there() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([3.0]) == Percentiles(p50=3.0, p90=3.0, p99=3.0)
    values = [float(value) for value in range(100, 0, -1)]
    assert Percentiles.of(values) == Percentiles(p50=50.0, p90=90.0, p99=99.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bound(first_token_s=0.0), "bound of the first token is 0 s"),
        (lambda: Bound(between_s=-1.0), "bound of the next token is -1 s"),
        (
            lambda: ClosedLoop(clients=0, duration_s=1.0, prompt_tokens=1, new_tokens=1),
            "there are 0 clients",
        ),
        (
            lambda: ClosedLoop(clients=1, duration_s=0.0, prompt_tokens=1, new_tokens=1),
            "the duration is 0",
        ),
    ],
)
def test_loads_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()
