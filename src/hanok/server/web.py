"""Between the wire and the routes: bodies read within limits, answers, streams, and what every request
gets: an id, a check of its key, one line in the log.
"""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
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
    from hanok.server.service import Service

LOG = logging.getLogger("hanok.server")
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
CLOSED_REQUEST = 499  # for the log: the client had gone
COMMENT = ":\n\n"
"""A server-sent event that clients pass over."""

B = TypeVar("B", bound=BaseModel)
Handler = Callable[["Service", Request, Any], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route: what it takes, what it gives, and who may ask."""

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
    """Another header that may bring the key as it is; "": `Authorization` alone."""
    needs_model: bool = False
    """Whether it waits for the model, and answers 503 before."""
    statuses: tuple[int, ...] = ()
    """Errors that it may answer with, beside those that every route with a body may."""

    @property
    def shown_path(self) -> str:
        """The path without what only the router reads: "{model}" for "{model:path}"."""
        return re.sub(r":\w+\}", "}", self.path)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What is known of one request while it is answered, for its log line and the metrics."""

    id: str
    began: float
    path: str = ""
    validation_s: float = 0.0
    tickets: "list[Ticket]" = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    """The effective parameters, without the prompt."""
    error: ServerError | None = None
    status: int = 0


def exchange_of(request: Request) -> Exchange:
    """Return the exchange that a request belongs to."""
    found: Exchange = request.state.exchange
    return found


def note_parameters(request: Request, options: Mapping[str, Any]) -> None:
    """Let the log tell what a request asked for, beside its text."""
    kept = {key: value for key, value in options.items() if value not in (None, [], {})}
    exchange_of(request).parameters = kept


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes of any JSON value."""
        return dumps(content).encode()


def dumps(value: Any) -> str:
    """Return JSON text; numbers that JSON has no name for, such as -inf, become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(
            _finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


async def read_body(request: Request, model: type[BaseModel], max_depth: int) -> BaseModel:
    """Return the body of a request. Raises ServerError for one that is not as `model` says."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ServerError(f"Expected a body of `application/json`, not `{kind}`", status=415)
    data = await request.body()
    return parse_body(data, model, max_depth)


def parse_body(data: bytes, model: type[BaseModel], max_depth: int) -> BaseModel:
    """Return a JSON text as a model; see `read_body`."""

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    too_deep = ServerError(f"the JSON is nested deeper than {max_depth} levels", status=400)
    try:
        value = json.loads(data, parse_constant=no_number)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:  # of the decoding too
        raise ServerError(f"the body is not JSON: {error}", status=400) from None
    if _is_deeper(value, max_depth):
        raise too_deep
    return validated(value, model)


def validated(value: Any, model: type[B]) -> B:
    """Return a JSON value as a model; ServerError names the first field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _first_of(error) from None


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_is_deeper(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)
    return False


def _first_of(error: ValidationError) -> ServerError:
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    return invalid(f"{place or 'body'}: {found['msg']}", place or None)


class EventStream(Response):
    """Server-sent events. When the client goes, or reads nothing for long, `give_up` is called."""

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
        """`events` are as they are sent: see `as_event`."""
        super().__init__(
            None,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._events = events
        self._give_up = give_up
        self._keep_alive_s = keep_alive_s
        self._keep_alive = keep_alive
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come, until there are no more or the client is gone."""
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
        kept_alive = with_keep_alive(self._events, self._keep_alive_s, self._keep_alive)
        async with aclosing(kept_alive) as texts:
            async for text in texts:
                message = {"type": "http.response.body", "body": text.encode(), "more_body": True}
                await asyncio.wait_for(send(message), self._write_timeout_s)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_event(data: str, name: str = "") -> str:
    """Return a server-sent event; `data` is one line."""
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


async def with_keep_alive(
    events: AsyncGenerator[str, None], seconds: float, keep_alive: str
) -> AsyncGenerator[str, None]:
    """Yield events as they come, and `keep_alive` whenever none came for some seconds.

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
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def error_response(error: ServerError, path: str) -> Json:
    """Return an error in the shape of a path's protocol."""
    return Json(body_on(error, path), status_on(error.status, path), error.headers)


class Gate:
    """The outermost layer: ids, limits, keys, errors that nobody expected, and the log."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: "Service",
        routes: Mapping[tuple[str, str], Route],
        methods: Mapping[str, Collection[str]],
        patterns: Mapping[str, re.Pattern[str]],
    ) -> None:
        """`methods` are those that each path has, paths that are no `Route` among them.

        `patterns` say of paths with a parameter, such as "/v1/models/{model:path}", what they match.
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
            if not isinstance(error, ServerError):
                LOG.exception("request %s failed", exchange.id)
            exchange.error = as_server_error(error)
            if exchange.status:  # the answer had begun: cutting it off is all that is left
                raise
            await error_response(exchange.error, exchange.path)(scope, receive, tracked)
        finally:
            route = self._routes.get((scope["method"], self._declared(exchange.path)))
            self._service.ended(exchange, route)

    def _check(self, scope: Scope, headers: Mapping[str, bytes]) -> None:
        """Raise ServerError for a request that may not be answered."""
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
            given = headers.get("authorization", b"")
            is_right = hmac.compare_digest(given, f"Bearer {key}".encode())
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
        """Return a path as its route declares it; itself where none matches."""
        if path in self._methods:
            return path
        matching = (name for name, found in self._patterns.items() if found.match(path))
        return next(matching, path)

    def _too_large(self) -> ServerError:
        limit = self._service.options.payload_limit
        return ServerError(f"the body is larger than {limit:,} bytes", status=413)

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` for a body of limited length, however it is sent."""
        left = self._service.options.payload_limit

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return limited
