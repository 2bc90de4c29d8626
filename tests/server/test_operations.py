"""What those rely on who run a server: keys, limits, disconnects, stopping, the served contract."""

import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from tests.server.conftest import TIMEOUT_S, Server, start_server, stop, wait_until_ready

LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


def metric(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.M)
    assert found, name
    return float(found[1])


def wait_for(client: httpx.Client, name: str, value: float) -> None:
    until = time.monotonic() + TIMEOUT_S
    while metric(client, name) != value:
        assert time.monotonic() < until, name


def send_stop(server: Server, client: httpx.Client) -> None:
    """Tell a server to stop, and wait until it knows."""
    server.process.send_signal(signal.SIGTERM)
    until = time.monotonic() + TIMEOUT_S
    while client.get("/ready").status_code != 503:
        assert time.monotonic() < until


def test_a_client_that_leaves_frees_its_blocks(server: Server, client: httpx.Client) -> None:
    for streams in (True, False):
        with server.client() as leaving:
            cancelled = metric(client, "hanok_requests_cancelled_total")
            request = leaving.build_request(
                "POST", "/v1/completions", json=LONG | {"stream": streams}
            )
            if streams:
                response = leaving.send(request, stream=True)
                next(response.iter_lines())
                response.close()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    leaving.send(
                        leaving.build_request("POST", "/v1/completions", json=LONG, timeout=0.2)
                    )
            wait_for(client, "hanok_requests_cancelled_total", cancelled + 1)
            wait_for(client, "hanok_cache_used_blocks", 0)


def test_a_deadline_of_a_request(client: httpx.Client) -> None:
    found = client.post("/v1/completions", json=LONG | {"timeout": 0.05})
    assert (found.status_code, found.json()["error_type"]) == (408, "timeout")
    assert found.json()["error"]["message"] == "not finished within 0.05 s."
    wait_for(client, "hanok_cache_used_blocks", 0)


