"""Between HTTP and the routes: bodies read within limits, answers, streams, and what every request gets:
an id, a check of its key, one line in the log.
"""

import asyncio
import codecs
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hanok.server.errors import (
    ServerError,
    as_server_error,
    body_on,
    invalid,
    status_on,
)

if TYPE_CHECKING:
    from hanok.engine.ticket import Ticket
    from hanok.server.options import ServerOptions

LOG = logging.getLogger("hanok.server")
COMMENT = ":\n\n"
"""A server-sent event that clients ignore."""
MOST_CONTAINERS = 50_000
"""Arrays and objects of one body."""
TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""Strings of a JSON text; an unterminated one extends to its end, so that each byte is read once."""
AT_ONCE = 2000
"""Numbers or strings that are written to JSON at once."""
BUGS = (424, 500)
"""Statuses caused by the server, not the client: the log has their tracebacks."""

B = TypeVar("B", bound=BaseModel)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What is known of one request, for its log line and the metrics."""

    id: str
    began: float
    path: str = ""
    validation_s: float = 0.0
    tickets: "list[Ticket]" = field(default_factory=list)
    num_open: int = 0
    """Sequences that it counts as at a time."""
    parameters: dict[str, float] = field(default_factory=dict)
    """The effective parameters; lists and tables by their length, so that no text is logged."""
    error: ServerError | None = None
    status: int = 0

    def failed(self, error: Exception) -> ServerError:
        """Record an exception, and return the error for the client."""
        self.error = as_server_error(error)
        if self.error.status in BUGS and not isinstance(error, ServerError):
            LOG.error("request %s failed", self.id, exc_info=error)
        return self.error


def exchange_of(request: Request) -> Exchange:
    """Return the exchange of a request."""
    found: Exchange = request.state.exchange
    return found


def note_parameters(request: Request, options: Mapping[str, Any]) -> None:
    """Record a request's parameters for the log, without its texts."""
    kept = {key: value for key, value in options.items() if value not in (None, [], {})}
    exchange_of(request).parameters = {
        key: value if isinstance(value, int | float) else len(value) for key, value in kept.items()
    }


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes of any JSON value."""
        return dumps(content).encode()


def dumps(value: Any) -> str:
    """Return JSON text that UTF-8 can encode.

    Numbers that JSON cannot express, such as -inf, become null; lone surrogates are escaped.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        value = _finite(value)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text


