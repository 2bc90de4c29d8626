"""TGI's contract, against a live server: shapes, messages, streams byte by byte."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError
from tests.server.conftest import Server, local_server

import hanok
from hanok.engine.model import Model

PROMPT = "Once upon a time"


def generate(client: httpx.Client, **parameters: Any) -> httpx.Response:
    return client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})


def test_the_answer_is_the_library_call(client: httpx.Client) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    expected = model.generate(PROMPT, max_new_tokens=12)
    found = generate(client, max_new_tokens=12, details=True, decoder_input_details=True)
    body = found.json()
    details = body["details"]
    assert body["generated_text"] == expected.text
    assert [token["id"] for token in details["tokens"]] == expected.token_ids
    assert [t["logprob"] for t in details["tokens"]] == pytest.approx(expected.logprobs, abs=1e-4)
    scored = model.score(PROMPT)
    assert [token["id"] for token in details["prefill"]] == scored.token_ids
    assert details["prefill"][0]["logprob"] is None
    found_scores = [token["logprob"] for token in details["prefill"][1:]]
    assert found_scores == pytest.approx(scored.logprobs[1:], abs=1e-4)
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == (
        "length",
        12,
        None,
    )
    assert list(body) == ["generated_text", "details"]
    names = ("total-time", "validation-time", "queue-time", "inference-time", "time-per-token")
    times = {name: int(found.headers[f"x-{name}"]) for name in names}
    assert times["total-time"] >= times["queue-time"] + times["inference-time"]
    assert found.headers["x-prompt-tokens"] == str(len(scored.token_ids))
    assert found.headers["x-generated-tokens"] == "12"


def test_without_details_there_is_only_text(client: httpx.Client) -> None:
    assert list(generate(client, max_new_tokens=3).json()) == ["generated_text"]


def test_a_stream_byte_by_byte(client: httpx.Client) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 6, "details": True}}
    whole = generate(client, max_new_tokens=6).json()["generated_text"]
    with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        data = b"".join(response.iter_bytes())
    events = data.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: {") for event in events)
    assert b"[DONE]" not in data
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [event["index"] for event in found] == list(range(1, 7))
    assert all(event["generated_text"] is event["details"] is None for event in found[:-1])
    assert found[-1]["generated_text"] == whole == "".join(e["token"]["text"] for e in found)
    assert found[-1]["details"]["input_length"] == 5


MESSAGES = [
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    (
        {"best_of": 2, "do_sample": True, "seed": 1},
        "`seed` must not be set when `best_of` > 1",
    ),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -1.0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.5}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    (
        {"truncate": 0},
        "`truncate` must be strictly positive and less than 1023. Given: 0",
    ),
    (
        {"truncate": 5000},
        "`truncate` must be strictly positive and less than 1023. Given: 5000",
    ),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"max_new_tokens": 5000}, "`max_new_tokens` must be <= 1024. Given: 5000"),
    (
        {"max_new_tokens": 1022},
        "`inputs` tokens + `max_new_tokens` must be <= 1024. Given: 5 `inputs` tokens and 1022 "
        "`max_new_tokens`",
    ),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
]


@pytest.mark.parametrize(("parameters", "message"), MESSAGES)
def test_what_is_out_of_range_is_told_in_tgis_words(
    client: httpx.Client, parameters: dict[str, Any], message: str
) -> None:
    found = generate(client, **parameters)
    assert found.status_code == 422
    assert found.json() == {
        "error": f"Input validation error: {message}",
        "error_type": "validation",
    }


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"best_of": 2, "do_sample": True},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
def test_a_stream_is_refused_before_it_begins(
    client: httpx.Client, parameters: dict[str, Any], message: str
) -> None:
    body = {"inputs": PROMPT, "parameters": parameters}
    found = client.post("/generate_stream", json=body)
    assert found.status_code == 422
    assert found.json()["error"] == f"Input validation error: {message}"


@pytest.fixture(scope="module")
def narrow(local_model: Model) -> Iterator[httpx.Client]:
    """A server that allows little."""
    limits = {
        "max_best_of": 1,
        "max_top_n_tokens": 0,
        "max_input_tokens": 8,
        "max_total_tokens": 12,
        "max_stop_sequences": 0,
        "has_grammars": False,
        "has_prompt_logprobs": False,
        "cors_allow_origins": ("https://here.example",),
    }
    with local_server(local_model, **limits) as server, server.client() as client:
        yield client


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2}, "`best_of` != 1 is not allowed for this endpoint"),
        ({"top_n_tokens": 1}, "`top_n_tokens` != 0 is not allowed for this endpoint"),
        ({"stop": ["a"]}, "`stop` supports up to 0 stop sequences. Given: 1"),
        ({"truncate": 9}, "`truncate` must be strictly positive and less than 8. Given: 9"),
        ({"grammar": {"type": "regex", "value": "a"}}, "grammar is not supported"),
        (
            {"max_new_tokens": 8},
            "`inputs` tokens + `max_new_tokens` must be <= 12. Given: 5 `inputs` tokens and 8 "
            "`max_new_tokens`",
        ),
    ],
)
def test_what_a_server_does_not_allow_is_told_in_tgis_words(
    narrow: httpx.Client, parameters: dict[str, Any], message: str
) -> None:
    found = generate(narrow, **parameters)
    assert found.status_code == 422
    assert found.json()["error"] == f"Input validation error: {message}"


def test_the_limits_of_a_server_end_an_answer(narrow: httpx.Client) -> None:
    """Without `max_new_tokens` an answer goes as far as there is room."""
    long = narrow.post("/generate", json={"inputs": PROMPT * 3})
    message = "`inputs` must have less than 8 tokens. Given: "
    assert long.json()["error"].startswith(f"Input validation error: {message}")
    details = generate(narrow, decoder_input_details=True, ignore_eos=True).json()["details"]
    assert (details["generated_tokens"], details["finish_reason"]) == (7, "length")
    assert details["prefill"] == []  # this server does not tell


def test_browsers_of_other_sites(client: httpx.Client, narrow: httpx.Client) -> None:
    for origin, asked in (("https://here.example", narrow), ("https://there.example", client)):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        allowed = asked.options("/generate", headers=headers)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] in (origin, "*")
        answer = asked.post("/tokenize", json={"inputs": "a"}, headers={"origin": origin})
        assert answer.headers["access-control-allow-origin"] in (origin, "*")
    other = narrow.get("/health", headers={"origin": "https://there.example"})
    assert "access-control-allow-origin" not in other.headers


def test_inputs_too_long_and_empty(client: httpx.Client) -> None:
    empty = client.post("/generate", json={"inputs": ""})
    assert empty.json()["error"] == "Input validation error: `inputs` cannot be empty"
    text = "dog " * 1100
    long = client.post("/generate", json={"inputs": text})
    assert "`inputs` must have less than 1023 tokens. Given: " in long.json()["error"]
    cut = client.post(
        "/generate",
        json={
            "inputs": text,
            "parameters": {"truncate": 7, "max_new_tokens": 1, "details": True},
        },
    )
    assert cut.headers["x-prompt-tokens"] == "7"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"inputs": NaN}', "application/json", 400),
        (b"[" * 5000, "application/json", 400),
        (b'{"inputs": ' + b"[" * 70 + b"]" * 70 + b"}", "application/json", 400),
        (b"\xff\xfe\x00", "application/json", 400),
        (b'{"inputs": 3}', "application/json", 422),
        (b'{"inputs": "\\ud800"}', "application/json", 400),
        (b"{}", "application/json", 422),
        (b'{"inputs": "a"}', "text/plain", 415),
        (b'{"inputs": "a"}', "", 415),
        (b'{"inputs": "' + b"a" * 2_000_001 + b'"}', "application/json", 413),
    ],
    ids="cut NaN deep deeper bytes number surrogate none kind no-kind large".split(),
)
def test_bodies_that_are_none(client: httpx.Client, content: bytes, kind: str, status: int) -> None:
    found = client.post("/generate", content=content, headers={"content-type": kind})
    assert found.status_code == status
    assert set(found.json()) == {"error", "error_type"}


def test_an_unknown_adapter_is_not_the_base_model(client: httpx.Client) -> None:
    found = generate(client, adapter_id="mine")
    assert (found.status_code, found.json()["error_type"]) == (404, "adapter_not_found")


def test_best_of_gives_the_best_and_the_rest(client: httpx.Client) -> None:
    options = {"best_of": 2, "do_sample": True, "temperature": 1.5}
    found = generate(client, max_new_tokens=8, details=True, **options).json()
    rest = found["details"]["best_of_sequences"]
    assert len(rest) == 1

    def mean(tokens: list[dict[str, Any]]) -> float:
        return sum(token["logprob"] for token in tokens) / len(tokens)

    assert mean(found["details"]["tokens"]) >= mean(rest[0]["tokens"])
    assert isinstance(found["details"]["seed"], int)


def test_a_seed_repeats_and_stop_texts_stay(client: httpx.Client) -> None:
    first, second = (
        generate(client, max_new_tokens=12, do_sample=True, seed=7).json() for _ in range(2)
    )
    assert first == second
    text = generate(client, max_new_tokens=30).json()["generated_text"]
    stop = text[8:11]
    cut = generate(client, max_new_tokens=30, stop=[stop], details=True).json()
    assert cut["generated_text"].endswith(stop)
    assert text.startswith(cut["generated_text"])
    assert cut["details"]["finish_reason"] == "stop_sequence"


def test_grammars_of_each_kind(client: httpx.Client) -> None:
    found = generate(client, max_new_tokens=20, grammar={"type": "regex", "value": "[0-9]{3}"})
    assert found.json()["generated_text"].isdigit()
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    untyped = {key: value for key, value in schema.items() if key != "type"}
    for value in (schema, json.dumps(schema), untyped, json.dumps(untyped)):
        found = generate(client, max_new_tokens=60, grammar={"type": "json", "value": value})
        assert json.loads(found.json()["generated_text"])["n"] in (1, 2)
    wrong = {"type": "json", "value": {"properties": {"a": {"type": "lalala"}}}}
    refused = generate(client, grammar=wrong)
    assert refused.status_code == 422
    assert "grammar is not valid" in refused.json()["error"]
    assert "/properties/a" in refused.json()["error"]


def test_tokens_have_places_in_the_text(client: httpx.Client) -> None:
    text = "Tom saw a café 가."
    tokens = client.post("/tokenize", json={"inputs": text}).json()
    data = text.encode()
    assert tokens[0] == {"id": 0, "text": "<s>", "start": 0, "stop": 0}
    assert b"".join(data[t["start"] : t["stop"]] for t in tokens) == data


def test_what_the_server_says_of_itself(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_best_of"]) == ("bundled", 1024, 2)
    assert info["memory_plan"][0]["weights_bytes"] > 0
    health = client.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert client.get("/").content == b""
    assert b"<html" in client.get("/", headers={"accept": "text/html"}).content
    metrics = client.get("/metrics").text
    assert "tgi_request_count " in metrics
    assert "hanok_" in metrics
    assert client.get("/nothing").status_code == 404
    assert client.get("/generate").status_code == 405
    named = client.get("/health", headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"


def test_what_a_browser_gets_and_what_others_do(client: httpx.Client) -> None:
    """TGI's health checks ask for `/`, with whatever they accept."""
    browsers = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    page = client.get("/", headers={"accept": browsers})
    assert page.headers["content-type"].startswith("text/html")
    assert "<title" in page.text
    for accepted in ("*/*", "application/json", ""):
        found = client.get("/", headers={"accept": accepted})
        assert (found.status_code, found.content) == (200, b"")
    for path in ("/", "/health", "/ping", "/info"):
        found = client.head(path)
        assert (found.status_code, found.content) == (200, b"")


