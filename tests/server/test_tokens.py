"""vLLM's /tokenize and /detokenize beside TGI's /tokenize."""

from typing import Any

import httpx
import pytest

import hanok
from hanok.checkpoint.tokenizer import open_tokenizer

TEXTS = ("Once upon a time", "", "김 é ☺ <|endoftext|>", " a  b\n")
MESSAGES: Any = [{"role": "user", "content": "Tell me of a dog."}]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("adds", [None, True, False])
def test_a_prompt_to_tokens_and_back(client: httpx.Client, text: str, adds: bool | None) -> None:
    tokenizer = open_tokenizer(hanok.BUNDLED)
    body = {"model": "bundled", "prompt": text, "add_special_tokens": adds}
    found = client.post("/tokenize", json={**body, "return_token_strs": True}).json()
    ids = tokenizer.encode(text, add_special_tokens=adds is not False)
    assert found == {
        "count": len(ids),
        "max_model_len": 1024,
        "tokens": ids,
        "token_strs": [tokenizer.token_text(token) for token in ids],
    }
    back = client.post("/detokenize", json={"model": "bundled", "tokens": ids}).json()
    assert back == {"prompt": tokenizer.decode(ids, skip_special_tokens=False)}
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert client.post("/detokenize", json={"tokens": plain}).json() == {"prompt": text}


def test_a_conversation_has_the_tokens_that_a_chat_is_charged_for(client: httpx.Client) -> None:
    found = client.post("/tokenize", json={"messages": MESSAGES}).json()
    body = {"messages": MESSAGES, "max_tokens": 1}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert (found["count"], found["token_strs"]) == (usage["prompt_tokens"], None)
    told = client.post("/chat_tokenize", json={"messages": MESSAGES}).json()
    assert found["tokens"] == [token["id"] for token in told["tokenize_response"]]
    framed = {"messages": MESSAGES, "add_special_tokens": True}
    assert client.post("/tokenize", json=framed).json()["tokens"] == found["tokens"]  # <s> once
    shorter = {"messages": MESSAGES, "add_generation_prompt": False}
    assert client.post("/tokenize", json=shorter).json()["count"] < found["count"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("tokenize", {}, 422, "exactly one of inputs, prompt, messages must be given, not 0"),
        ("tokenize", {"inputs": "a", "prompt": "b"}, 422, "must be given, not 2"),
        ("tokenize", {"prompt": "a", "model": "other"}, 404, "does not exist"),
        ("tokenize", {"messages": [{"content": "a"}]}, 422, "role must be a string"),
        ("tokenize", {"messages": []}, 422, "messages"),
        ("tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 422, "`chat_template` is"),
        ("chat_tokenize", {"messages": MESSAGES, "chat_template": "x"}, 422, "`chat_template` is"),
        ("detokenize", {"tokens": [1, 99999]}, 422, "99999, which is not a token id"),
        ("detokenize", {"tokens": [-1]}, 422, "tokens.0"),
        ("detokenize", {"tokens": "a"}, 422, "tokens"),
    ],
)
def test_what_is_wrong_is_told(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    found = client.post(f"/{path}", json=body)
    assert found.status_code == status
    assert words in found.json()["error"]


@pytest.mark.parametrize("wrong", [True, "5", 5.5, -1, 2**31, 10**30, None, [5]])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("detokenize", "tokens"),
        ("v1/completions", "prompt"),
        ("v1/completions", "stop_token_ids"),
        ("v1/embeddings", "input"),
        ("v1/chat/completions", "stop_token_ids"),
        ("v1/responses", "stop_token_ids"),
        ("v1/messages", "stop_token_ids"),
    ],
)
def test_only_whole_numbers_are_token_ids(
    client: httpx.Client, path: str, field: str, wrong: Any
) -> None:
    needed: dict[str, dict[str, Any]] = {
        "v1/completions": {"prompt": "a", "max_tokens": 1},
        "v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "v1/responses": {"input": "a", "max_output_tokens": 1},
        "v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    }
    body = needed.get(path, {})
    assert client.post(f"/{path}", json={**body, field: [5]}).status_code == 200
    found = client.post(f"/{path}", json={**body, field: [5, wrong]})
    assert found.status_code == (400 if path == "v1/messages" else 422)
    assert field in str(found.json()["error"])


@pytest.mark.parametrize("key", ["-1", " 5", "5.0", "05", "٣", "１", "", "1e2", "+5", "4294967296"])
def test_a_bias_is_of_a_token_id_as_it_is_written(client: httpx.Client, key: str) -> None:
    for path, body in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        found = client.post(f"/v1/{path}", json={**body, "max_tokens": 1, "logit_bias": {key: 1}})
        assert found.status_code == 422, path
        assert "logit_bias" in found.json()["error"]["message"]
