"""Anthropic's own client, unmodified, against a live server."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter
from tests.server.conftest import Server
from tests.server.test_messages import ASKED, PIECES, WEATHER, written

anthropic = pytest.importorskip("anthropic")

OPTIONS = {name: ASKED[name] for name in ("model", "messages", "max_tokens")}
GREEDY = {"temperature": 0}  # which the client has no word for


@pytest.fixture
def sdk(server: Server) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0) as found:
        yield found


class Seat(BaseModel):
    is_aisle: bool


class Trip(BaseModel):
    seat: Seat


def test_its_types_know_every_event() -> None:
    whole, events = written(PIECES, tools=[WEATHER])
    anthropic.types.Message.model_validate(whole)
    known: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)
    for event in events:
        known.validate_python(event)


def test_it_reads_whole_answers_streams_and_counts(sdk: Any) -> None:
    whole = sdk.messages.create(**OPTIONS, extra_body=GREEDY)
    assert whole._request_id
    with sdk.messages.stream(**OPTIONS, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (whole.content[0].text, "max_tokens")
    assert final.usage.output_tokens == whole.usage.output_tokens == 12
    count = sdk.messages.count_tokens(model="bundled", messages=OPTIONS["messages"])
    used = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert count.input_tokens == used


def test_it_calls_tools_and_fills_models(sdk: Any) -> None:
    options = OPTIONS | {"max_tokens": 80}
    with sdk.messages.stream(**options, tools=[WEATHER], tool_choice={"type": "any"}) as stream:
        found = stream.get_final_message()
    assert found.stop_reason == "tool_use"
    assert found.content[0].input["place"] in ("Seoul", "Bonn")
    result = {"type": "tool_result", "tool_use_id": found.content[0].id, "content": "sunny"}
    history = [
        *OPTIONS["messages"],
        {"role": "assistant", "content": found.content},
        {"role": "user", "content": [result]},
    ]
    assert sdk.messages.create(**options | {"messages": history}, tools=[WEATHER]).content
    parsed = sdk.messages.parse(**options, output_format=Trip, extra_body=GREEDY)
    assert isinstance(parsed.parsed_output, Trip)


def test_it_raises_what_its_users_expect(sdk: Any) -> None:
    long = [{"role": "user", "content": "dog " * 5000}]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        sdk.messages.create(**OPTIONS | {"messages": long})
    with pytest.raises(anthropic.NotFoundError, match="'other' does not exist"):
        sdk.messages.create(**OPTIONS | {"model": "other"})
    late = {"timeout": 0.05, "ignore_eos": True}
    with (
        pytest.raises(anthropic.APIStatusError, match="timeout_error"),
        sdk.messages.stream(**OPTIONS | {"max_tokens": 900}, extra_body=late) as stream,
    ):
        stream.until_done()
