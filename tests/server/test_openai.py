"""OpenAI's contract, against a live server and with its own client."""

import json
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from tests.server.conftest import Server

import hanok

PROMPT = "Once upon a time"
MESSAGES: Any = [{"role": "user", "content": "Tell me of a dog."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Seoul", "Bonn"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def sdk(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


def test_models_and_completions(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["bundled"]
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    expected = model.generate(PROMPT, max_new_tokens=8)
    ids = model.encode(PROMPT)
    for prompt in (PROMPT, ids, [PROMPT, PROMPT], [ids, ids]):
        found = sdk.completions.create(model="bundled", prompt=prompt, max_tokens=8, temperature=0)
        assert {choice.text for choice in found.choices} == {expected.text}
        assert found.choices[0].finish_reason == "length"
        assert found.usage is not None
        assert found.usage.completion_tokens == 8 * len(found.choices)


def test_echoed_prompts_are_scored_as_the_library_scores_them(client: httpx.Client) -> None:
    """The requests of lm-evaluation-harness' local-completions."""
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    texts = ["The dog ran to the park.", "Lily had a red ball and a cat."]
    body = {
        "model": "bundled",
        "prompt": [model.encode(text) for text in texts],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = client.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for text, choice in zip(texts, choices, strict=True):
        scored = model.score(text)
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        count = len(scored.token_ids)
        assert len(found["token_logprobs"]) == count + 1
        assert found["token_logprobs"][1:count] == pytest.approx(scored.logprobs[1:], abs=1e-4)
        best = model.logits(text).log_softmax(-1).max(-1).values.tolist()
        greedy = [max(table.values()) for table in found["top_logprobs"][1:count]]
        assert greedy == pytest.approx(best[: count - 1], abs=1e-4)
        assert choice["text"].startswith(text)


def test_completions_in_chunks_join_to_the_whole(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "bundled", "prompt": [PROMPT, "The dog"], "max_tokens": 9}
    whole = sdk.completions.create(**options, temperature=0)
    texts = {0: "", 1: ""}
    reasons = {}
    stream = sdk.completions.create(
        **options, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {0: "length", 1: "length"}
    assert usage == whole.usage or (usage is not None and usage.completion_tokens == 18)


def test_chat_whole_and_in_chunks(sdk: openai.OpenAI, client: httpx.Client) -> None:
    options: Any = {"model": "bundled", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
    whole = sdk.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    content = whole.choices[0].message.content
    assert content
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert all(len(item.top_logprobs) == 2 for item in logprobs.content)
    assert logprobs.content[0].logprob == logprobs.content[0].top_logprobs[0].logprob
    usage = {"include_usage": True}
    with client.stream(
        "POST", "/v1/chat/completions", json={**options, "stream": True, "stream_options": usage}
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    last = chunks.pop()
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 10)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(parts) == content
    assert [c["choices"][0]["finish_reason"] for c in chunks[-2:]] == [None, "length"]


def test_several_answers_and_a_seed(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "tgi", "messages": MESSAGES, "max_tokens": 8, "temperature": 1.2}
    several = sdk.chat.completions.create(**options, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage is not None
    assert several.usage.prompt_tokens < 3 * several.usage.completion_tokens
    first, second = (sdk.chat.completions.create(**options, seed=5) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content


def test_a_seed_gives_several_answers_of_their_own(
    sdk: openai.OpenAI, client: httpx.Client
) -> None:
    """Each the same when it is asked for again, and the first as if it were asked for alone."""
    options: Any = {"model": "tgi", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.2}
    one, first, second, beside = (
        [c.message.content for c in sdk.chat.completions.create(**options, seed=seed, n=n).choices]
        for seed, n in ((5, 1), (5, 4), (5, 4), (6, 4))
    )
    assert first == second
    assert first[0] == one[0]
    assert len({*first, *beside}) == 8
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.2, "seed": 5}
    several = client.post("/v1/completions", json={**body, "n": 3}).json()["choices"]
    best = client.post("/v1/completions", json={**body, "n": 1, "best_of": 3}).json()["choices"]
    texts = [choice["text"] for choice in several]
    assert len(set(texts)) == 3
    assert best[0]["text"] in texts


def test_parts_of_characters_have_their_bytes(client: httpx.Client) -> None:
    """é is the bytes C3 and A9; a token of one of them has no text of its own."""
    tokenizer = hanok.load(hanok.BUNDLED).tokenizer
    assert tokenizer is not None
    lead, rest = (tokenizer.token_to_id(spelled) for spelled in "Ã©")
    options: Any = {"max_tokens": 2, "temperature": 0, "logit_bias": {str(lead): 100}}
    chat = client.post(
        "/v1/chat/completions",
        json={**options, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2},
    ).json()["choices"][0]["logprobs"]["content"]
    assert [item["bytes"] for item in chat] == [[0xC3], [0xC3]]
    for item in chat[0]["top_logprobs"]:
        assert bytes(item["bytes"]).decode() == item["token"]
    body = {**options, "prompt": [3, lead, rest, 3], "logprobs": 1, "echo": True}
    found = client.post("/v1/completions", json=body).json()["choices"][0]
    part = found["logprobs"]
    assert part["tokens"][1:3] + part["tokens"][4:] == [
        "bytes:\\xc3",
        "bytes:\\xa9",
        "bytes:\\xc3",
        "bytes:\\xc3",
    ]
    assert part["text_offset"][:4] == [0, 0, 0, 1]
    assert set(part["tokens"][4:]) <= set(part["top_logprobs"][4])


def test_an_assistants_message_goes_on(sdk: openai.OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Once upon a time, there was"}]
    found = sdk.chat.completions.create(
        model="bundled", messages=messages, max_tokens=6, temperature=0
    )
    explained = sdk.post(
        "/../explain",
        body={"route": "/v1/chat/completions", "body": {"messages": messages, "max_tokens": 6}},
        cast_to=object,
    )
    assert isinstance(explained, dict)
    assert explained["prompts"][0]["text"].endswith("Once upon a time, there was")
    assert explained["parameters"]["max_new_tokens"] == {"value": 6, "origin": "request"}
    assert found.choices[0].message.content


@pytest.mark.parametrize(
    "spelling",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": ..., "strict": True}},
        {"type": "json_object", "value": ...},
        {"type": "json", "value": ...},
        {"type": "json_schema", "value": {"name": "x", "schema": ...}},
    ],
)
def test_response_formats_in_all_spellings(client: httpx.Client, spelling: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["dog", "cat"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    text = json.dumps(spelling, default=lambda _: None)
    filled = json.loads(json.dumps(spelling, default=lambda _: schema))
    assert "null" in text
    body = {"messages": MESSAGES, "max_tokens": 40, "response_format": filled}
    found = client.post("/v1/chat/completions", json=body).json()
    assert json.loads(found["choices"][0]["message"]["content"])["kind"] in ("dog", "cat")


def test_tools_that_must_be_called_are(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "bundled", "messages": MESSAGES, "tools": [WEATHER], "max_tokens": 80}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        found = sdk.chat.completions.create(**options, tool_choice=choice).choices[0]
        assert found.finish_reason == "tool_calls"
        calls = found.message.tool_calls
        assert calls is not None
        assert calls[0].type == "function"
        assert calls[0].function.name == "weather"
        assert json.loads(calls[0].function.arguments)["place"] in ("Seoul", "Bonn")
    stream = sdk.chat.completions.create(**options, tool_choice="required", stream=True, seed=1)
    chunks = [chunk.choices[0] for chunk in stream]
    deltas = [item for chunk in chunks for item in chunk.delta.tool_calls or []]
    arguments = "".join(d.function.arguments or "" for d in deltas if d.function)
    assert json.loads(arguments)["place"] in ("Seoul", "Bonn")
    assert chunks[-1].finish_reason == "tool_calls"
    with pytest.raises(openai.UnprocessableEntityError, match="Tool with name nothing not found"):
        sdk.chat.completions.create(
            **options, tool_choice={"type": "function", "function": {"name": "nothing"}}
        )


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        ("completions", {"prompt": "a", "suffix": "b"}, 422, "`suffix` is not supported"),
        ("completions", {"prompt": []}, 422, "`prompt` cannot be empty"),
        ("completions", {"prompt": ["a"] * 33}, 422, "maximum allowed batch size of 32"),
        ("completions", {"prompt": [999999]}, 422, "is not a token id"),
        ("completions", {"prompt": "a", "max_tokens": 9999}, 422, "must be <= 1024"),
        ("completions", {"prompt": "a", "temperature": -1}, 422, "temperature"),
        ("completions", {"prompt": "a", "model": "gpt-9"}, 404, "does not exist"),
        ("completions", {"prompt": "a", "logit_bias": {"99999": 1}}, 422, "names token 99999"),
        ("chat/completions", {"messages": []}, 422, "messages"),
        ("chat/completions", {"messages": [{"content": "a"}]}, 422, "role must be a text"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            422,
            "image modality is not supported",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "x"}},
            422,
            "response_format.type",
        ),
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "tools": [WEATHER],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            422,
            "Grammar and tools are mutually exclusive",
        ),
    ],
)
def test_errors_have_both_shapes(
    client: httpx.Client, route: str, body: dict[str, Any], status: int, words: str
) -> None:
    found = client.post(f"/v1/{route}", json=body)
    assert found.status_code == status, found.text
    assert words in found.json()["error"]["message"]
    assert found.json()["error_type"]


def test_langchain(server: Server) -> None:
    chat = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="k", model="bundled", max_tokens=60, temperature=0
    )
    assert chat.invoke("Hello").content
    assert "".join(str(part.content) for part in chat.stream("Hello"))
    schema = {
        "title": "animal",
        "type": "object",
        "properties": {"kind": {"type": "string", "enum": ["dog", "cat"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    bound = chat.with_structured_output(schema, method="json_schema")
    assert bound.invoke("Which animal?")["kind"] in ("dog", "cat")  # type: ignore[index]
