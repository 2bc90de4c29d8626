"""Texts with a gap, over OpenAI's `suffix` and llama.cpp's /infill."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import LocalServer, local_server

import hanok
from hanok.checkpoint.infill import Infill, find_infill
from hanok.engine.model import Model

PREFIX, SUFFIX = "Once upon a time, there was a", " who had a red ball."
MARKERS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>"]


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The bundled model, the last tokens of its vocabulary replaced by markers, as plain as Qwen's."""
    folder = tmp_path_factory.mktemp("coder") / "model"
    shutil.copytree(hanok.BUNDLED, folder)
    path = folder / "tokenizer.json"
    library = json.loads(path.read_text(encoding="utf-8"))
    vocabulary, first = library["model"]["vocab"], 2048 - len(MARKERS)
    gone = {text for text, token in vocabulary.items() if token >= first}
    library["model"]["vocab"] = {t: i for t, i in vocabulary.items() if t not in gone}
    merges = library["model"]["merges"]
    library["model"]["merges"] = [pair for pair in merges if "".join(pair) not in gone]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    library["added_tokens"] += [
        {"id": first + number, "content": text, **plain} for number, text in enumerate(MARKERS)
    ]
    path.write_text(json.dumps(library), encoding="utf-8")
    return hanok.load(folder, dtype="float32", context=512, batch=4)


@pytest.fixture(scope="module")
def infill(coder: Model) -> Infill:
    assert coder.tokenizer is not None
    found = find_infill(coder.tokenizer)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def server(coder: Model) -> Iterator[LocalServer]:
    with local_server(coder) as found:
        yield found


@pytest.fixture
def coding(server: LocalServer) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def expected(coder: Model, ids: list[int]) -> str:
    return coder.generate(ids, max_new_tokens=9, temperature=0.0).text


def test_openais_client_fills_a_gap(coder: Model, infill: Infill, server: LocalServer) -> None:
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
    options: Any = {"model": "bundled", "max_tokens": 9, "temperature": 0}
    prompts = [PREFIX, "The <|fim_middle|> dog"]
    found = sdk.completions.create(prompt=prompts, suffix=SUFFIX, **options)
    ids = [infill.encode(prompt, SUFFIX) for prompt in prompts]
    assert [choice.text for choice in found.choices] == [expected(coder, one) for one in ids]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(map(len, ids))
    stream = sdk.completions.create(prompt=PREFIX, suffix=SUFFIX, stream=True, **options)
    assert "".join(c.choices[0].text for c in stream if c.choices) == expected(coder, ids[0])
    body = {"route": "/v1/completions", "body": {"prompt": PREFIX, "suffix": SUFFIX}}
    with server.client() as client:
        explained = client.post("/explain", json=body).json()
    assert explained["prompts"][0]["token_ids"] == ids[0]
    assert explained["parameters"]["stop_token_ids"]["value"] == list(infill.end_ids)
    without = sdk.completions.create(prompt=PREFIX, suffix="", **options)
    assert without.choices[0].text == expected(coder, coder.encode(PREFIX))


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_ends_the_gap_and_is_no_text(
    coder: Model, coding: httpx.Client, marker: str
) -> None:
    assert coder.tokenizer is not None
    bias = {str(coder.tokenizer.token_to_id(marker)): 100}
    options = {"logit_bias": bias, "temperature": 0}
    body = {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 9, **options}
    found = coding.post("/v1/completions", json=body).json()
    assert (found["choices"][0]["text"], found["choices"][0]["finish_reason"]) == ("", "stop")
    assert found["usage"]["completion_tokens"] == 1
    body = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "n_predict": 9, **options}
    found = coding.post("/infill", json=body).json()
    assert (found["content"], found["stop_type"], found["tokens_predicted"]) == ("", "eos", 1)


def test_infill_whole_and_in_pieces(coder: Model, infill: Infill, coding: httpx.Client) -> None:
    body: dict[str, Any] = {
        "input_prefix": PREFIX,
        "input_suffix": SUFFIX,
        "input_extra": [{"filename": "dog.txt", "text": "A dog ran."}],
        "prompt": " little",
        "n_predict": 9,
        "temperature": -1,
        "top_k": -1,
        "seed": -1,
        "samplers": ["top_k", "infill"],
        "stop": [],
    }
    ids = infill.encode(PREFIX, SUFFIX, files=[("dog.txt", "A dog ran.")], middle=" little")
    text = expected(coder, ids)
    found = coding.post("/infill", json=body).json()
    assert (found["content"], found["stop"], found["stop_type"]) == (text, True, "limit")
    assert (found["tokens_predicted"], found["tokens_evaluated"]) == (9, len(ids))
    assert found["timings"]["predicted_n"] == 9
    wanted = {"response_fields": ["content", "timings/predicted_n", "no/such"]}
    chosen = coding.post("/infill", json={**body, **wanted}).json()
    assert chosen == {"content": text, "timings/predicted_n": 9}
    with coding.stream("POST", "/infill", json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(chunk["content"] for chunk in chunks) == text
    assert [chunk["stop"] for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)
    assert (chunks[-1]["stop"], chunks[-1]["tokens_predicted"]) == (True, 9)
    stopped = coding.post("/infill", json={**body, "stop": [text[3:5]]}).json()
    assert (stopped["content"], stopped["stop_type"]) == (text[:3], "word")


def test_infill_takes_the_room_that_there_is(coder: Model, coding: httpx.Client) -> None:
    body = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "ignore_eos": True}
    nothing = coding.post("/infill", json={**body, "n_predict": 0}).json()
    assert (nothing["content"], nothing["tokens_predicted"]) == ("", 0)
    long = {**body, "input_prefix": "dog " * 200, "n_predict": 10**6, "temperature": 0}
    found = coding.post("/infill", json=long).json()
    assert found["tokens_evaluated"] + found["tokens_predicted"] <= 1024
    assert found["stop_type"] in ("limit", "eos")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("v1/completions", {"echo": True}, 422, "`echo` cannot be given together with `suffix`"),
        ("v1/completions", {"truncate_prompt_tokens": 5}, 422, "`truncate_prompt_tokens` cannot"),
        ("v1/completions", {"add_special_tokens": False}, 422, "`add_special_tokens` cannot"),
        ("infill", {"n": 2}, 422, "`n` is not supported by /infill"),
        ("infill", {"mirostat": 2}, 422, "`mirostat` is not supported"),
        ("infill", {"model": "other"}, 404, "does not exist"),
        ("infill", {"input_prefix": "dog " * 1100}, 400, "context length is 1024 tokens"),
        ("infill", {"input_prefix": "a" * 10**6}, 400, "in the completion), or more."),
        ("v1/completions", {"suffix": "a" * 10**6}, 400, "in the completion), or more."),
        ("infill", {"input_suffix": None}, 422, "input_suffix"),
        ("infill", {"temperature": "hot"}, 422, "temperature"),
    ],
)
def test_what_is_wrong_is_told(
    coding: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    given = {"prompt": "a", "suffix": "b"} if path[0] == "v" else {"input_prefix": "a"}
    given |= {"input_suffix": "b"} if path == "infill" else {}
    found = coding.post(f"/{path}", json={**given, **body})
    assert found.status_code == status, found.text
    assert words in found.text


def test_a_model_without_markers_says_so(local: LocalServer) -> None:
    with local.client() as client:
        for path, body in (
            ("v1/completions", {"prompt": "a", "suffix": "b"}),
            ("infill", {"input_prefix": "a", "input_suffix": "b"}),
        ):
            found = client.post(f"/{path}", json=body)
            assert found.status_code == 422
            assert "tokenizer has none of the markers" in found.text
