"""A server that guesses tokens: the same answers, and what came of it in usage, log and metrics."""

import re
from typing import Any

from tests.server.conftest import start_server, stop, wait_until_ready

import hanok
from hanok.cli.options import Drafting
from hanok.cli.verbs.tgi import drafting_of
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
    assert drafting_of(launch_options({"speculate": 3})) == Drafting(method="ngram", max_tokens=3)
    assert drafting_of(launch_options({})) == Drafting()
