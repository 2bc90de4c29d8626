"""Embeddings against transformers' hidden states, and with OpenAI's own client."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from tests.engine.test_embed import WORDS, save_base
from tests.server.conftest import (
    TIMEOUT_S,
    LocalServer,
    Server,
    local_server,
    start_server,
    stop,
    wait_until_ready,
)
from torch import Tensor

import hanok
from hanok.attention.base import ForwardBatch
from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.engine.engine import Engine
from hanok.engine.model import Model
from hanok.engine.speculate import Speculation
from hanok.engine.ticket import Request
from hanok.server.app import all_routes
from hanok.server.errors import status_on

STORY = "Once upon a time, there was a little dog. The dog had a red ball and a big friend. "
TEXTS = ["Lily had a cat.", "a", STORY * 12, "The sun went down.", STORY]
URL = "/v1/embeddings"


@pytest.fixture(scope="module")
def oracle() -> Any:
    return transformers.AutoModel.from_pretrained(hanok.BUNDLED, dtype=torch.float32).eval()


def expected(oracle: Any, texts: list[str], pooling: str, size: int | None = None) -> np.ndarray:
    """Pooled as sentence-transformers does, each text by itself, and scaled to length 1."""
    rows = []
    tokenizer = open_tokenizer(hanok.BUNDLED)
    for text in texts:
        with torch.no_grad():
            hidden = oracle(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
        vector = (hidden[-1] if pooling == "last" else hidden.mean(0)).numpy()[:size]
        rows.append(vector / np.linalg.norm(vector))
    return np.stack(rows)


@pytest.fixture
def sdk(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


@pytest.fixture
def local_mean(local_model: Model) -> Iterator[LocalServer]:
    with local_server(local_model, pooling="mean") as found:
        yield found


def vectors(client: httpx.Client, texts: Any, **options: Any) -> np.ndarray:
    found = client.post(URL, json={"input": texts, **options})
    assert found.status_code == 200, found.text
    data = found.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return np.array([item["embedding"] for item in data])


@pytest.mark.parametrize("size", [None, 64])
def test_openais_client_gets_transformers_hidden_states(
    sdk: openai.OpenAI, oracle: Any, size: int | None
) -> None:
    given: dict[str, Any] = {} if size is None else {"dimensions": size}
    found = sdk.embeddings.create(model="bundled", input=TEXTS, **given)  # asks for base64
    rows = np.array([item.embedding for item in found.data])
    np.testing.assert_allclose(rows, expected(oracle, TEXTS, "last", size), atol=2e-5)
    tokenizer = open_tokenizer(hanok.BUNDLED)
    count = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (count, count)
    plain = sdk.embeddings.create(model="bundled", input=TEXTS, encoding_format="float", **given)
    np.testing.assert_allclose(np.array([item.embedding for item in plain.data]), rows, atol=1e-7)


def test_the_mean_of_all_tokens(local_mean: LocalServer, oracle: Any) -> None:
    with local_mean.client() as client:
        found = vectors(client, TEXTS)
        # Again: what others computed is not left out of the mean.
        np.testing.assert_array_equal(vectors(client, TEXTS), found)
    np.testing.assert_allclose(found, expected(oracle, TEXTS, "mean"), atol=2e-5)


def test_the_pooling_is_the_checkpoints_unless_the_server_is_told(
    tmp_path: Path, oracle: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hanok.BUNDLED, folder)
    (folder / "1_Pooling").mkdir()
    config = folder / "1_Pooling" / "config.json"
    model = hanok.load(folder, dtype="float32", context=256, batch=2)
    config.write_text('{"pooling_mode_mean_tokens": true}')
    with local_server(model) as local, local.client() as client:
        found = vectors(client, TEXTS[:2])
        np.testing.assert_allclose(found, expected(oracle, TEXTS[:2], "mean"), atol=2e-5)
    config.write_text('{"pooling_mode_cls_token": true}')
    with local_server(model) as local, local.client() as client:
        refused = client.post(URL, json={"input": "a"})
        assert refused.status_code == 422
        assert "makes no embeddings" in refused.json()["error"]["message"]
        assert client.post("/generate", json={"inputs": "a"}).status_code == 200
    with local_server(model, pooling="last") as local, local.client() as client:
        found = vectors(client, TEXTS[:2])
        np.testing.assert_allclose(found, expected(oracle, TEXTS[:2], "last"), atol=2e-5)


def test_a_base_model_serves_what_needs_no_head(tmp_path: Path) -> None:
    save_base(tmp_path / "model")
    model = hanok.load(tmp_path / "model", dtype="float32", context=256, batch=8)
    with local_server(model) as local, local.client() as client:
        rows = vectors(client, [text[:200] for text in TEXTS])
        expected_rows = model.embed([text[:200] for text in TEXTS]).numpy()
        np.testing.assert_allclose(rows, expected_rows, atol=2e-6)
        tokens = client.post("/tokenize", json={"inputs": "Lily"}).json()
        assert [token["id"] for token in tokens] == model.encode("Lily")
        assert client.post("/detokenize", json={"tokens": model.encode("Lily")}).status_code == 200
        for path in ("/", "/health", "/ping", "/ready", "/metrics", "/v1/models", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        info = client.get("/info").json()
        assert info["model_pipeline_tag"] == "feature-extraction"
        refused = [route for route in all_routes() if route.needs_head]
        for route in refused:
            found = client.post(route.path, json={})
            assert found.status_code == status_on(422, route.path), route.path
            assert WORDS in found.text, route.path
        assert local.engine.stats().generated_tokens == 0
    others = {route.path for route in all_routes() if route.method == "POST"}
    others -= {route.path for route in refused}
    assert others == {
        "/v1/embeddings",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/tokenize",
        "/detokenize",
        "/chat_tokenize",
        "/v1/messages/count_tokens",
        "/v1/responses/input_tokens",
        "/v1/responses/{response_id}/cancel",
    }


def test_a_base_model_is_served_from_the_command_line(tmp_path: Path) -> None:
    save_base(tmp_path / "model")
    server = start_server(str(tmp_path / "model"), "--context", "256")
    try:
        wait_until_ready(server)
        with server.client() as client:
            model = hanok.load(tmp_path / "model", dtype="float32")
            np.testing.assert_allclose(
                vectors(client, TEXTS[:2]), model.embed(TEXTS[:2]).numpy(), atol=2e-6
            )
    finally:
        status = stop(server)
    assert status == 0


def test_all_forms_of_input_are_the_same_alone_and_together(client: httpx.Client) -> None:
    tokenizer = open_tokenizer(hanok.BUNDLED)
    ids = [tokenizer.encode(text) for text in TEXTS]
    together = vectors(client, TEXTS)
    np.testing.assert_array_equal(vectors(client, ids), together)
    for text, tokens, row in zip(TEXTS, ids, together, strict=True):
        np.testing.assert_allclose(vectors(client, text)[0], row, atol=2e-6)
        np.testing.assert_allclose(vectors(client, tokens)[0], row, atol=2e-6)
    coded = client.post(URL, json={"input": "a", "encoding_format": "base64"}).json()["data"][0]
    row = np.frombuffer(base64.b64decode(coded["embedding"]), dtype="<f4")
    np.testing.assert_allclose(row, together[1], atol=2e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_text_in_many_steps_is_pooled_as_in_one(
    local_model: Model, monkeypatch: pytest.MonkeyPatch, pooling: Literal["last", "mean"]
) -> None:
    with local_server(local_model, pooling=pooling) as local, local.client() as client:
        whole = vectors(client, TEXTS)
        monkeypatch.setattr(local.engine._step_budget, "prompt_tokens", lambda num_decoding: 7)
        salted = vectors(client, TEXTS, cache_salt="nothing is there yet")
        np.testing.assert_allclose(salted, whole, atol=2e-6)


def test_while_it_generates(client: httpx.Client) -> None:
    body = {"prompt": STORY, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    alone = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    expected_rows = vectors(client, TEXTS)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
        rows = [pool.submit(vectors, client, TEXTS) for _ in range(3)]
        for found in rows:
            np.testing.assert_allclose(found.result(), expected_rows, atol=2e-6)
        for answer in asked:
            assert answer.result().json()["choices"][0]["text"] == alone


def test_many_texts_count_as_few_and_leave_nothing_behind(local: LocalServer) -> None:
    with local.client() as client:
        texts = [f"text {number}" for number in range(200)]
        rows = vectors(client, texts)  # more than may wait or run
        np.testing.assert_allclose(vectors(client, texts[77])[0], rows[77], atol=2e-6)
        metrics = client.get("/metrics").text
    assert "hanok_cache_used_blocks 0.0" in metrics
    assert local.service.num_open == 0


def test_others_wait_for_few_of_a_requests_texts(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[tuple[int, int]] = []
    plan = local.engine._scheduler.plan

    def watched(*given: Any) -> Any:
        rows = [*local.engine._scheduler.running, *local.engine._scheduler.waiting]
        waiting.append((len(rows), sum(len(row.tokens) for row in rows)))
        return plan(*given)

    monkeypatch.setattr(local.engine._scheduler, "plan", watched)
    lengths = [1000] * 9 + [1] * 70 + [1000] * 2
    with local.client() as client:
        rows = vectors(client, [[5] * length for length in lengths])
    assert len(rows) == len(lengths)
    assert max(number for number, _ in waiting) <= 32
    assert 3000 < max(total for _, total in waiting) <= 4096


def test_nothing_is_guessed_for_a_text_that_is_not_gone_on_with(
    local_model: Model, oracle: Any
) -> None:
    speculation = Speculation()
    with Engine(local_model, speculation=speculation) as engine:
        ids = local_model.encode(STORY * 3)
        request = Request(sequence=local_model.sequence(ids, {}), pooling="last")
        engine._step_budget.prompt_tokens = lambda num_decoding: len(ids) - 1  # type: ignore[method-assign]
        speculator, guessed_for = engine._speculator, set()
        assert speculator is not None
        drafts = speculator.drafts

        def watched(sequences: Any) -> Any:
            guessed_for.update(sequences)
            return drafts(sequences)

        speculator.drafts = watched  # type: ignore[method-assign]
        other = engine.submit(STORY * 3, max_new_tokens=30)
        ticket = engine.submit_request(request)
        assert ticket.result() == []
        assert other.result()
        assert guessed_for == {other.id}
        assert ticket.pooled is not None
        row = ticket.pooled.numpy()
        found = row / np.linalg.norm(row)
        np.testing.assert_allclose(found, expected(oracle, [STORY * 3], "last")[0], atol=2e-5)


def test_what_is_not_finite_is_an_error(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = local.engine._runner._hidden_states

    def poisoned(batch: ForwardBatch) -> Tensor:
        return torch.full_like(forward(batch), float("nan"))

    monkeypatch.setattr(local.engine._runner, "_hidden_states", poisoned)
    with local.client() as client:
        found = client.post(URL, json={"input": ["a", "b"]})
    assert found.status_code == 424
    assert "not finite" in found.json()["error"]["message"]


def test_a_client_that_goes_is_not_computed_for(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    forward = local.engine._runner._hidden_states

    def held(batch: ForwardBatch) -> Tensor:
        inside.set()
        assert go_on.wait(TIMEOUT_S)
        return forward(batch)

    monkeypatch.setattr(local.engine._runner, "_hidden_states", held)
    with local.client() as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(URL, json={"input": ["a"] * 100}, timeout=0.5)
        assert inside.is_set()
        while local.service.num_open:
            assert client.get("/health").status_code == 200
        go_on.set()
        monkeypatch.undo()
        vectors(client, "b")
        assert local.engine.stats().num_waiting == 0


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"input": []}, 422, "`input` cannot be empty"),
        ({"input": [[]]}, 422, "`input` cannot be empty"),
        ({"input": ["a"] * 2049}, 422, "has 2049 texts and may have 2048"),
        ({"input": [[99999]]}, 422, "is not a token id"),
        ({"input": [5] * 1024}, 400, "context length is 1024 tokens. However, you requested 1024"),
        ({"input": ["a", "a" * 10**6]}, 400, "0 in the completion), or more."),
        ({"input": "a", "dimensions": 257}, 422, "`dimensions` must be <= 256"),
        ({"input": "a", "dimensions": 0}, 422, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 422, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 5}, 422, "is not supported"),
        ({"input": "a", "model": "other"}, 404, "does not exist"),
        ({}, 422, "input"),
    ],
)
def test_what_is_wrong_is_told(
    client: httpx.Client, body: dict[str, Any], status: int, words: str
) -> None:
    found = client.post(URL, json=body)
    assert found.status_code == status, found.text
    assert words in json.dumps(found.json()["error"]["message"], ensure_ascii=False)
