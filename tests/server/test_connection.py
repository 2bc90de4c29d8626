"""Connections that a client misuses: heads without end, requests that never come, too many at once.

Times are short here, and each test waits for the server to close; none waits for a time to pass.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from tests.server.conftest import TIMEOUT_S, LocalServer, local_server

from hanok.engine.model import Model
from hanok.server.connection import MOST_HEAD_BYTES, MOST_HEADERS, MOST_PIPELINED, MOST_URL_BYTES

GET = b"GET /health HTTP/1.1\r\nhost: a\r\n"
POST = b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
BODY = b'{"inputs": "a"}'
LENGTH = b"content-length: %d\r\n\r\n" % len(BODY)


@contextmanager
def connected(server: LocalServer) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    """Return what the server sends until it closes, also where it did not read all that was sent."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def is_well(server: LocalServer) -> bool:
    with server.client() as client:
        return client.get("/health").status_code == 200


@pytest.fixture(scope="module")
def patient(local_model: Model) -> Iterator[LocalServer]:
    """A server whose times are too long to matter."""
    with local_server(local_model, arrival_s=TIMEOUT_S, idle_s=TIMEOUT_S) as found:
        yield found


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (GET + b"".join(b"x%d: y\r\n" % number for number in range(MOST_HEADERS)), 431),
        (GET + b"x: " + b"y" * MOST_HEAD_BYTES + b"\r\n", 431),
        (b"GET /" + b"a" * MOST_URL_BYTES + b" HTTP/1.1\r\nhost: a\r\n", 414),
        (b"GET / HTTP/1.1\r\nhost a\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),
    ],
    ids=["many", "large", "long URL", "no header", "TLS"],
)
def test_a_head_beyond_the_limits_is_refused_in_json(
    patient: LocalServer, head: bytes, status: int
) -> None:
    with connected(patient) as connection:
        connection.sendall(head + b"\r\n")
        answer = read_to_end(connection)
    assert status_of(answer) == status
    assert b"content-type: application/json" in answer
    assert b'"error_type": "validation"' in answer
    assert is_well(patient)


@pytest.mark.parametrize(
    ("start", "more", "status"),
    [
        (GET + b"x: ", b"y" * 1000, 431),
        (GET, b"x: y\r\n", 431),
        (b"GET /", b"a" * 1000, 414),
        (POST + b"transfer-encoding: chunked\r\n\r\n1;", b"x" * 1000, 431),
        (POST + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n", 431),
    ],
    ids=["value", "headers", "URL", "chunk extension", "trailers"],
)
def test_what_never_ends_is_not_read_for_ever(
    patient: LocalServer, start: bytes, more: bytes, status: int
) -> None:
    with connected(patient) as connection:
        connection.sendall(start)
        sent = 0
        try:
            while sent < 100 * MOST_HEAD_BYTES:
                connection.sendall(more)
                sent += len(more)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_to_end(connection)
    assert sent < 100 * MOST_HEAD_BYTES
    if answer:  # what was not read when it closed may have taken the answer along
        assert status_of(answer) == status
    assert is_well(patient)


def test_requests_within_the_limits_are_answered(patient: LocalServer) -> None:
    headers = {f"x{number}": "y" * 500 for number in range(MOST_HEADERS - 10)}
    with patient.client() as client:
        assert client.get("/health", headers=headers).status_code == 200
        found = client.get(f"/health?a={'b' * (MOST_URL_BYTES - 100)}")
        assert found.status_code == 200

        def parts() -> Iterator[bytes]:
            yield b'{"inputs": "'
            for _ in range(40_000):  # each in a chunk: more bytes beside the body than in it
                yield b"a"
            yield b'"}'

        kind = {"content-type": "application/json"}
        assert len(client.post("/tokenize", content=parts(), headers=kind).json()) > 1000


def test_requests_may_be_sent_before_the_answer_was_read(patient: LocalServer) -> None:
    with connected(patient) as connection:
        request = POST + LENGTH + BODY
        connection.sendall(request * (MOST_PIPELINED - 1) + GET + b"connection: close\r\n\r\n")
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == MOST_PIPELINED


def test_too_many_requests_at_once_end_the_connection(patient: LocalServer) -> None:
    with connected(patient) as connection:
        connection.sendall((GET + b"\r\n") * 5000)
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 200 OK") < 5000
    assert is_well(patient)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"\r\n" * 3, None),
        (b"POST /gene", 408),
        (GET + b"x: y", 408),
        (POST + LENGTH + BODY[:5], 408),
        (POST + b"transfer-encoding: chunked\r\n\r\n5\r\n{", 408),
        (POST.replace(b"/tokenize", b"/nowhere") + LENGTH, 404),
        (POST + b"content-length: 99999999\r\n\r\n{", 413),
        (GET + b"\r\n", 200),
        (POST + LENGTH + BODY, 200),
        (GET + b"\r\n" + GET, 200),
    ],
    ids=[
        "nothing",
        "empty lines",
        "half a line",
        "half a head",
        "half a body",
        "half a chunk",
        "a body for nobody",
        "a body too large",
        "an idle connection",
        "idle behind a body",
        "half behind a whole",
    ],
)
def test_connections_that_ask_for_nothing_are_closed(
    local_model: Model, sent: bytes, status: int | None
) -> None:
    with (
        local_server(local_model, arrival_s=0.2, idle_s=0.2) as server,
        connected(server) as connection,
    ):
        connection.sendall(sent)
        answer = read_to_end(connection)
        assert is_well(server)
    if status is None:
        assert answer == b""
        return
    assert status_of(answer) == status
    if status == 408:
        assert b'"error_type":"timeout"' in answer.replace(b": ", b":")