def test_the_routes_are_listed(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert client.get("/api-doc/openapi.json").json() == document
    listing = client.get("/docs")
    assert listing.headers["content-type"].startswith("text/html")
    for path, operations in document["paths"].items():
        assert f"<code>{path}</code>" in listing.text
        for operation in operations.values():
            assert operation["summary"].replace("'", "&#x27;") in listing.text
    tgis = (
        "/ /generate /generate_stream /tokenize /chat_tokenize /invocations /vertex /info /health"
    )
    openais = "/metrics /v1/models /v1/completions /v1/chat/completions"
    assert set(tgis.split()) | set(openais.split()) < set(document["paths"])


def test_the_hubs_client(server: Server) -> None:
    client = InferenceClient(server.url)
    full = client.text_generation(PROMPT, max_new_tokens=5)
    text = full.removeprefix(PROMPT)
    assert full == PROMPT + text
    details = client.text_generation(PROMPT, max_new_tokens=5, details=True, return_full_text=False)
    assert details.details.generated_tokens == 5
    assert details.generated_text == text
    parts = list(client.text_generation(PROMPT, max_new_tokens=5, stream=True))
    assert "".join(parts) == text
    answer = client.chat_completion([{"role": "user", "content": "hi"}], max_tokens=4)
    assert answer.usage.completion_tokens <= 4
    with pytest.raises((ValidationError, HfHubHTTPError)):
        client.text_generation("x", top_p=2.0)


def test_sagemaker_and_vertex(client: httpx.Client) -> None:
    expected = generate(client, max_new_tokens=4).json()["generated_text"]
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "return_full_text": False}}
    assert client.post("/invocations", json=body).json()[0]["generated_text"] == expected
    completion = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    found = client.post("/invocations", json=completion).json()
    assert found["choices"][0]["text"] == expected
    instances = {"instances": [{"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "seed": 1}}]}
    assert client.post("/vertex", json=instances).json() == {"predictions": [expected]}
