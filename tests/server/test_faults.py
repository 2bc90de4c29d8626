"""Faults, seen by clients: one request fails, the rest is served, and health says so."""

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
import torch
from tests.server.conftest import TIMEOUT_S, LocalServer, local_server
from tests.server.test_operations import metric, wait_for
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.engine import grammar
from hanok.engine.model import Model

BAD, GOOD = "The dog", ["Once upon a time", "Lily", "Tom and his friend went"]
LENGTH = 24
Forward = Callable[[ForwardBatch], Tensor]


def ask(client: httpx.Client, path: str, prompt: str) -> tuple[int, Any]:
    """Return the status and the text, or the error, of one of the ways to ask."""
    chat = {"messages": [{"role": "user", "content": prompt}]}
    body: dict[str, Any] = {
        "inputs": prompt,
        "prompt": prompt,
        "parameters": {"max_new_tokens": LENGTH, "ignore_eos": True},
        "max_tokens": LENGTH,
        "ignore_eos": True,
        "temperature": 0,
        "stream": path.endswith("?stream") or path == "/generate_stream",
    }
    found = client.post(path.removesuffix("?stream"), json=body | (chat if "chat" in path else {}))
    if not body["stream"]:
        value = found.json()
        if "error" in value:
            return found.status_code, value
        if "choices" not in value:
            return found.status_code, value["generated_text"]
        choice = value["choices"][0]
        return found.status_code, choice.get("text") or choice["message"]["content"]
    lines = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
    if path.startswith("/v1/"):
        assert lines.pop() == "[DONE]"
    values = [json.loads(line) for line in lines]
    if "error" in values[-1]:
        return found.status_code, values[-1]
    if "token" in values[-1]:
        return found.status_code, values[-1]["generated_text"]
    choices = [value["choices"][0] for value in values]
    texts = [choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices]
    return found.status_code, "".join(texts)


PATHS = [
    "/generate",
    "/generate_stream",
    "/v1/completions",
    "/v1/completions?stream",
    "/v1/chat/completions",
    "/v1/chat/completions?stream",
]


def raising(forward: Forward, hits: Callable[[Tensor], Tensor]) -> Forward:
    def faulty(batch: ForwardBatch) -> Tensor:
        if hits(batch.token_ids).any():
            raise RuntimeError("a fault of these tokens")
        return forward(batch)

    return faulty


def poisoned(forward: Forward, hits: Callable[[Tensor], Tensor]) -> Forward:
    def faulty(batch: ForwardBatch) -> Tensor:
        hidden = forward(batch)
        rows = hits(batch.token_ids)
        # In a prefill the last token's row is what the next one is chosen by.
        for end, count in zip(batch.last_tokens(), batch.host.query_lengths, strict=True):
            if rows[end + 1 - count : end + 1].any():
                hidden = hidden.clone()
                hidden[end] = torch.nan
        return hidden

    return faulty


@pytest.mark.parametrize("when", ["in the prompt", "on the way"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [(raising, "a fault of these tokens"), (poisoned, "not finite numbers")],
    ids=["exception", "NaN"],
)
def test_a_fault_in_a_pass_fails_the_request_that_has_it(
    local: LocalServer,
    local_model: Model,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    words: str,
    when: str,
) -> None:
    answer = local_model.generate(BAD, max_new_tokens=LENGTH, ignore_eos=True).token_ids
    innocent = {token for prompt in GOOD for token in local_model.encode(prompt)}
    for prompt in GOOD:
        innocent |= set(
            local_model.generate(prompt, max_new_tokens=LENGTH, ignore_eos=True).token_ids
        )
    own = local_model.encode(BAD) if when == "in the prompt" else answer[6:]
    bad = torch.tensor(next([token] for token in own if token not in innocent))

    def hits(token_ids: Tensor) -> Tensor:
        return torch.isin(token_ids, bad)

    paths = [path for path in PATHS if "chat" not in path]
    asked = [(path, prompt) for path in paths for prompt in (*GOOD, BAD)]
    with local.client() as client:
        expected = {prompt: ask(client, "/generate", prompt) for prompt in GOOD}
        runner = local.engine._runner
        monkeypatch.setattr(runner, "_hidden_states", fault(runner._hidden_states, hits))
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda one: ask(client, *one), asked))
        for (path, prompt), (status, value) in zip(asked, found, strict=True):
            if prompt in GOOD:
                assert (status, value) == expected[prompt]
                continue
            is_stream = "stream" in path
            assert status == (200 if is_stream else 424)
            assert value["error_type"] == "generation"
            message = value["error"]["message"] if path.startswith("/v1/") else value["error"]
            assert words in message
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        assert metric(client, 'tgi_request_failure{err="generation"}') == len(paths)
        wait_for(client, "hanok_cache_used_blocks", 0)
    assert local.service.num_open == 0