def test_a_client_that_never_reads_holds_nobody_up(server: Server, client: httpx.Client) -> None:
    body = json.dumps(LONG | {"stream": True, "logprobs": 20}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        found = client.post("/v1/completions", json=LONG | {"max_tokens": 20})
        assert found.json()["usage"]["completion_tokens"] == 20
    wait_for(client, "hanok_cache_used_blocks", 0)


def test_metrics_add_up_to_what_clients_saw(client: httpx.Client) -> None:
    before = (
        metric(client, "tgi_request_success"),
        metric(client, "tgi_request_generated_tokens_sum"),
    )
    for count in (3, 5, 8):
        found = client.post(
            "/generate", json={"inputs": "a", "parameters": {"max_new_tokens": count}}
        )
        assert found.status_code == 200
    after = (
        metric(client, "tgi_request_success"),
        metric(client, "tgi_request_generated_tokens_sum"),
    )
    assert (after[0] - before[0], after[1] - before[1]) == (3, 16)


@pytest.fixture(scope="module")
def guarded() -> Server:
    found = start_server("--api-key", "Secret", "--max-concurrent-requests", "3")
    wait_until_ready(found)
    yield found  # type: ignore[misc]
    assert stop(found) == 0


def test_a_key_is_asked_for_and_compared_exactly(guarded: Server) -> None:
    body = {
        "inputs": "a",
        "prompt": "a",
        "messages": [{"role": "user", "content": "a"}],
        "instances": [],
    }
    with guarded.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        guarded_paths = [path for path, item in paths.items() if "post" in item]
        assert len(guarded_paths) >= 9
        for path in guarded_paths:
            for key in (None, "Bearer secret", "Secret", "Bearer Secret"):
                headers = {"authorization": key} if key else {}
                found = client.post(path, json=body, headers=headers)
                assert (found.status_code == 401) is (key != "Bearer Secret"), path
        assert client.get("/health").status_code == 200


def test_beyond_the_limit_clients_are_told_when_to_come_back(guarded: Server) -> None:
    headers = {"authorization": "Bearer Secret"}
    with guarded.client(headers=headers) as client, ThreadPoolExecutor(8) as pool:
        body = LONG | {"max_tokens": 200}
        found = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(8)))
        statuses = sorted(response.status_code for response in found)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        refused = next(response for response in found if response.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error_type"] == "overloaded"
        assert client.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200


def test_stopping_lets_requests_finish_and_takes_no_more() -> None:
    server = start_server()
    try:
        wait_until_ready(server)
        with server.client() as client, ThreadPoolExecutor(1) as pool:
            with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                with server.client() as other:
                    send_stop(server, other)
                    refused = pool.submit(other.post, "/v1/completions", json=LONG).result()
                assert refused.status_code == 503
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert server.process.wait(TIMEOUT_S) == 0
    finally:
        stop(server)


def test_stopping_under_load_cuts_nobody_off() -> None:
    count, length = 24, 250
    server = start_server()
    begun = threading.Semaphore(0)

    def stream(path: str) -> tuple[int, str | None]:
        """Return how many tokens came, and why no more did."""
        tokens, reason = 0, None
        body = LONG | {"inputs": LONG["prompt"], "max_tokens": length, "stream": True}
        body["parameters"] = {"max_new_tokens": length, "ignore_eos": True, "details": True}
        with server.client() as client, client.stream("POST", path, json=body) as response:
            lines = [line for line in response.iter_lines() if begun.release() or line]
        if path.startswith("/v1/"):
            assert lines.pop() == "data: [DONE]"
        for line in lines:
            event = json.loads(line.removeprefix("data: "))
            details = event.get("details") or event.get("choices", [{}])[0]
            reason = details.get("finish_reason")
            tokens += 1
        return tokens, reason

    def whole(path: str) -> tuple[int, str | None]:
        body = LONG | {"max_tokens": length}
        with server.client() as client:
            found = client.post(path, json=body).json()
        return found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]

    ways = [(stream, "/v1/completions"), (stream, "/generate_stream"), (whole, "/v1/completions")]
    try:
        wait_until_ready(server)
        with server.client() as client, ThreadPoolExecutor(count) as pool:
            asked = [pool.submit(*ways[number % len(ways)]) for number in range(count)]
            for _ in range(2 * count // 3):
                assert begun.acquire(timeout=TIMEOUT_S)
            until = time.monotonic() + TIMEOUT_S
            while (
                sum(metric(client, f"hanok_requests_{s}") for s in ("running", "waiting")) < count
            ):
                assert time.monotonic() < until
            send_stop(server, client)
            refused = []
            while not all(request.done() for request in asked):
                try:
                    refused.append(client.post("/v1/completions", json=LONG).status_code)
                except httpx.TransportError:  # nothing listens any more
                    break
            assert set(refused) <= {503}
            assert [request.result() for request in asked] == [(length, "length")] * count
        assert server.process.wait(TIMEOUT_S) == 0
    finally:
        stop(server)


def test_what_is_not_finished_in_time_is_cut_off_with_an_error() -> None:
    server = start_server("--termination-seconds", "0")
    try:
        wait_until_ready(server)
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert "was stopped before the request was finished" in rest[-2]
        assert json.loads(rest[-2])["error"]["http_status_code"] == 503
        assert server.process.wait(TIMEOUT_S) == 0
    finally:
        stop(server)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_served_contract_holds_for_whatever_is_sent(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: dict[str, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.method == "get":
            continue

        @settings(max_examples=12, suppress_health_check=list(HealthCheck))
        @schemathesis_given(operation)
        def check(case: schemathesis.Case) -> None:
            bounded(case)
            response = case.call(base_url=server.url, timeout=TIMEOUT_S)
            assert response.status_code < 500, (case.path, case.body, response.text)
            assert str(response.status_code) in case.operation.definition.raw["responses"]
            seen[case.path] = seen.get(case.path, 0) + 1

        check()
    assert len(seen) >= 9


def schemathesis_given(operation):  # type: ignore[no-untyped-def]
    from hypothesis import given

    return given(case=operation.as_strategy())


def bounded(case: schemathesis.Case) -> None:
    """Keep the answers short: what is tested is what is asked."""
    body = case.body
    if not isinstance(body, dict):
        return
    lengths = {
        "/v1/responses": ("max_output_tokens",),
        "/v1/messages": ("max_tokens",),
        "/v1/messages/count_tokens": (),
    }
    for name in lengths.get(case.path, ("max_tokens", "max_completion_tokens")):
        if not isinstance(body.get(name), int) or body[name] > 4:
            body[name] = 4
    parameters = body.get("parameters")
    if isinstance(parameters, dict):
        wanted = parameters.get("max_new_tokens")
        parameters["max_new_tokens"] = wanted if isinstance(wanted, int) and wanted < 4 else 4
    elif "inputs" in body:
        body["parameters"] = {"max_new_tokens": 4}
    if isinstance(body.get("instances"), list):
        for item in body["instances"]:
            item["parameters"] = {"max_new_tokens": 2}
