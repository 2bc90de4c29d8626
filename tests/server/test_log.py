"""The log: a line is a line whatever a client sends, and no text of a body stands in it."""

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.server.conftest import TIMEOUT_S, LocalServer, local_server

from hanok.engine.model import Model
from hanok.server.errors import ServerError, invalid
from hanok.server.log import LineFormatter, described, log_request
from hanok.server.web import Exchange

FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)(?: |$)')
SECRET = "xyzzy"


def lines_of(exchange: Exchange, *, as_json: bool = False) -> list[str]:
    """Return the lines that a terminal would show for a request."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("hanok.requests")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        log_request(exchange, as_json=as_json)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    (record,) = records
    return LineFormatter("%(message)s").format(record).splitlines()


def fields_of(line: str) -> dict[str, str]:
    """Read a line as a program would that knows nothing of what a client may send."""
    found, at = {}, 0
    while at < len(line):
        field = FIELD.match(line, at)
        assert field, line[at:]
        found[field[1]] = json.loads(field[2]) if field[2].startswith('"') else field[2]
        at = field.end()
    return found


@settings(max_examples=300)
@given(
    path=st.text(), kind=st.text(st.characters(), min_size=1), message=st.text(), value=st.floats()
)
@example(path="/x\n2026-01-01 INFO request_id=forged status=200", kind="a", message="", value=0)
@example(path='/x" status=200', kind="a=b", message="\x1b[2J\u202e\x85\u2028", value=0)
@example(path='"', kind="\\", message="\\n", value=0)
def test_a_line_stays_one_line_and_reads_back(
    path: str, kind: str, message: str, value: float
) -> None:
    exchange = Exchange(id="1", began=time.monotonic(), path=path, status=200)
    exchange.error = ServerError(message, kind=kind, status=503)
    exchange.parameters = {"temperature": value}
    (line,) = lines_of(exchange)
    assert line.isascii() or line.isprintable()
    assert not re.search(r"[\x00-\x1f\x7f]", line)
    found, expected = fields_of(line), described(exchange)
    assert list(found) == list(expected)
    assert (found["path"], found["error"]) == (path, f"{kind}: {message}")
    assert found["temperature"] == json.dumps(value)
    (line,) = lines_of(exchange, as_json=True)
    assert json.loads(line)["path"] == path


def test_what_a_traceback_says_begins_no_line() -> None:
    try:
        raise ValueError("\n2026-01-01 00:00:00,000 INFO request_id=forged\x1b[2J")
    except ValueError as error:
        record = logging.LogRecord("a", 40, "a", 1, "failed\n%s", ("b",), (ValueError, error, None))
    first, *rest = LineFormatter("%(message)s").format(record).splitlines()
    assert first == "failed"
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


def test_errors_of_clients_are_told_to_them_and_name_the_field_here() -> None:
    exchange = Exchange(id="1", began=time.monotonic(), path="/", status=422)
    exchange.error = invalid(SECRET, f"stop.{SECRET}")
    found = described(exchange)
    assert (found["error"], found["field"]) == ("validation", "stop")
    exchange.error = invalid(SECRET, f"/properties/{SECRET}")
    assert "field" not in described(exchange)


@pytest.fixture(scope="module")
def logged(local_model: Model) -> Iterator[LocalServer]:
    with local_server(local_model) as found:
        yield found


def user(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": SECRET} | fields], "max_tokens": 1}


def call(arguments: str) -> dict[str, Any]:
    calls = [{"function": {"name": SECRET, "arguments": arguments}}]
    return {"messages": [{"role": "assistant", "tool_calls": calls}], "max_tokens": 1}


CHAT = "/v1/chat/completions"
BODIES: list[tuple[str, Any]] = [
    ("/generate", {"inputs": SECRET, "parameters": {"max_new_tokens": 1, "stop": [SECRET]}}),
    ("/generate", {"inputs": "a", "parameters": {"stop": [SECRET] * 9}}),
    ("/generate", {"inputs": "a", "parameters": {"adapter_id": SECRET}}),
    ("/generate", {"inputs": "a", "parameters": {"grammar": {"type": SECRET}}}),
    (
        "/generate",
        {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": f"({SECRET}"}}},
    ),
    (
        "/generate",
        {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": {SECRET: 1}}}},
    ),
    (
        "/generate",
        {
            "inputs": "a",
            "parameters": {"grammar": {"type": "json", "value": {"properties": {SECRET: 5}}}},
        },
    ),
    ("/v1/completions", {"prompt": SECRET, "max_tokens": 1, "stop": SECRET, "user": SECRET}),
    ("/v1/completions", {"prompt": SECRET, "model": SECRET}),
    ("/v1/completions", {"prompt": {SECRET: 1}}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {SECRET: 1}}),
    ("/v1/completions", {"prompt": "a", "suffix": SECRET}),
    ("/v1/completions", {"prompt": "a", "cache_salt": SECRET, "max_tokens": 1}),
    (CHAT, user()),
    (CHAT, user(role=SECRET)),
    (CHAT, user(content=[{"type": SECRET}])),
    (CHAT, user() | {"tool_choice": SECRET, "tools": [{"function": {"name": "f"}}]}),
    (CHAT, user() | {"response_format": {"type": SECRET}}),
    (CHAT, user() | {"chat_template_kwargs": {"messages": SECRET}}),
    (CHAT, call(SECRET)),
    (CHAT, call(f'{{"a": "{SECRET}"}}')),
    ("/vertex", {"instances": [{"messages": SECRET}]}),
    ("/vertex", {"instances": [{"inputs": SECRET, "parameters": {"max_new_tokens": 1}}]}),
    ("/tokenize", {"inputs": SECRET}),
    ("/invocations", {SECRET: SECRET}),
    ("/explain", {"route": SECRET}),
    ("/explain", {"route": CHAT, "body": user()}),
]


@pytest.mark.parametrize("headers", [{}, {"authorization": f"Bearer {SECRET}"}])
def test_no_text_of_a_body_stands_in_the_log(
    logged: LocalServer, caplog: pytest.LogCaptureFixture, headers: dict[str, str]
) -> None:
    caplog.set_level(logging.DEBUG)
    statuses = []
    with logged.client() as client:
        for path, body in BODIES:
            statuses.append(client.post(path, json=body, headers=headers).status_code)
        statuses.append(client.post("/generate", content=f"[{SECRET}", headers=headers).status_code)
    assert {200, 404, 415, 422} == set(statuses)
    lines = [record for record in caplog.records if record.name.startswith("hanok")]
    assert len(lines) >= len(BODIES)
    for record in lines:
        assert SECRET not in LineFormatter("%(message)s").format(record)
        # What a client does wrong is none of ours: no traceback, and no alarm.
        assert record.levelno < logging.WARNING
        assert not record.exc_info


def test_a_forged_path_is_one_line(logged: LocalServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hanok.requests")
    host, port = logged.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(
            b"GET /x%0a2026%20INFO%20request_id=forged%1b%5b2J HTTP/1.1\r\nhost: a\r\n"
            b"x-request-id: a=b\r\nconnection: close\r\n\r\n"
        )
        while connection.recv(65536):
            pass
    (record,) = caplog.records
    (line,) = LineFormatter("%(message)s").format(record).splitlines()
    assert line.isprintable()
    found = fields_of(line)
    assert found["path"] == "/x\n2026 INFO request_id=forged\x1b[2J"
    assert found["request_id"] == "a=b"


def test_what_is_a_fault_here_is_logged_with_its_traceback(
    logged: LocalServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    with logged.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(type(logged.service), "submit", broken)
            assert client.post("/generate", json=body).status_code == 500
        monkeypatch.setattr("hanok.server.routes.tgi.token_of", broken)
        assert "error" in client.post("/generate_stream", json=body).text
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(records) == 2
    for record in records:
        assert "a fault of ours" in LineFormatter("%(message)s").format(record)
