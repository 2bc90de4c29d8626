"""Between HTTP and the routes: bodies read within limits, answers, streams, and what every request gets:
an id, a check of its key, one line in the log.
"""

import asyncio
import codecs
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hanok.server.errors import (
    ServerError,
    as_server_error,
    body_on,
    invalid,
    is_anthropic,
    status_on,
)

if TYPE_CHECKING:
    from hanok.engine.ticket import Ticket
    from hanok.server.options import ServerOptions
    from hanok.server.service import Service

LOG = logging.getLogger("hanok.server")
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
CLOSED_REQUEST = 499  # for the log: the client disconnected
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
Handler = Callable[["Service", Request, Any], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route: its body, its answer, and its access."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    """Of a JSON answer with status 200; None: described by `content_type` alone."""
    content_type: str = "application/json"
    streams: bool = False
    """Whether it may answer with server-sent events."""
    needs_key: bool = False
    key_header: str = ""
    """Another header that may hold the bare key; "": only `Authorization`."""
    needs_model: bool = False
    """Whether it needs the model, and answers 503 until it is loaded."""
    needs_head: bool = False
    """Whether it generates tokens, and answers 422 if the model only makes embeddings."""
    statuses: tuple[int, ...] = ()
    """Errors that it may answer with, besides those of every route with a body."""

    @property
    def shown_path(self) -> str:
        """The path without the router's converters: "{model}" for "{model:path}"."""
        return re.sub(r":\w+\}", "}", self.path)


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


class Gate:
    """The outermost layer: ids, limits, keys, unexpected errors, and the log."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: "Service",
        routes: Mapping[tuple[str, str], Route],
        methods: Mapping[str, Collection[str]],
        patterns: Mapping[str, re.Pattern[str]],
    ) -> None:
        """`methods` has the methods of each path, including paths without a `Route`.

        `patterns` has what paths with a parameter, such as "/v1/models/{model:path}", match.
        """
        self._app = app
        self._service = service
        self._routes = routes
        self._methods = methods
        self._patterns = patterns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
        given = headers.get("x-request-id", b"").decode("latin-1")
        exchange = Exchange(
            id=given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
            began=time.monotonic(),
            path=scope["path"],
        )
        scope.setdefault("state", {})["exchange"] = exchange

        names = [b"x-request-id"]
        if is_anthropic(exchange.path):
            names.append(b"request-id")

        async def tracked(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    *((name, exchange.id.encode()) for name in names),
                ]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive), tracked)
        except ClientDisconnect:
            exchange.status = exchange.status or CLOSED_REQUEST
            exchange.error = ServerError("the client went away", kind="dropped", status=499)
        except Exception as error:
            told = exchange.failed(error)
            if exchange.status:  # the answer had begun: it can only be cut off
                raise
            await error_response(told, exchange.path)(scope, receive, tracked)
        finally:
            route = self._routes.get((scope["method"], self._declared(exchange.path)))
            self._service.ended(exchange, route)

    def _check(self, scope: Scope, headers: Mapping[str, bytes]) -> None:
        """Raise ServerError for a request that is not allowed."""
        method, path = scope["method"], scope["path"]
        declared = self._declared(path)
        if declared not in self._methods:
            raise ServerError(
                f"there is no {path}; GET /docs lists what there is", kind="not_found", status=404
            )
        if method not in self._methods[declared]:
            allowed = ", ".join(sorted(self._methods[declared]))
            raise ServerError(
                f"{path} takes {allowed}, not {method}",
                kind="not_found",
                status=405,
                headers={"Allow": allowed},
            )
        route = self._routes.get((method, declared))
        key = self._service.options.api_key
        if route is not None and route.needs_key and key is not None:
            scheme, _, given = headers.get("authorization", b"").partition(b" ")
            is_right = hmac.compare_digest(given.strip(), key.encode())
            is_right &= scheme.lower() == b"bearer"  # schemes are case-insensitive: RFC 9110, 11.1
            if route.key_header:
                given = headers.get(route.key_header, b"")
                is_right |= hmac.compare_digest(given, key.encode())
            if not is_right:
                other = f" or `{route.key_header}: KEY`" if route.key_header else ""
                raise ServerError(
                    f"the API key is missing or wrong; send it as `Authorization: Bearer KEY`{other}",
                    kind="authentication",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", b"0")
        if length.isdigit() and int(length) > self._service.options.payload_limit:
            raise self._too_large()

    def _declared(self, path: str) -> str:
        """Return a path as its route declares it; the path itself if none matches."""
        if path in self._methods:
            return path
        matching = (name for name, found in self._patterns.items() if found.match(path))
        return next(matching, path)

    def _too_large(self) -> ServerError:
        limit = self._service.options.payload_limit
        return ServerError(f"the body is larger than {limit:,} bytes", status=413)

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` for a body of limited length, however it is sent, in limited time."""
        options = self._service.options
        left, until = options.payload_limit, time.monotonic() + options.arrival_s
        is_whole = False

        async def limited() -> Message:
            nonlocal left, is_whole
            if is_whole:  # the next message is the disconnect
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError:
                raise self._too_slow() from None
            is_whole = not message.get("more_body", False)
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return limited

    def _too_slow(self) -> ServerError:
        return ServerError(
            f"the body was not sent within {self._service.options.arrival_s:g} s",
            kind="timeout",
            status=408,
            headers={"Connection": "close"},
        )
