"""Limits of a connection: the size of a request's head, and the time until it has arrived.

uvicorn parses requests with httptools, which has no such limits: a client, even one without a key, could
send headers until memory is full, or keep idle connections open forever.
"""

import asyncio
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from hanok.server.errors import ServerError, body_on, status_on
from hanok.server.options import ServerOptions

MOST_HEADERS = 100  # as in hyper, on which TGI is built
MOST_HEAD_BYTES = 64 * 1024
MOST_URL_BYTES = 8 * 1024
BYTES_OF_CHUNK = 8
"""Overhead counted for each chunk of a body, which may be a single byte."""
MOST_PIPELINED = 16
"""Requests that a client may pipeline before it reads the first answer."""


class Connection(HttpToolsProtocol):
    """One client connection. Called by the event loop's thread only."""

    def __init__(self, options: ServerOptions, max_connections: int, **given: Any) -> None:
        """`given` are the arguments that uvicorn passes to a protocol."""
        super().__init__(**given)
        self._options = options
        self._max_connections = max_connections
        self._timer: asyncio.TimerHandle | None = None
        """Fires at `_until` or earlier: most requests neither create nor cancel one."""
        self._waits_since = 0.0
        self._until: float | None = None
        """When the connection is closed, by the loop's clock; None while a request is answered."""
        self._refusal: ServerError | None = None
        self._is_arriving = False
        """Whether a request has begun to arrive and is incomplete."""
        self._is_in_head = False
        self._num_headers = 0
        self._head_bytes = 0
        """Bytes of this request besides its body."""
        self._body_bytes = 0
        self._has_begun = False
        """Whether a request began in the data being read."""

    @property
    def since(self) -> float | None:
        """When it began to wait for a request, by the loop's clock; None while one is answered."""
        return None if self._until is None or self._is_answering() else self._waits_since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Accept a connection; if there are too many, close the one that has been idle longest."""
        super().connection_made(transport)
        self._wait(self._options.arrival_s)
        if len(self.connections) <= self._max_connections:
            return
        others = [item for item in self.connections if isinstance(item, Connection)]
        waiting = [item for item in others if item is not self and item.since is not None]
        if waiting:
            min(waiting, key=lambda item: item.since or 0.0).close()
        else:
            self._refuse(
                ServerError(
                    f"there are {self._max_connections} connections, as many as there may be",
                    kind="overloaded",
                    status=503,
                    headers={"Retry-After": "1"},
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection."""
        self._until = None
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def close(self) -> None:
        """Close it unless a request is being answered; answer 408 if one has begun to arrive."""
        self._until = None
        if self.transport.is_closing() or self._is_answering():
            return  # idle again after the answer
        if self._is_arriving and (self.cycle is None or self.cycle.scope is not self.scope):
            seconds = self._options.arrival_s
            message = f"the request was not sent within {seconds:g} s"
            self._refuse(ServerError(message, kind="timeout", status=408))
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Parse received data; count the bytes that belong to no body."""
        body_bytes, self._has_begun = self._body_bytes, False
        super().data_received(data)
        if self._has_begun and self._is_in_head:
            self._wait(self._options.arrival_s)
        if self._has_begun or not self._is_arriving or self.transport.is_closing():
            return
        self._head_bytes += len(data) - (self._body_bytes - body_bytes)
        if self._has_large_head():
            self._refuse(_too_large(f"more than {MOST_HEAD_BYTES:,} bytes"))

    def on_message_begin(self) -> None:
        """Start counting."""
        super().on_message_begin()
        self._is_arriving = self._is_in_head = self._has_begun = True
        self._num_headers = self._head_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Receive a part of the URL."""
        super().on_url(url)
        if len(self.url) > MOST_URL_BYTES:
            message = f"the URL has more than {MOST_URL_BYTES:,} bytes"
            self._stop_reading(ServerError(message, status=414))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receive a header."""
        self._num_headers += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._num_headers > MOST_HEADERS:
            self._stop_reading(_too_large(f"more than {MOST_HEADERS} headers"))
        if self._has_large_head():
            self._stop_reading(_too_large(f"more than {MOST_HEAD_BYTES:,} bytes"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let the application answer, which has its own deadline for the body."""
        if len(self.pipeline) >= MOST_PIPELINED:
            message = f"more than {MOST_PIPELINED} requests wait for an answer on this connection"
            self._stop_reading(ServerError(message, status=400))
        self._is_in_head, self._until = False, None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Receive a part of a body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._is_arriving = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that was answered early."""
        super().on_response_complete()
        if not self._is_answering() and not self.transport.is_closing():
            self._wait(self._options.arrival_s if self._is_arriving else self._options.idle_s)

    def send_400_response(self, msg: str) -> None:
        """Answer invalid or oversized requests."""
        self._refuse(self._refusal or ServerError(msg, status=400))

    def _has_large_head(self) -> bool:
        return self._head_bytes > MOST_HEAD_BYTES + BYTES_OF_CHUNK * self._body_bytes

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self, seconds: float) -> None:
        """Close the connection after some seconds, unless a request has arrived by then."""
        self._waits_since = self.loop.time()
        self._until = self._waits_since + seconds
        if self._timer is not None and self._timer.when() > self._until:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(self._until, self._look)

    def _look(self) -> None:
        """Close the connection if its time is up, else check again later."""
        self._timer = None
        if self._until is not None and self.loop.time() < self._until:
            self._timer = self.loop.call_at(self._until, self._look)
        elif self._until is not None:
            self.close()

    def _stop_reading(self, refusal: ServerError) -> None:
        """Abort parsing: the exception makes uvicorn call `send_400_response`."""
        self._refusal = refusal
        raise httptools.HttpParserError(str(refusal))

    def _refuse(self, error: ServerError) -> None:
        """Answer with an error and close; an answer that has begun is cut off instead."""
        if not self._is_answering():
            path = getattr(self, "url", b"").partition(b"?")[0].decode("latin-1")
            body = json.dumps(body_on(error, path)).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **error.headers,
            }
            lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
            self.transport.write(
                b"".join([STATUS_LINE[status_on(error.status, path)], *lines, b"\r\n", body])
            )
        self.transport.close()


def _too_large(how: str) -> ServerError:
    return ServerError(f"the request's head has {how}", status=431)