def test_a_body_that_comes_slowly_is_cut_off_however_much_comes(local_model: Model) -> None:
    with (
        local_server(local_model, arrival_s=0.2, idle_s=TIMEOUT_S) as server,
        connected(server) as connection,
    ):
        connection.sendall(POST + b"content-length: 1999999\r\n\r\n")
        sent = 0
        try:
            while sent < 1_999_998:
                sent += connection.send(b" ")
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 1_999_998


def test_an_answer_that_takes_long_is_not_cut_off(local_model: Model) -> None:
    """Neither its length nor the beginning of a next request ends it."""
    body = b'{"inputs": "a", "parameters": {"max_new_tokens": 600, "ignore_eos": true}}'
    head = POST.replace(b"/tokenize", b"/generate") + b"content-length: %d\r\n\r\n" % len(body)
    with (
        local_server(local_model, arrival_s=0.01, idle_s=0.01) as server,
        connected(server) as connection,
    ):
        connection.sendall(head + body + b"GET /he")
        answer = read_to_end(connection)
    assert status_of(answer) == 200
    assert b'"generated_text":"' in answer


def test_the_connection_that_waited_longest_makes_room(local_model: Model) -> None:
    most = 4
    with (
        local_server(
            local_model, max_connections=most, arrival_s=TIMEOUT_S, idle_s=TIMEOUT_S
        ) as server,
        ExitStack() as stack,
    ):
        opened = [stack.enter_context(connected(server)) for _ in range(most)]
        for connection in opened[1:]:
            connection.sendall(GET + b"\r\n")
            assert status_of(connection.recv(65536)) == 200
        with server.client() as client:
            assert client.get("/health").status_code == 200
            assert read_to_end(opened[0]) == b""  # it never asked for anything
            opened[2].sendall(GET + b"\r\n")
            assert status_of(opened[2].recv(65536)) == 200
            assert client.get("/health").status_code == 200


def test_beyond_the_limit_who_comes_is_told_so_while_all_are_answered(
    local_model: Model,
) -> None:
    parameters = {"max_new_tokens": 500, "ignore_eos": True, "details": True}
    body = {"inputs": "a", "parameters": parameters}
    with (
        local_server(local_model, max_connections=1) as server,
        server.client() as busy,
        busy.stream("POST", "/generate_stream", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        with connected(server) as other:
            answer = read_to_end(other)
        assert (status_of(answer), b"retry-after: 1" in answer.lower()) == (503, True)
        assert '"finish_reason":"length"' in [line for line in lines if line][-1]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/messages", "/v1/messages/count_tokens?beta=true"]
)
def test_errors_have_the_shape_of_the_protocol(patient: LocalServer, path: str) -> None:
    with connected(patient) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nhost: a\r\n".encode() + b"x: y\r\n" * MOST_HEADERS + b"\r\n"
        )
        answer = read_to_end(connection)
    body = httpx.Response(431, content=answer.partition(b"\r\n\r\n")[2]).json()
    assert body["error"]["type"] == "invalid_request_error"
    assert body.get("type") == ("error" if "messages" in path else None)
    assert ("http_status_code" in body["error"]) == ("messages" not in path)


def test_no_connection_becomes_one_without_limits(patient: LocalServer) -> None:
    """Asked for a WebSocket, the server answers the request as any other."""
    upgrade = (
        b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with connected(patient) as connection:
        connection.sendall(GET + upgrade)
        answer = connection.recv(65536)
    assert status_of(answer) == 200
    assert b"x-request-id" in answer
