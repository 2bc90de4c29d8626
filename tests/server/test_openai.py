"""OpenAI's contract, against a live server and with its own client."""

import json
import re
from typing import Any

import httpx
import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from tests.server.conftest import Server, start_server, stop, wait_until_ready

import hanok
from hanok.server.openai_models import NOT_SERVED

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


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the chunks of a stream, whose end is told."""
    lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("best_of", [2, 3])
def test_every_completion_has_a_place_of_its_own(client: httpx.Client, best_of: int) -> None:
    """Of several prompts with several answers, whole as in chunks."""
    body = {"prompt": [PROMPT, "The"], "max_tokens": 8, "temperature": 1.2, "seed": 5, "n": 2}
    whole = client.post("/v1/completions", json={**body, "best_of": best_of}).json()["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    if best_of > 2:
        return
    texts = dict.fromkeys(range(4), "")
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        for chunk in chunks_of(answer):
            choice = chunk["choices"][0]
            texts[choice["index"]] += choice["text"]
    assert texts == {choice["index"]: choice["text"] for choice in whole}


@pytest.mark.parametrize("usage", [None, {"include_usage": True}])
def test_who_wants_the_prompt_alone_is_told_of_no_more_tokens(
    client: httpx.Client, usage: Any
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    whole = client.post("/v1/completions", json=body).json()
    streamed = {**body, "stream": True, "stream_options": usage}
    with client.stream("POST", "/v1/completions", json=streamed) as answer:
        last = [chunk["usage"] for chunk in chunks_of(answer)][-1]
    for told in (whole["usage"], last):
        assert told["completion_tokens"] == 0
        assert told["total_tokens"] == told["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 4}),
        ("responses", {"input": MESSAGES, "max_output_tokens": 4}),
        ("messages", {"messages": MESSAGES, "max_tokens": 4}),
    ],
)
def test_conversations_of_every_protocol_have_the_same_limits(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    wrong = 400 if path == "messages" else 422
    for given, status in (
        ({"top_p": 0}, 200),
        ({"top_p": 1.1}, wrong),
        ({"best_of": 1}, 200),
        ({"best_of": 2}, wrong),
        ({"user": "a" * 1001}, wrong),
    ):
        found = client.post(f"/v1/{path}", json={**body, **given})
        assert found.status_code == status, given


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


ANIMAL = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}
CLOSED = {**ANIMAL, "additionalProperties": False}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"structured_outputs": {"json": CLOSED}}, r'\{ ?"kind" ?: ?"dog" ?\}'),
        ({"structured_outputs": {"regex": "(ab){3}"}}, "ababab"),
        ({"structured_outputs": {"choice": ["a|b", "c.d"]}}, r"a\|b|c\.d"),
        ({"structured_outputs": {"grammar": 'start: "x" "y"', "regex": None}}, "xy"),
        ({"structured_outputs": {"choice": ["no"], "disable_any_whitespace": False}}, "no"),
        ({"guided_json": json.dumps(CLOSED), "guided_regex": None}, r'\{ ?"kind" ?: ?"dog" ?\}'),
        ({"guided_regex": "[0-9]{4}"}, "[0-9]{4}"),
        ({"guided_choice": ["positive", "negative"]}, "positive|negative"),
        ({"guided_grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"json_schema": CLOSED}, r'\{ ?"kind" ?: ?"dog" ?\}'),
        ({"regex": "dog"}, "dog"),
        ({"response_format": {"type": "regex", "value": "cat"}}, "cat"),
        ({"response_format": {"type": "text"}, "regex": "dog"}, "dog"),
    ],
)
def test_the_constraints_of_other_servers_are_followed(
    client: httpx.Client, asked: dict[str, Any], expected: str
) -> None:
    options = {"max_tokens": 40, "temperature": 1.5, "seed": 3, **asked}
    chat = client.post("/v1/chat/completions", json={"messages": MESSAGES, **options})
    assert chat.status_code == 200, chat.text
    assert re.fullmatch(expected, chat.json()["choices"][0]["message"]["content"])
    completion = client.post("/v1/completions", json={"prompt": PROMPT, **options}).json()
    assert re.fullmatch(expected, completion["choices"][0]["text"])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"grammar": 'root ::= "a"'}, "`grammar` is not supported"),
        ({"ebnf": 'root ::= "a"'}, "`ebnf` is not supported"),
        ({"structural_tag": "{}"}, "`structural_tag` is not supported"),
        ({"guided_whitespace_pattern": " "}, "`guided_whitespace_pattern` is not supported"),
        ({"guided_grammar": 'root ::= "a"'}, "`guided_grammar` is in GBNF or EBNF"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "`structured_outputs.grammar` is in"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "`structured_outputs.structural_tag`"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pat"),
        ({"structured_outputs": {"choice": []}}, "`structured_outputs.choice` must be a list of"),
        ({"structured_outputs": {"json": 5}}, "`structured_outputs.json` must be a JSON schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "say what the answer is"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "`guided_regex` and `guided_choice` both"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "and `regex` both constrain"),
        ({"guided_json": "{"}, "grammar is not valid"),
        ({"regex": "(a"}, "grammar is not valid"),
        ({"bad_words": ["dog"]}, "`bad_words` is not supported"),
        ({"stream": True, "prompt_logprobs": 1}, "`prompt_logprobs` is not supported when str"),
        ({"skip_special_tokens": False}, "`skip_special_tokens` is not supported"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    client: httpx.Client, asked: dict[str, Any], words: str
) -> None:
    for route, given in (
        ("chat/completions", {"messages": MESSAGES}),
        ("completions", {"prompt": "a"}),
    ):
        found = client.post(f"/v1/{route}", json={**given, "max_tokens": 2, **asked})
        assert found.status_code == 422, found.text
        assert words in found.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    nothing: dict[str, Any] = {name: None for name in NOT_SERVED}
    nothing |= {name: values[0] for name, values in NOT_SERVED.items() if values}
    nothing |= {"structured_outputs": {"json": None}, "grammar": None, "unheard_of": 5}
    body = {"prompt": "a", "max_tokens": 1, **nothing}
    assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("number", [0, 3])
def test_a_prompt_is_scored_as_the_library_scores_it(client: httpx.Client, number: int) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    asked = {"prompt_logprobs": number, "max_tokens": 2, "n": 2, "temperature": 1}
    chat = client.post("/v1/chat/completions", json={"messages": MESSAGES, **asked}).json()
    ids = client.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    text = "The dog ran to the park."
    both = [[text, text], {"echo": True, "logprobs": 1}]
    answer = client.post("/v1/completions", json={"prompt": both[0], **asked, **both[1]}).json()
    assert all(len(table) <= 2 for table in answer["choices"][0]["logprobs"]["top_logprobs"][1:])
    choices = [choice["prompt_logprobs"] for choice in answer["choices"]]
    for tokens, found in (
        (ids, chat["prompt_logprobs"]),
        *((model.encode(text), c) for c in choices),
    ):
        logprobs = model.logits(tokens)[:-1].log_softmax(-1)
        assert (len(found), found[0]) == (len(tokens), None)
        for row, token, table in zip(logprobs, tokens[1:], found[1:], strict=True):
            best = {str(i) for i in row.topk(number).indices.tolist()}
            assert set(table) == best | {str(token)}
            for key, told in table.items():
                assert told["logprob"] == pytest.approx(float(row[int(key)]), abs=1e-4)
                assert told["rank"] == 1 + int((row > row[int(key)]).sum())
                assert told["decoded_token"] == model.tokenizer.token_text(int(key))  # type: ignore[union-attr]


def test_the_last_tokens_of_a_prompt_are_kept(client: httpx.Client) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    text = "Lily had a red ball and a cat. The dog ran to the park."
    ids = model.encode(text)
    options = {"max_tokens": 6, "temperature": 0}
    for kept in (1, 5, len(ids), len(ids) + 5):
        expected = model.generate(ids[-kept:], max_new_tokens=6).text
        for prompt in (text, ids):
            body = {"prompt": prompt, "truncate_prompt_tokens": kept, **options}
            found = client.post("/v1/completions", json=body).json()
            assert found["choices"][0]["text"] == expected
            assert found["usage"]["prompt_tokens"] == min(kept, len(ids))
            explained = client.post("/explain", json={"route": "/v1/completions", "body": body})
            assert explained.json()["prompts"][0]["token_ids"] == ids[-kept:]
    body = {"messages": [LONG], "truncate_prompt_tokens": -1, **options}
    found = client.post("/v1/chat/completions", json=body).json()
    assert found["usage"]["prompt_tokens"] == 1024 - 6
    body = {"prompt": [5] * 3000, "truncate_prompt_tokens": -1, "max_tokens": 3}
    assert client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens"] == 1024 - 3
    for kept, status in ((0, 422), (-2, 422), (1024, 400)):
        body = {"prompt": [5] * 3000, "truncate_prompt_tokens": kept, "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == status


def test_an_echoed_prompt_is_what_was_kept_of_it(client: httpx.Client) -> None:
    text = "Lily had a red ball and a cat."
    body = {"prompt": text, "truncate_prompt_tokens": 3, "echo": True, "logprobs": 0}
    found = client.post("/v1/completions", json={**body, "max_tokens": 1}).json()["choices"][0]
    assert found["text"].startswith("".join(found["logprobs"]["tokens"][:3]))
    assert found["logprobs"]["text_offset"][3] == len("".join(found["logprobs"]["tokens"][:3]))


def test_a_prompt_is_echoed_by_both_names(client: httpx.Client) -> None:
    texts = {}
    for name in ("echo", "return_full_text", "user"):
        body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, name: name != "user" or "u"}
        texts[name] = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert texts["echo"] == texts["return_full_text"] == PROMPT + texts["user"]


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
        ("completions", {"prompt": "a", "max_tokens": 9999}, 400, "context length is 1024 tokens"),
        ("completions", {"prompt": "a", "temperature": -1}, 422, "temperature"),
        ("completions", {"prompt": "a", "model": "gpt-9"}, 404, "does not exist"),
        ("completions", {"prompt": "a", "logit_bias": {"99999": 1}}, 422, "names token 99999"),
        ("chat/completions", {"messages": []}, 422, "messages"),
        ("chat/completions", {"messages": [{"content": "a"}]}, 422, "role must be a string"),
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


def test_a_model_is_found_by_its_names() -> None:
    server = start_server("--model-name", "org/small", "--model-name", "gpt-4o-mini")
    try:
        wait_until_ready(server)
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
        for name in ("org/small", "gpt-4o-mini"):
            card = sdk.models.retrieve(name)
            assert (card.id, card.owned_by) == (name, "org/small")
            assert card.model_extra == {"max_model_len": 1024}
        assert [card.id for card in sdk.models.list()] == ["org/small", "gpt-4o-mini"]
        for name in ("org/small", "gpt-4o-mini", "tgi", "http://127.0.0.1:1/", "https://a.b/v1"):
            found = sdk.completions.create(model=name, prompt=PROMPT, max_tokens=1)
            assert found.model == "org/small"
        for name in ("small", "org", "org/small/", "bundled"):
            with pytest.raises(openai.NotFoundError) as raised:
                sdk.models.retrieve(name)
            assert raised.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError, match="'org/small', 'gpt-4o-mini'"):
                sdk.completions.create(model=name, prompt=PROMPT, max_tokens=1)
        with server.client() as client:
            described = client.get("/openapi.json").json()["paths"]["/v1/models/{model}"]["get"]
            assert described["parameters"][0]["name"] == "model"
            assert client.post("/v1/models/org/small").status_code == 405
            assert client.get("/v1/models/").json()["error"]["code"] == "model_not_found"
    finally:
        stop(server)


LONG = {"role": "user", "content": "dog " * 1100}


@pytest.mark.parametrize(
    ("route", "body", "parameter", "asked"),
    [
        ("completions", {"prompt": [5] * 1020, "max_tokens": 5}, "prompt", (1020, 5)),
        ("completions", {"prompt": [5] * 1024}, "prompt", (1024, 16)),
        ("completions", {"prompt": "a", "max_tokens": 1024}, "prompt", (2, 1024)),
        ("chat/completions", {"messages": [LONG]}, "messages", None),
        ("chat/completions", {"messages": [LONG], "stream": True}, "messages", None),
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 1024}, "messages", None),
    ],
)
def test_a_request_beyond_the_context_is_told_apart(
    sdk: openai.OpenAI, route: str, body: dict[str, Any], parameter: str, asked: tuple[int, int]
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        sdk.post(f"/{route}", body=body, cast_to=object)
    error = raised.value
    assert (error.code, error.type) == ("context_length_exceeded", "invalid_request_error")
    assert error.param == parameter
    words = error.body["message"]  # type: ignore[index,call-overload]
    assert words.lower().startswith("this model's maximum context length is 1024 tokens.")
    numbers = re.search(rf"requested (\d+) tokens \((\d+) in the {parameter}, (\d+) in the", words)
    assert numbers is not None
    requested, prompt, completion = map(int, numbers.groups())
    assert requested == prompt + completion > 1024
    assert asked in (None, (prompt, completion))


def test_langchain_knows_that_a_conversation_is_too_long(server: Server) -> None:
    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key="k", model="bundled", max_retries=0)
    with pytest.raises(ContextOverflowError):
        chat.invoke(LONG["content"])


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
