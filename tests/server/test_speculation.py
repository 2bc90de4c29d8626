"""A server that guesses tokens: the same answers, and what came of it in usage, log and metrics."""

import re
from typing import Any

import click
from tests.server.conftest import start_server, stop, wait_until_ready

import hanok
from hanok.cli.options import model_options, speculation_options
from hanok.cli.verbs.tgi import load_options
from hanok.server.launcher import launch_options

STORY = "The dog saw a cat. The cat saw the dog. The dog saw a bird. " * 3


def test_answers_are_the_same_and_guesses_are_counted() -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    server = start_server("--speculate", "ngram", "--max-draft", "7")
    drafted = accepted = 0
    try:
        wait_until_ready(server)
        with server.client() as client:
            for options in ({"temperature": 0}, {"temperature": 0.7, "seed": 3}):
                body: dict[str, Any] = {"model": "", "prompt": STORY, "max_tokens": 80, **options}
                found = client.post("/v1/completions", json=body).json()
                expected = model.generate(STORY, max_new_tokens=80, **options)  # type: ignore[arg-type]
                assert found["choices"][0]["text"] == expected.text
                details = found["usage"]["completion_tokens_details"]
                accepted += details["accepted_prediction_tokens"]
                drafted += sum(details.values())
            metrics = client.get("/metrics").text
    finally:
        assert stop(server) == 0
    counted = {
        name: float(value)
        for name, value in re.findall(r"^(hanok_\w+_tokens_total) (\S+)$", metrics, re.MULTILINE)
    }
    assert counted["hanok_drafted_tokens_total"] == drafted
    assert counted["hanok_accepted_tokens_total"] == accepted
    skipped = re.search(r"^tgi_request_skipped_tokens_sum (\S+)$", metrics, re.MULTILINE)
    assert skipped is not None
    assert float(skipped[1]) == accepted


def test_tgis_flag_is_the_most_that_is_guessed() -> None:
    found = load_options(launch_options({"speculate": 3}))
    assert (found["speculate"], found["max_draft"], found["draft"]) == ("ngram", 3, None)
    off = load_options(launch_options({}))
    assert (off["speculate"], off["max_draft"]) == ("off", None)


def test_a_launch_names_every_option_that_a_start_reads() -> None:
    def nothing(**_: object) -> None: ...

    command = model_options(speculation_options(click.command()(nothing)))
    unread = {"cache_folder", "pipeline_depth"}  # packed copies are off, requests are not pipelined
    names = {item.name for item in command.params} - unread
    assert names == set(load_options(launch_options({})))
