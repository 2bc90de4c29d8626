"""What every request passes: an id, its key and limits, unexpected errors, and one line in the log."""

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Collection, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hanok.server.errors import ServerError, is_anthropic
from hanok.server.route import Route
from hanok.server.service import Service
from hanok.server.web import Exchange, error_response

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
CLOSED_REQUEST = 499  # for the log: the client disconnected


class Gate:
    """The outermost layer: ids, limits, keys, unexpected errors, and the log."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: Service,
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
            self._service.ended(exchange, is_counted=route is not None and route.needs_key)

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
