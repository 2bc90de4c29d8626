"""A server with the bundled model: in a process of its own, as its users have it, or in this one."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

import hanok
from hanok.engine.engine import Engine
from hanok.engine.model import Model
from hanok.server.options import ServerOptions
from hanok.server.run import configured, listen
from hanok.server.service import Service

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S, **options)  # type: ignore[arg-type]


def start_server(*options: str) -> Server:
    command = ["-m", "hanok", "serve", "--port", "0", "--dtype", "float32"]
    return start_python(*command, "--threads", "1", "--users", "8", *options)


def start_python(*words: str) -> Server:
    """Start a program that says where it listens."""
    process = subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
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
        status = server.process.wait(TIMEOUT_S)
    finally:
        server.process.kill()
        server.process.wait()
        for pipe in (server.process.stdin, server.process.stdout):
            if pipe is not None:
                pipe.close()
    return status


@contextmanager
def running(*options: str) -> Iterator[Server]:
    """A server that is ready, and that has to end well."""
    found = start_server(*options)
    try:
        wait_until_ready(found)
        yield found
    finally:
        status = stop(found)
    assert status == 0


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


@pytest.fixture
def sdk(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


@dataclass(frozen=True)
class LocalServer:
    """A server in a thread of this process, whose engine can be tampered with."""

    url: str
    service: Service
    engine: Engine

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S)


@pytest.fixture(scope="session")
def local_model() -> Model:
    return hanok.load(hanok.BUNDLED, dtype="float32", context=1024, batch=8)


@contextmanager
def local_server(
    model: Model, *, send_buffer: int | None = None, **given: Any
) -> Iterator[LocalServer]:
    options = ServerOptions(**{"model_id": "bundled", "port": 0} | given)
    service, engine = Service(options=options), Engine(model)
    listener = listen(options)
    if send_buffer is not None:  # connections have that of their listener
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = uvicorn.Server(configured(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    # As the server of its own: several threads wait for one another where others use the processors.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    service.open(model, engine)
    thread.start()
    try:
        yield LocalServer(
            url=f"http://127.0.0.1:{listener.getsockname()[1]}", service=service, engine=engine
        )
    finally:
        server.should_exit = True
        engine.close()
        thread.join(TIMEOUT_S)
        service.close()
        listener.close()
        torch.set_num_threads(num_threads)
    assert not thread.is_alive()


@pytest.fixture
def local(local_model: Model) -> Iterator[LocalServer]:
    with local_server(local_model) as found:
        yield found
