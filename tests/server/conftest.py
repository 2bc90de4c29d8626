"""A server with the bundled model in a process of its own, as its users have it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)  # type: ignore[arg-type]


def start_server(*options: str) -> Server:
    command = [sys.executable, "-m", "hanok", "serve", "--port", "0", "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--threads", "1", "--users", "8", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    if process.stdout is None:
        raise AssertionError("its output is piped")
    for line in process.stdout:
        if found := re.search(r"Listening on (http://\S+)", line):
            return Server(url=found[1], process=process)
    raise AssertionError(f"the server ended with status {process.wait()}")


def wait_until_ready(server: Server) -> None:
    with server.client() as client:
        while client.get("/ready").status_code != 200:
            assert server.process.poll() is None


def stop(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    try:
        status = server.process.wait(PATIENCE_S)
    finally:
        server.process.kill()
        server.process.wait()
        if server.process.stdout is not None:
            server.process.stdout.close()
    return status


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    found = start_server()
    try:
        wait_until_ready(found)
        yield found
    finally:
        status = stop(found)
    assert status == 0


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found
