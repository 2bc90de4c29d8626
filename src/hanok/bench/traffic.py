"""Requests to a server that speaks TGI's or OpenAI's protocol, and when each of their tokens came.

The client has to take little of the processor that the server shares with it: one thread, h11 over plain
sockets, one connection for each request. Times are those of `time.perf_counter`, in seconds.
"""

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import urlsplit

import h11

Protocol = Literal["openai", "tgi"]
READ_BYTES = 2**16
HAS_NO_ANSWER = 0
"""In place of a status: the connection failed, or ended in the middle of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: a prompt, and how many tokens are to follow it."""

    prompt: str | Sequence[int]
    new_tokens: int
    leave_after: int | None = None
    """Close the connection when so many tokens have come, 0: at once; None: read to the end."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of one request."""

    due: float
    """When it should have been sent."""
    sent: float = 0.0
    status: int = HAS_NO_ANSWER
    moments: list[float] = field(default_factory=list)
    """When each event with a token came."""
    num_tokens: int = 0
    """As the server counts them at the end; those that were seen where it does not say."""
    ended: float = 0.0
    has_left: bool = False
    """Whether the connection was closed on purpose (`Ask.leave_after`)."""
    error: str = ""
    text: str = ""
    retry_after: str = ""
    request_id: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether all of it came."""
        return self.status == 200 and not self.error and not self.has_left

    @property
    def first_token_s(self) -> float | None:
        """From when it was due to its first token; None: there was none."""
        return self.moments[0] - self.due if self.moments else None

    @property
    def between_s(self) -> list[float]:
        """From each event with a token to the next."""
        return [after - before for before, after in pairwise(self.moments)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and how it is asked."""

    url: str
    protocol: Protocol = "openai"
    model: str = "tgi"
    api_key: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every body besides those of the request."""

    def body(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a request: greedy, streamed, to its full length."""
        if self.protocol == "tgi":
            parameters = {"max_new_tokens": ask.new_tokens, "do_sample": False, "details": True}
            return "/generate_stream", {
                "inputs": ask.prompt,
                "parameters": {**parameters, **self.options},
            }
        return "/v1/completions", {
            "model": self.model,
            "prompt": ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt),
            "max_tokens": ask.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }


async def send(target: Target, ask: Ask, due: float | None = None) -> Answer:
    """Send a request and read its answer, whatever its outcome."""
    now = time.perf_counter()
    answer = Answer(due=now if due is None else due, sent=now)
    address = urlsplit(target.url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        answer.error, answer.ended = f"no connection: {error}", time.perf_counter()
        return answer
    try:
        writer.write(_request(target, ask, f"{host}:{port}"))
        await writer.drain()
        if ask.leave_after == 0:
            answer.has_left = True
        else:
            await _read(reader, target.protocol, ask, answer)
    except (OSError, h11.RemoteProtocolError) as error:
        answer.error = answer.error or f"the connection broke: {error}"
    finally:
        answer.ended = time.perf_counter()
        answer.num_tokens = answer.num_tokens or len(answer.moments)
        writer.close()
    return answer


async def closed(target: Target, asks: Iterable[Ask], num_clients: int) -> list[Answer]:
    """Let so many clients send all requests, each its next one when its last one has ended."""
    answers: list[Answer] = []
    left = iter(asks)

    async def client() -> None:
        for ask in left:
            answers.append(await send(target, ask))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return answers


async def opened(target: Target, arrivals: Sequence[tuple[float, Ask]]) -> list[Answer]:
    """Send each request at its time, in seconds from now, whatever became of those before it."""
    began = time.perf_counter()

    async def later(at: float, ask: Ask) -> Answer:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        return await send(target, ask, began + at)

    return list(await asyncio.gather(*(later(at, ask) for at, ask in arrivals)))


def _request(target: Target, ask: Ask, host: str) -> bytes:
    path, body = target.body(ask)
    data = json.dumps(body).encode()
    headers = [
        ("host", host),
        ("content-type", "application/json"),
        ("content-length", str(len(data))),
        ("connection", "close"),
    ]
    if target.api_key is not None:
        headers.append(("authorization", f"Bearer {target.api_key}"))
    wire = h11.Connection(h11.CLIENT)
    path = urlsplit(target.url).path.rstrip("/") + path
    parts = (h11.Request(method="POST", target=path, headers=headers), h11.Data(data=data))
    return b"".join(wire.send(part) or b"" for part in (*parts, h11.EndOfMessage()))


async def _read(reader: asyncio.StreamReader, protocol: Protocol, ask: Ask, answer: Answer) -> None:
    wire = h11.Connection(h11.CLIENT)
    # A request that the connection need not know of: only its answer is read here.
    wire.send(h11.Request(method="POST", target="/", headers=[("host", "")]))
    wire.send(h11.EndOfMessage())
    body = b""
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Response):
            answer.status = event.status_code
            headers = {name: value.decode() for name, value in event.headers}
            answer.retry_after = headers.get(b"retry-after", "")
            answer.request_id = headers.get(b"x-request-id", "")
        elif isinstance(event, h11.Data):
            body += event.data
            if answer.status == 200:
                body = _take_events(body, protocol, answer)
                if ask.leave_after is not None and len(answer.moments) >= ask.leave_after:
                    answer.has_left = True
                    return
        else:  # the end
            if answer.status != 200:
                answer.error = body.decode(errors="replace")[:500]
            return


def _take_events(body: bytes, protocol: Protocol, answer: Answer) -> bytes:
    """Count the events that are there in full and return what is left."""
    now = time.perf_counter()
    *whole, rest = body.replace(b"\r\n", b"\n").split(b"\n\n")
    for data in _data(whole):
        if data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = json.dumps(event)[:500]
            continue
        text = _tgi_text(event, answer) if protocol == "tgi" else _openai_text(event, answer)
        if text is not None:
            answer.moments.append(now)
            answer.text += text
    return rest


def _data(events: Sequence[bytes]) -> Iterator[bytes]:
    for event in events:
        for line in event.split(b"\n"):
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _openai_text(event: Mapping[str, Any], answer: Answer) -> str | None:
    """Return the text of a chunk, None where it brings no token."""
    if event.get("usage"):
        answer.num_tokens = int(event["usage"]["completion_tokens"])
    if not event.get("choices"):
        return None
    choice = event["choices"][0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return text if text or not choice.get("finish_reason") else None


def _tgi_text(event: Mapping[str, Any], answer: Answer) -> str | None:
    """Return the text of an event, None where it brings no token."""
    if event.get("details"):
        answer.num_tokens = int(event["details"]["generated_tokens"])
    token = event.get("token")
    return None if token is None else str(token["text"])