def dumps_in_parts(value: Any) -> Iterator[str]:
    """Yield what `dumps` returns in parts of about a millisecond, so that other threads can run."""
    if _weight(value) <= AT_ONCE:
        yield dumps(value)
    elif isinstance(value, dict):
        for number, (key, item) in enumerate(value.items()):
            yield f"{',' if number else '{'}{dumps(key)}:"
            yield from dumps_in_parts(item)
        yield "}"
    else:
        count = max(1, AT_ONCE // max(_weight(value[0]), _weight(value[-1])))
        for start in range(0, len(value), count):
            yield "," if start else "["
            if count == 1:
                yield from dumps_in_parts(value[start])
            else:
                yield dumps(value[start : start + count])[1:-1]
        yield "]"


def _weight(value: Any) -> int:
    """Return about how many numbers and words of text a JSON value is."""
    if isinstance(value, dict):
        return 1 + sum(map(_weight, value.values()))
    if isinstance(value, list) and value:  # of the same kind, except that the first may be missing
        return 1 + len(value) * max(_weight(value[0]), _weight(value[-1]))
    return 1


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


async def read_body(
    request: Request, model: type[BaseModel], options: "ServerOptions"
) -> BaseModel:
    """Return the body of a request. Raises ServerError for one that does not match `model`.

    A page of another origin cannot send a body declared as JSON without a preflight request (CORS), so
    bodies with no or another content type are refused.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ServerError("Expected request with `Content-Type: application/json`", status=415)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ServerError(
            f"bodies are taken as they are, without `Content-Encoding`. Given: {encoding}",
            status=415,
        )
    value = parse_json(await request.body(), options)
    await asyncio.sleep(0)  # a large body has kept other requests waiting
    return validated(value, model)


def parse_json(data: bytes, options: "ServerOptions") -> Any:
    """Return the value of a JSON text (RFC 8259). ServerError for an invalid or too large one.

    The event loop is blocked while a value is built and checked: arrays and objects are counted first,
    since each of them costs as much as hundreds of bytes of text. Lone surrogates are refused (as by
    Rust's serde, which TGI uses).
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    if has_many_containers(data):
        message = f"the JSON has more than {MOST_CONTAINERS:,} lists and objects"
        raise ServerError(message, status=413)
    too_deep = ServerError(
        f"the JSON is nested deeper than {options.max_json_depth} levels", status=400
    )
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        if "recursion" in str(error):
            raise too_deep from None
        raise ServerError(f"the body is not JSON: {error}", status=400) from None
    if _is_deeper(value, options.max_json_depth):
        raise too_deep
    return value


def has_many_containers(data: bytes) -> bool:
    """Return whether a JSON text opens too many arrays and objects, outside its strings."""
    brackets = (b"[", b"{")
    if sum(map(data.count, brackets)) <= MOST_CONTAINERS:
        return False
    data = TEXTS.sub(b"", data)
    return sum(map(data.count, brackets)) > MOST_CONTAINERS


def validated(value: Any, model: type[B]) -> B:
    """Return a JSON value as a model; ServerError names the first field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _first_of(error) from None


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether arrays and objects are nested deeper than so many levels."""
    is_container = frozenset((dict, list)).__contains__
    found = [value] if is_container(type(value)) else []
    for _ in range(levels):
        inner: list[Any] = []
        for item in found:
            values = item.values() if isinstance(item, dict) else item
            # Without a line of Python for each: there may be a million.
            inner += compress(values, map(is_container, map(type, values)))
        found = inner
    return bool(found)


def _first_of(error: ValidationError) -> ServerError:
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    return invalid(f"{place or 'body'}: {found['msg']}", place or None)


class Pieces(Response):
    """An answer in pieces, each sent as soon as the client can receive it."""

    def __init__(
        self,
        pieces: AsyncGenerator[str, None],
        *,
        write_timeout_s: float,
        give_up: Callable[[], None] = lambda: None,
        headers: Mapping[str, str] | None = None,
        media_type: str = "application/json",
    ) -> None:
        """If the client disconnects, or stops reading for too long, `give_up` is called."""
        super().__init__(None, headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._pieces = pieces
        self._give_up = give_up
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces as they arrive, until there are no more or the client disconnects."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            sending.result()
        except (OSError, TimeoutError) as error:
            raise ClientDisconnect from error
        finally:
            self._give_up()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                message = {"type": "http.response.body", "body": piece.encode(), "more_body": True}
                await asyncio.wait_for(send(message), self._write_timeout_s)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_event(data: str, name: str = "") -> str:
    """Return a server-sent event; `data` is one line."""
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


class EventStream(Pieces):
    """Server-sent events."""

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        give_up: Callable[[], None],
        *,
        keep_alive_s: float,
        write_timeout_s: float,
        keep_alive: str = COMMENT,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`events` are as they are sent: see `as_event`; and see `Pieces`."""
        super().__init__(
            with_keep_alive(events, keep_alive_s, keep_alive),
            write_timeout_s=write_timeout_s,
            give_up=give_up,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})},
            media_type="text/event-stream",
        )


async def with_keep_alive(
    events: AsyncGenerator[str, None], seconds: float, keep_alive: str
) -> AsyncGenerator[str, None]:
    """Yield events as they arrive, and `keep_alive` whenever none arrived for some seconds.

    `events` is closed when this is.
    """
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield keep_alive
                continue
            try:
                yield waiting.result()
            except StopAsyncIteration:
                return
            finally:
                waiting = None
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await events.aclose()


async def until_gone(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def error_response(error: ServerError, path: str) -> Json:
    """Return an error in the shape of a path's protocol."""
    return Json(body_on(error, path), status_on(error.status, path), error.headers)
