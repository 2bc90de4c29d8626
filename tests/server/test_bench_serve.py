"""`hanok bench serve` against a live server, in both of its protocols."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from tests.server.conftest import Server

from hanok.bench.arrivals import Arrival
from hanok.bench.prompts import Site, make_prompts, target_of, tokenize
from hanok.bench.traffic import Protocol
from hanok.cli.main import cli


def run(url: str, *options: str) -> Result:
    return CliRunner().invoke(cli, ["bench", "serve", url, *options])


@pytest.mark.parametrize("takes_ids", [True, False])
def test_prompts_are_as_long_as_the_server_counts_them(
    server: Server, client: httpx.Client, takes_ids: bool
) -> None:
    site = Site(server.url)
    target = target_of(site, "auto")
    prompts = make_prompts(lambda text: tokenize(site, target, text), takes_ids=takes_ids)
    assert prompts.is_exact
    for length in (2, 33, 150):
        arrival = Arrival(at_s=0.0, prompt_tokens=length, new_tokens=1)
        body = {"model": target.model, "prompt": prompts.of(arrival, 0), "max_tokens": 1}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        assert usage["prompt_tokens"] == length


@pytest.mark.parametrize(
    ("protocol", "kind"),
    [("auto", "token ids of exact length"), ("tgi", "text of exact length")],
)
def test_a_closed_loop_is_answered_in_full(server: Server, protocol: Protocol, kind: str) -> None:
    lengths = ("--input-tokens", "12", "--output-tokens", "5", "--duration", "0.2")
    bounds = ("--slo-ttft", "60000", "--slo-itl", "60000")
    result = run(server.url, "--clients", "2", "--protocol", protocol, *lengths, *bounds, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["prompts"] == kind
    assert found["protocol"] == ("openai" if protocol == "auto" else protocol)
    assert found["requests"] == found["complete"] >= 2
    assert found["statuses"] == {"200": found["requests"]}
    # All answers have five tokens: none may end early.
    assert found["tokens_per_s"] == pytest.approx(5 * found["requests_per_s"])
    assert found["goodput_per_s"] == pytest.approx(found["requests_per_s"])
    assert 0 < found["first_token_s"]["p50"] <= found["whole_s"]["p50"]


def test_a_trace_is_sent_as_it_is(server: Server, tmp_path: Path) -> None:
    trace, table = tmp_path / "trace.jsonl", tmp_path / "table.md"
    rows: list[dict[str, Any]] = [
        {"timestamp": 50 * index, "input_length": 20, "output_length": 3, "hash_ids": [1]}
        for index in range(4)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    result = run(server.url, "--trace", str(trace), "--time-scale", "0.5", "--markdown", str(table))
    assert result.exit_code == 0, result.output
    for text in (result.stdout, table.read_text()):
        assert "open loop, 4 requests in 0.1 s, trace trace.jsonl, times × 0.5" in text
        assert "4 of 4 requests answered in full (4 × 200)" in text
        assert "time to first token" in text
        assert "sent late" in text


def test_a_rate_is_an_open_loop(server: Server) -> None:
    lengths = ("--input-tokens", "5", "--output-tokens", "2", "--duration", "0.5")
    result = run(server.url, "--rate", "20", *lengths, "--seed", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "Poisson, 20 requests/s, seed 3" in found["schedule"]
    assert found["late_s"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--clients", "1", "--rate", "2"), "--clients and --rate exclude each other"),
        (("--time-scale", "2"), "belong to --trace"),
        (("--trace", "x", "--input-tokens", "2"), "--trace brings the lengths"),
        (("--trace", "nowhere.csv"), "nowhere.csv cannot be read"),
        (("--markdown", "nowhere/table.md"), "there is no folder"),
        (("--slo-ttft", "0"), "bound of the first token is 0 s"),
        ((), "does not answer"),
    ],
)
def test_loads_that_cannot_be_put_on_a_server_are_refused(
    options: tuple[str, ...], message: str
) -> None:
    assert message in str(run("http://127.0.0.1:1", *options).exception)
