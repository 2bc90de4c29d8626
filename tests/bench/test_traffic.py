"""The load client, against servers that say exactly what a test makes them say, cut anywhere."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.bench.traffic import Answer, Ask, Protocol, Target, closed, opened, send

OPENAI_EVENTS = [
    {"choices": [{"index": 0, "text": "Once", "finish_reason": None}], "usage": None},
    {"choices": [{"index": 0, "text": "", "finish_reason": None}], "usage": None},
    {"choices": [{"index": 0, "text": " upon", "finish_reason": "length"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9}},
]
TGI_EVENTS = [
    {"index": 1, "token": {"id": 5, "text": "Once"}, "generated_text": None, "details": None},
    {
        "index": 2,
        "token": {"id": 6, "text": " é"},
        "generated_text": "Once é",
        "details": {"finish_reason": "length", "generated_tokens": 2, "seed": None},
    },
]


def sse(events: Sequence[Any], end: str = "\n\n") -> bytes:
    return b"".join(f"data: {json.dumps(event)}{end}".encode() for event in events)


def chunked(parts: Sequence[bytes], status: str = "200 OK", extra: str = "") -> list[bytes]:
    head = f"HTTP/1.1 {status}\r\n{extra}transfer-encoding: chunked\r\n\r\n".encode()
    body = [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts if part]
    return [head, *body, b"0\r\n\r\n"]


def whole(body: bytes, status: str, extra: str = "") -> list[bytes]:
    head = f"HTTP/1.1 {status}\r\n{extra}content-length: {len(body)}\r\n\r\n"
    return [head.encode() + body]


async def with_server(
    replies: Callable[[bytes], Sequence[bytes]],
    then: Callable[[str], Awaitable[Any]],
) -> tuple[Any, list[bytes]]:
    """Run `then` with the URL of a server that answers a request with some bytes, and hangs up."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, asyncio.CancelledError):
                return  # the client has gone, or the test has what it wants
            length = next(
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length")
            )
            body = await reader.readexactly(length)
            requests.append(head + body)
            for part in replies(body):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await then(f"http://127.0.0.1:{port}"), requests


def one(parts: Sequence[bytes], ask: Ask, protocol: Protocol = "openai") -> tuple[Answer, bytes]:
    """Return what came of a request, and the request as the server got it, if it did."""

    async def then(url: str) -> Answer:
        return await send(Target(url=url, protocol=protocol), ask)

    answer, requests = asyncio.run(with_server(lambda body: parts, then))
    return answer, requests[0] if requests else b""


@given(cuts=st.lists(st.integers(0, 700), max_size=12), crlf=st.booleans())
@settings(max_examples=40)
def test_events_are_the_same_wherever_the_wire_cuts_them(cuts: list[int], crlf: bool) -> None:
    data = b": a comment\n\n" + sse(OPENAI_EVENTS, "\r\n\r\n" if crlf else "\n\n")
    data += b"data: [DONE]\n\n"
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[a:b] for a, b in pairwise(places)]
    answer, _ = one(chunked(parts), Ask(prompt=[1, 2], new_tokens=7))
    assert (answer.status, answer.text, answer.num_tokens) == (200, "Once upon", 7)
    assert answer.is_complete
    assert len(answer.moments) == 3
    assert answer.sent <= answer.moments[0] <= answer.moments[-1] <= answer.ended
    assert answer.first_token_s == answer.moments[0] - answer.due
    assert len(answer.between_s) == 2


def test_tgi_is_asked_and_read_in_its_own_words() -> None:
    answer, request = one(chunked([sse(TGI_EVENTS)]), Ask(prompt="a", new_tokens=2), protocol="tgi")
    assert request.startswith(b"POST /generate_stream HTTP/1.1\r\n")
    body = json.loads(request.partition(b"\r\n\r\n")[2])
    assert body["inputs"] == "a"
    assert body["parameters"]["max_new_tokens"] == 2
    assert (answer.text, answer.num_tokens, len(answer.moments)) == ("Once é", 2, 2)


