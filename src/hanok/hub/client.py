"""HTTP requests to a hub and its storage: who asks, how long to wait, when to try again.

Python's own HTTP client: a part of a file goes from the disk to the network without a copy in memory
(sendfile), and which bytes were sent is known. The token is sent to the endpoint alone, never to where
it redirects, and is in no message.
"""

import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self
from urllib.parse import urljoin

from hanok.errors import CheckpointError, HubError
from hanok.hub.connections import Connections, origin, target_of
from hanok.hub.refusals import SERVER_ERRORS, Refused, refusal
from hanok.package import __version__

SLICE_BYTES = 2**22  # what progress is reported after
COPY_BYTES = 2**18  # read at a time where the connection is encrypted
MOST_REDIRECTS = 5
SAID_CHARACTERS = 500
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Answers after which the same request may succeed."""
REDIRECTS = {301, 302, 303, 307, 308}
NO_HEADERS: Mapping[str, str] = MappingProxyType({})

Log = Callable[[str], None]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a request waits, and how often it is tried."""

    tries: int = 6
    first_wait_s: float = 1.0
    """Before the second try; twice as long before each further one."""
    longest_wait_s: float = 300.0
    """A hub that asks for more (Retry-After) is not waited for."""
    timeout_s: float = 60.0
    """Without a byte sent or received."""
    commit_timeout_s: float = 300.0
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """Some bytes of a file, as the body of a request."""

    path: Path
    start: int
    size: int

    def send(self, connection: http.client.HTTPConnection, progress: Progress) -> None:
        """Send the bytes; CheckpointError where the file has become shorter."""
        left = self.size
        with self.path.open("rb") as file:
            while left:
                count = min(left, SLICE_BYTES)
                if isinstance(connection.sock, ssl.SSLSocket):
                    file.seek(self.start + self.size - left)
                    data = file.read(min(count, COPY_BYTES))
                    connection.sock.sendall(data)
                    sent = len(data)
                else:
                    assert connection.sock is not None
                    sent = connection.sock.sendfile(file, self.start + self.size - left, count)
                if not sent:
                    raise CheckpointError(
                        f"{self.path}: became shorter while it was sent. Push it once it is written."
                    )
                left -= sent
                progress(sent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, as it is sent and perhaps repeated."""

    method: str
    url: str
    what: str
    """What it is for, as errors name it: "the list of files of org/name"."""
    body: bytes | FilePart = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    may_repeat: bool = True
    """Whether a second one does no harm if the first was carried out, though its answer was lost."""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A successful answer, read to its end."""

    status: int
    headers: Message = field(repr=False)
    body: bytes = field(repr=False)
    what: str

    def object(self) -> Any:
        """Return the JSON value; HubError if the answer is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(
                f"{self.what}: the answer is not JSON, so this is not a hub; check HF_ENDPOINT."
            ) from error


class LostAnswerError(HubError):
    """A request may have been carried out, and its answer did not arrive."""


class Client:
    """Sends requests for one user to one hub; may be used by several threads."""

    def __init__(
        self,
        endpoint: str,
        token: str | None,
        *,
        patience: Patience = Patience(),
        log: Log = lambda text: None,
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.patience = patience
        self.log = log
        self._token = token
        self._connections = Connections()
        self._was_answered = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._connections.close()

    @property
    def has_token(self) -> bool:
        """Whether requests say who asks."""
        return bool(self._token)

    def get(self, path: str, what: str) -> Answer:
        """Return what is at a path of the endpoint, or at a whole URL."""
        return self.call(Request(method="GET", url=self.url(path), what=what))

    def post(
        self, path: str, value: Any, what: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> Answer:
        """Send a JSON value to a path of the endpoint, or to a whole URL."""
        headers = {"Content-Type": "application/json", **headers}
        body = json.dumps(value).encode()
        url = self.url(path)
        return self.call(Request(method="POST", url=url, what=what, body=body, headers=headers))

    def url(self, path: str) -> str:
        """Return the whole URL of a path."""
        return path if "://" in path else f"{self.endpoint}{path}"

    def call(self, request: Request, progress: Progress = lambda count: None) -> Answer:
        """Return the answer once it is a success; follows redirects and tries again.

        `progress` gets the bytes of a `FilePart` as they are sent, less those that are sent again.
        Raises Refused for another answer, LostAnswerError where a request that may not be repeated got
        none, HubError where the hub cannot be reached.
        """
        failures = 0
        while True:
            with self.open(request, progress) as response:
                try:
                    body = response.read()
                except (OSError, http.client.HTTPException) as error:
                    failures += 1
                    self._wait_or_raise(request, error, failures)
                    continue
                return Answer(
                    status=response.status,
                    headers=response.headers,
                    body=body,
                    what=request.what,
                )

    @contextmanager
    def open(
        self, request: Request, progress: Progress = lambda count: None
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield a successful answer whose body is still to be read."""
        redirects, failures = 0, 0
        while True:
            try:
                connection, response = self._exchange(request, progress)
            except (OSError, http.client.HTTPException) as error:
                failures += 1
                self._wait_or_raise(request, error, failures)
                continue
            self._was_answered = True
            try:
                if response.status < HTTPStatus.MULTIPLE_CHOICES:
                    yield response
                    return
                location = response.headers.get("Location")
                if response.status in REDIRECTS and location and redirects < MOST_REDIRECTS:
                    redirects += 1
                    response.read()
                    request = _redirected(request, response.status, location)
                    continue
                failures += 1
                refused = self._refused(request, response)
                wait_s = self._wait_after(response, failures)
                if not self._may_pass(request, refused.status, failures, wait_s):
                    raise refused
            finally:
                if response.isclosed():
                    self._connections.give(request.url, connection)
                else:  # its rest would be taken for the next answer
                    response.close()
                    connection.close()
            self._pause(request, f"HTTP {response.status}", wait_s, failures)

    def _may_pass(self, request: Request, status: int, failures: int, wait_s: float) -> bool:
        """Return whether the same request may succeed soon, and may be sent again."""
        return (
            status in PASSING
            and (status < SERVER_ERRORS or request.may_repeat)
            and failures < self.patience.tries
            and wait_s <= self.patience.longest_wait_s
        )

    def _exchange(
        self, request: Request, progress: Progress
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request once; a connection that the other side closed meanwhile is replaced."""
        timeout_s = request.timeout_s or self.patience.timeout_s
        while True:
            connection, is_used = self._connections.take(
                request.url, timeout_s, is_new=not request.may_repeat
            )
            sent = 0

            def count(more: int) -> None:
                nonlocal sent
                sent += more
                progress(more)

            try:
                return connection, self._send(connection, request, count)
            except BaseException as error:
                connection.close()
                progress(-sent)
                was_closed = isinstance(error, ConnectionError | http.client.RemoteDisconnected)
                if not (is_used and was_closed):
                    raise

    def _send(
        self, connection: http.client.HTTPConnection, request: Request, progress: Progress
    ) -> http.client.HTTPResponse:
        target, more = target_of(request.url)
        headers = self._headers(request) | more
        connection.putrequest(request.method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        try:
            if isinstance(request.body, FilePart):
                request.body.send(connection, progress)
            elif request.body:
                connection.send(request.body)
        except (BrokenPipeError, ConnectionResetError):
            # A server may refuse before it has read all, and then closes: its answer says why.
            try:
                return connection.getresponse()
            except (OSError, http.client.HTTPException):
                pass
            raise
        return connection.getresponse()

    def _headers(self, request: Request) -> dict[str, str]:
        body = request.body
        headers = {"User-Agent": f"hanok/{__version__}", "Accept-Encoding": "identity"}
        if self._token and origin(request.url) == origin(self.endpoint):
            headers["Authorization"] = f"Bearer {self._token}"
        if request.method != "GET" and request.method != "HEAD":
            size = body.size if isinstance(body, FilePart) else len(body)
            headers["Content-Length"] = str(size)
        return headers | dict(request.headers)

    def _refused(self, request: Request, response: http.client.HTTPResponse) -> Refused:
        try:
            body = response.read()
        except (OSError, http.client.HTTPException):
            body = b""
        said = response.headers.get("X-Error-Message") or _said(body)
        return refusal(
            response.status,
            what=request.what,
            host=origin(request.url),
            is_storage=origin(request.url) != origin(self.endpoint),
            has_token=self.has_token,
            code=response.headers.get("X-Error-Code", ""),
            said=self._without_token(said),
        )

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "…") if self._token else text

    def _wait_after(self, response: http.client.HTTPResponse, failures: int) -> float:
        """Return the seconds that a server asks to wait, or ours."""
        asked = response.headers.get("Retry-After", "")
        if asked.strip().isdigit():
            return float(asked)
        return self.patience.first_wait_s * 2.0 ** (failures - 1)

    def _wait_or_raise(self, request: Request, error: Exception, failures: int) -> None:
        """Wait before a request is sent again that got no answer; raise where that is no use."""
        if isinstance(error, ssl.SSLCertVerificationError):
            raise self._unreachable(request, error) from error
        is_wrong_address = isinstance(error, ConnectionRefusedError | socket.gaierror)
        if is_wrong_address and not self._was_answered:
            raise self._unreachable(request, error) from error
        if not request.may_repeat and not is_wrong_address:
            raise self._lost(request, error) from error
        if failures >= self.patience.tries:
            raise self._unreachable(request, error) from error
        wait_s = self.patience.first_wait_s * 2.0 ** (failures - 1)
        self._pause(request, _in_words(error), wait_s, failures)

    def _pause(self, request: Request, reason: str, wait_s: float, failures: int) -> None:
        self.log(
            f"{request.what}: {reason}; trying again in {wait_s:.0f} s "
            f"({failures + 1} of {self.patience.tries})."
        )
        self.patience.sleep(wait_s)

    def _unreachable(self, request: Request, error: Exception) -> HubError:
        return HubError(
            f"{request.what}: {origin(request.url)} cannot be reached: {_in_words(error)}. Check the "
            "network, the proxy and HF_ENDPOINT, and run it again; what was transferred is kept."
        )

    def _lost(self, request: Request, error: Exception) -> LostAnswerError:
        return LostAnswerError(
            f"{request.what}: the connection to {origin(request.url)} ended before the answer came: "
            f"{_in_words(error)}."
        )


def connect(
    endpoint: str | None = None,
    token: str | None = None,
    *,
    patience: Patience = Patience(),
    log: Log = lambda text: None,
) -> Client:
    """Return a client; endpoint and token are huggingface_hub's (HF_ENDPOINT, HF_TOKEN) by default.

    Raises HubError where HF_HUB_OFFLINE forbids requests.
    """
    # Imported here: it brings an HTTP client, and nothing else needs it.
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so no hub is asked. Unset it to push or pull.")
    return Client(endpoint or constants.ENDPOINT, token or get_token(), patience=patience, log=log)


def _redirected(request: Request, status: int, location: str) -> Request:
    request = replace(request, url=urljoin(request.url, location))
    is_other = status == HTTPStatus.SEE_OTHER
    return replace(request, method="GET", body=b"") if is_other else request


def _said(body: bytes) -> str:
    """Return a server's own explanation: the error in its JSON, or its text."""
    try:
        found = json.loads(body)
    except ValueError:
        text = body.decode("utf-8", errors="replace").strip()
        return "" if text.startswith("<") else text[:SAID_CHARACTERS]
    if isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("errors") or ""
    if isinstance(found, list):
        texts = [item.get("message", item) if isinstance(item, dict) else item for item in found]
        found = "; ".join(str(item) for item in texts)
    return str(found)[:SAID_CHARACTERS]


def _in_words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    return str(error) or type(error).__name__