@pytest.mark.parametrize("path", PATHS)
def test_every_route_tells_of_a_fault(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def faulty(batch: ForwardBatch) -> Tensor:
        raise MemoryError("no room for activations")

    with local.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(local.engine._runner, "_hidden_states", faulty)
            status, value = ask(client, path, BAD)
        assert status == (200 if "stream" in path else 424)
        assert value["error_type"] == "generation"
        assert "no room for activations" in json.dumps(value)
        assert ask(client, path, BAD)[1] == ask(client, path, BAD)[1] != value
        assert client.get("/health").status_code == 200


def test_a_step_that_hangs_shows_in_health_until_it_goes_on(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanok.engine.engine.STALL_S", 0.0)
    monkeypatch.setattr("hanok.engine.engine.STALL_FACTOR", 0.0)
    inside, go_on = threading.Event(), threading.Event()
    forward = local.engine._runner._hidden_states

    def hanging(batch: ForwardBatch) -> Tensor:
        inside.set()
        assert go_on.wait(TIMEOUT_S)
        return forward(batch)

    with local.client() as client, ThreadPoolExecutor(2) as pool:
        expected = ask(client, "/generate", BAD)
        monkeypatch.setattr(local.engine._runner, "_hidden_states", hanging)
        asked = [pool.submit(ask, client, "/generate", BAD) for _ in range(2)]
        try:
            assert inside.wait(TIMEOUT_S)
            health = client.get("/health")
            assert health.status_code == 503
            assert health.json() == {"error": "unhealthy", "error_type": "healthcheck"}
            assert client.get("/ready").status_code == 503
            assert client.get("/").status_code == 503
            assert client.get("/info").status_code == 200  # only the engine hangs
        finally:
            go_on.set()
        assert [request.result() for request in asked] == [expected] * 2
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200


EXPLODING: dict[str, dict[str, Any]] = {
    "bounds in bounds": {
        "type": "json",
        "value": {
            "type": "array",
            "minItems": 10**6,
            "items": {"type": "array", "minItems": 10**6, "items": {"type": "string"}},
        },
    },
    "choices of choices": {
        "type": "json",
        "value": {
            "allOf": [
                {"anyOf": [{"properties": {f"{i} {j}": {"type": "string"}}} for j in range(4)]}
                for i in range(20)
            ]
        },
    },
    "pattern": {
        "type": "json",
        "value": {"type": "string", "pattern": r"^(\w?){300}(\w{1,300}){1,300}$"},
    },
    "regex": {"type": "regex", "value": r"(\w?){300}(\w{1,300}){1,300}"},
    "states": {"type": "regex", "value": r"([ab]*a[ab]{24}c?)+"},
    "references": {
        "type": "json",
        "value": {
            "$defs": {
                **{str(i): {"minLength": 1, "$ref": f"#/$defs/{i + 1}"} for i in range(1500)},
                "1500": {"type": "null"},
            },
            "$ref": "#/$defs/0",
        },
    },
}


@pytest.mark.parametrize("name", EXPLODING)
def test_an_exploding_schema_holds_nobody_up(local: LocalServer, name: str) -> None:
    body = {
        "inputs": "A list:",
        "parameters": {"max_new_tokens": 12, "grammar": EXPLODING[name], "details": True},
    }
    with local.client() as client, ThreadPoolExecutor(3) as pool:
        expected = ask(client, "/generate", BAD)
        refused = [pool.submit(client.post, "/generate", json=body) for _ in range(3)]
        while not all(request.done() for request in refused):
            assert ask(client, "/generate", BAD) == expected
            assert client.get("/health").status_code == 200
        for request in refused:
            found = request.result()
            assert found.status_code in (200, 422, 424), found.text
            if found.status_code != 200:
                assert "grammar" in found.json()["error"]
        assert ask(client, "/generate", BAD) == expected
        wait_for(client, "hanok_cache_used_blocks", 0)


def test_a_schema_that_is_not_compiled_in_time_is_refused(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    compile_now = grammar._compile

    def slow(spec: Any, tokenizer: Any) -> Any:
        assert go_on.wait(TIMEOUT_S)
        return compile_now(spec, tokenizer)

    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(grammar, "_compile", slow)
    body = {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "late"}}}
    with local.client() as client:
        found = client.post("/generate", json=body)
        assert (found.status_code, found.json()["error_type"]) == (422, "validation")
        assert "not compiled within 0.05 s" in found.json()["error"]
        assert ask(client, "/generate", BAD)[0] == 200
        monkeypatch.setattr(grammar, "COMPILE_SECONDS", TIMEOUT_S)
        go_on.set()
        assert client.post("/generate", json=body).json()["generated_text"] == "late"


def test_who_never_reads_is_given_up_and_others_are_served(local_model: Model) -> None:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": BAD}],
            "max_tokens": 900,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 20,
            "stream": True,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with (
        local_server(local_model, write_timeout_s=0.5, send_buffer=4096) as server,
        server.client() as client,
        socket.socket() as connection,
    ):
        expected = ask(client, "/generate", BAD)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        host, port = server.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + body)
        assert ask(client, "/generate", BAD) == expected
        until = time.monotonic() + TIMEOUT_S
        while server.service.num_open:
            assert time.monotonic() < until
            assert ask(client, "/generate", BAD) == expected
        assert metric(client, 'tgi_request_failure{err="dropped"}') == 1
        wait_for(client, "hanok_cache_used_blocks", 0)
        mine = connection.getsockname()
        while any(found.raddr == mine for found in psutil.Process().net_connections("tcp")):
            assert time.monotonic() < until
