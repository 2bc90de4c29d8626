"""Clients from npm, unmodified, against a live server; skipped where there is no node."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import TIMEOUT_S
from tests.server.scripted import scripted_server

CLIENTS = Path(__file__).parent / "node"
GREETING = ["Good ", "day, ", "friend."]
TEXT = "".join(GREETING)
ANSWERS = {
    "Hello": GREETING,
    "Who was first?": ['{"name": "Ada", '],
    "the weather in Seoul?": [
        "Let me look.\n",
        '<tool_call>{"name": "get_weather", ',
        '"arguments": {"city": ',
        '"Seoul"}}',
        "</tool_call>\n",
    ],
    "rain, 12 degrees": ["It ", "rains."],
}
PERSON = {"name": "Ada", "roles": [{"kind": "author", "since": 0}]}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What each client got, by its name in clients.mjs."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    if not (CLIENTS / "node_modules").is_dir():
        pytest.skip(f"the clients are not installed: npm ci --prefix {CLIENTS}")
    with scripted_server(ANSWERS) as server:
        done = subprocess.run(
            [node, CLIENTS / "clients.mjs", server.url],
            capture_output=True,
            text=True,
            timeout=2 * TIMEOUT_S,
            check=True,
        )
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", ["openai_chat", "hub_text", "hub_chat", "ai_text"])
def test_answers_come_whole_and_in_streams(results: dict[str, Any], name: str) -> None:
    assert results[name] == {"whole": TEXT, "streamed": TEXT}


def test_a_model_is_found_by_its_name(results: dict[str, Any]) -> None:
    assert results["openai_model"] == {"id": "scripted"}


@pytest.mark.parametrize("name", ["openai_parse", "ai_object"])
def test_answers_have_the_types_that_were_asked_for(results: dict[str, Any], name: str) -> None:
    assert results[name] == PERSON


def test_tools_are_called_and_their_results_answered(results: dict[str, Any]) -> None:
    assert results["openai_tools"] == {"content": "It rains.", "asked": ["Seoul"]}
    function = results["hub_tools"]
    assert (function["name"], json.loads(function["arguments"])) == (
        "get_weather",
        {"city": "Seoul"},
    )
    found = results["ai_tools"]
    assert found["asked"] == ["Seoul", "Seoul"]
    assert found["whole"] == "It rains."
    assert "".join(found["streamed"]) == "Let me look.It rains."


def test_arguments_come_in_pieces(results: dict[str, Any]) -> None:
    pieces = results["ai_tools"]["deltas"]
    assert json.loads("".join(pieces)) == {"city": "Seoul"}
    assert len(pieces) > 1