def test_a_request_says_what_was_asked_with_its_key_and_options() -> None:
    async def then(url: str) -> Answer:
        target = Target(url=f"{url}/below/", model="m", api_key="k", options={"ignore_eos": True})
        return await send(target, Ask(prompt=(3, 4), new_tokens=9))

    _, requests = asyncio.run(with_server(lambda body: chunked([]), then))
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /below/v1/completions HTTP/1.1")
    assert b"authorization: Bearer k" in head
    found = json.loads(body)
    assert (found["model"], found["prompt"], found["max_tokens"]) == ("m", [3, 4], 9)
    assert found["ignore_eos"] is True
    assert found["stream"] is True
    assert found["temperature"] == 0


@pytest.mark.parametrize(
    ("parts", "status", "error"),
    [
        (
            whole(b'{"error": "too much"}', "429 Too Many Requests", "retry-after: 3\r\n"),
            429,
            "too much",
        ),
        (chunked([sse([OPENAI_EVENTS[0], {"error": {"message": "broke"}}])]), 200, "broke"),
        (chunked([sse(OPENAI_EVENTS[:1])])[:2], 200, "connection broke"),
        ([], 0, "connection broke"),
    ],
    ids=["refused", "an error in the stream", "cut off", "no answer"],
)
def test_what_goes_wrong_is_kept_with_its_reason(
    parts: list[bytes], status: int, error: str
) -> None:
    answer, _ = one(parts, Ask(prompt="a", new_tokens=4))
    assert answer.status == status
    assert error in answer.error
    assert not answer.is_complete
    assert answer.retry_after == ("3" if status == 429 else "")


def test_nobody_at_home_is_an_answer_too() -> None:
    async def then(url: str) -> str:
        return url

    url, _ = asyncio.run(with_server(lambda body: [], then))
    answer = asyncio.run(send(Target(url=url), Ask(prompt="a", new_tokens=1)))
    assert answer.status == 0
    assert "no connection" in answer.error


@pytest.mark.parametrize("leave_after", [0, 1])
def test_a_client_can_leave_in_the_middle(leave_after: int) -> None:
    answer, _ = one(
        chunked([sse([event]) for event in OPENAI_EVENTS]),
        Ask(prompt="a", new_tokens=4, leave_after=leave_after),
    )
    assert answer.has_left
    assert not answer.is_complete
    assert len(answer.moments) >= leave_after


def test_clients_send_all_requests_and_never_more_at_once_than_they_are() -> None:
    now = most = 0

    async def then(url: str) -> list[Answer]:
        nonlocal now, most
        asks = [Ask(prompt=str(number), new_tokens=1) for number in range(12)]
        return await closed(Target(url=url), asks, 3)

    def replies(body: bytes) -> list[bytes]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        return Counted(chunked([sse(OPENAI_EVENTS)]))

    class Counted(list[bytes]):
        def __iter__(self) -> Any:
            nonlocal now
            yield from super().__iter__()
            now -= 1

    answers, requests = asyncio.run(with_server(replies, then))
    asked = {json.loads(request.partition(b"\r\n\r\n")[2])["prompt"] for request in requests}
    assert asked == {str(number) for number in range(12)}
    assert all(answer.is_complete for answer in answers)
    assert 1 <= most <= 3


def test_arrivals_do_not_wait_for_answers() -> None:
    """All five are there before the first is answered: a closed loop would never end."""
    arrived = asyncio.Event()
    count = 0

    async def all_of_it() -> list[Answer]:
        nonlocal count

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal count
            await reader.readuntil(b"}")
            count += 1
            if count == 5:
                arrived.set()
            await arrived.wait()
            for part in chunked([sse(OPENAI_EVENTS)]):
                writer.write(part)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            target = Target(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            times = [0.0, 0.001, 0.002, 0.003, 0.004]
            return await opened(target, [(at, Ask(prompt="a", new_tokens=1)) for at in times])

    answers = asyncio.run(all_of_it())
    assert all(answer.is_complete for answer in answers)
    assert [answer.due for answer in answers] == sorted(answer.due for answer in answers)
    assert all(answer.sent >= answer.due for answer in answers)
