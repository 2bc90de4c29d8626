"""Clients of other projects, unmodified, against a live server.

The model is scripted, so what is tested is the way there and back: what a client sends by default has to
be understood, and what it gets has to be what its own types and errors are made of.
"""

import asyncio
import enum
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import anthropic
import openai
import pydantic
import pytest
from huggingface_hub import InferenceClient
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic_ai import Agent, NativeOutput, PromptedOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from tests.server.conftest import LocalServer
from tests.server.scripted import scripted_server


class Kind(enum.Enum):
    author = "author"
    engineer = "engineer"


class Role(pydantic.BaseModel):
    kind: Kind
    since: int | None


class Person(pydantic.BaseModel):
    """Someone who is known."""

    name: str
    age: int
    roles: Annotated[list[Role], pydantic.Field(min_length=1)]


ADA = Person(name="Ada", age=36, roles=[Role(kind=Kind.author, since=1843)])
GREETING = ["Good ", "day, ", "friend."]
ANSWERS = {
    "Hello": GREETING,
    "Who was first?": [
        '{"name": "Ada", ',
        '"age": 36, "roles": ',
        '[{"kind": "author", "since": 1843}]}',
    ],
    "Who, by a tool?": [
        "<tool_call>",
        '{"name": "Person", ',
        '"arguments": {"name": "Ada", "age": 36, ',
        '"roles": [{"kind": "author", "since": 1843}]}}',
        "</tool_call>",
    ],
    "Who, at last?": [
        '{"name": "final_result", "arguments": ',
        '{"name": "Ada", "age": 36, "roles": [',
        '{"kind": "author", "since": 1843}',
        "]}}",
    ],
    "the weather in Seoul?": [
        "Let me look.\n",
        '<tool_call>{"name": "get_weather", ',
        '"arguments": {"city": ',
        '"Seoul"}}',
        "</tool_call>\n",
    ],
    "rain, 12 degrees": ["It ", "rains."],
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
LONG = "x" * 200 + "Hello"


def asks(text: str) -> Any:
    return [{"role": "user", "content": text}]


def is_forced(found: Any) -> bool:
    """Whether a person is what a grammar makes of the script, which says no more than the name."""
    person = found if isinstance(found, Person) else Person.model_validate(found)
    return person.roles[0].kind is Kind.author


@pytest.fixture(scope="module")
def scripted() -> Iterator[LocalServer]:
    with scripted_server(ANSWERS) as found:
        yield found


@pytest.fixture(scope="module")
def small() -> Iterator[LocalServer]:
    """A server whose context is small."""
    with scripted_server(ANSWERS, max_position_embeddings=96) as found:
        yield found


@pytest.fixture
def sdk(scripted: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="k", max_retries=0) as found:
        yield found


# openai


@pytest.fixture
def person_tool() -> Any:
    return openai.pydantic_function_tool(Person)


def test_openai_completes_and_lists(sdk: openai.OpenAI) -> None:
    found = sdk.completions.create(model="scripted", prompt="Hello", temperature=0)
    assert found.choices[0].text == "".join(GREETING)
    stream = sdk.completions.create(model="scripted", prompt="Hello", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "".join(GREETING)
    assert sdk.models.retrieve("scripted") == next(iter(sdk.models.list()))


def test_openai_reads_nested_models(sdk: openai.OpenAI, person_tool: Any) -> None:
    options: Any = {"model": "scripted", "temperature": 0}
    answer = sdk.chat.completions.parse(
        **options, messages=asks("Who was first?"), response_format=Person
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    assert parsed.name == "Ada"
    assert is_forced(parsed)
    options |= {"messages": asks("Who, by a tool?"), "tools": [person_tool]}
    for choice in ("auto", "required", {"type": "function", "function": {"name": "Person"}}):
        message = sdk.chat.completions.parse(**options, tool_choice=choice).choices[0].message
        assert message.tool_calls
        arguments = message.tool_calls[0].function.parsed_arguments
        assert arguments == ADA if choice == "auto" else is_forced(arguments)


def test_openai_puts_streams_together(sdk: openai.OpenAI, person_tool: Any) -> None:
    options: Any = {"model": "scripted", "temperature": 0, "tools": [person_tool]}
    with sdk.chat.completions.stream(messages=asks("Who, by a tool?"), **options) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    assert choice.message.tool_calls[0].function.parsed_arguments == ADA
    with sdk.chat.completions.stream(messages=asks("Hello"), model="scripted") as plain:
        texts = [event.delta for event in plain if event.type == "content.delta"]
    assert "".join(texts) == "".join(GREETING)


def test_openai_goes_on_after_a_call(sdk: openai.OpenAI) -> None:
    """The message that called is sent back as the client's own type writes it."""
    messages = asks("Tell me the weather in Seoul?")
    options: Any = {"model": "scripted", "temperature": 0, "tools": [WEATHER]}
    message = sdk.chat.completions.create(messages=messages, **options).choices[0].message
    assert message.content == "Let me look."
    assert message.tool_calls
    result = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": "rain, 12 degrees",
    }
    found = sdk.chat.completions.create(messages=[*messages, message, result], **options)
    assert found.choices[0].message.content == "It rains."


# huggingface_hub


@pytest.fixture
def hub(scripted: LocalServer) -> Iterator[InferenceClient]:
    with InferenceClient(scripted.url) as found:
        yield found


def test_huggingface_hub_generates(hub: InferenceClient) -> None:
    options: Any = {"max_new_tokens": 8, "return_full_text": False}
    text = "".join(GREETING)
    assert hub.text_generation("Hello", **options) == text
    found = hub.text_generation("Hello", **options, details=True, decoder_input_details=True)
    assert found.generated_text == text
    assert found.details is not None
    assert [token.text for token in found.details.tokens] == [*GREETING, "</s>"]
    assert [token.text for token in found.details.prefill] == ["Hello"]
    assert "".join(hub.text_generation("Hello", **options, stream=True)) == text + "</s>"
    *_, last = hub.text_generation("Hello", **options, stream=True, details=True)
    assert last.generated_text == text
    assert last.details is not None
    assert last.details.finish_reason == "eos_token"
    schema = {"type": "json", "value": Person.model_json_schema()}
    assert is_forced(
        json.loads(
            hub.text_generation("x", max_new_tokens=80, grammar=schema, return_full_text=False)
        )
    )


def test_huggingface_hub_chats(hub: InferenceClient, scripted: LocalServer) -> None:
    assert hub.chat_completion(asks("Hello")).choices[0].message.content == "".join(GREETING)
    stream = hub.chat_completion(
        asks("Hello"), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, usage = stream
    texts = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(filter(None, texts)) == "".join(GREETING)
    assert (usage.choices, usage.usage.completion_tokens) == ([], len(GREETING) + 1)
    described = {"name": "person", "schema": Person.model_json_schema(), "strict": True}
    found = hub.chat_completion(
        asks("Who was first?"),
        temperature=0,
        response_format={"type": "json_schema", "json_schema": described},
    )
    assert is_forced(json.loads(found.choices[0].message.content))
    with InferenceClient(base_url=f"{scripted.url}/v1", api_key="k") as other:
        found = other.chat.completions.create(model="scripted", messages=asks("Hello"))
        assert found.choices[0].message.content == "".join(GREETING)


def test_huggingface_hub_calls(hub: InferenceClient) -> None:
    options: Any = {"messages": asks("Tell me the weather in Seoul?"), "tools": [WEATHER]}
    for choice, arguments in ((None, {"city": "Seoul"}), ("get_weather", {"city": ""})):
        choices = hub.chat_completion(**options, temperature=0, tool_choice=choice).choices
        assert choices[0].finish_reason == "tool_calls"
        assert json.loads(choices[0].message.tool_calls[0].function.arguments) == arguments
    deltas = [
        delta
        for chunk in hub.chat_completion(**options, temperature=0, stream=True)
        for delta in chunk.choices[0].delta.tool_calls or []
    ]
    first, *rest = deltas
    assert (first.type, first.function.name, bool(first.id)) == ("function", "get_weather", True)
    assert {(item.index, item.id, item.function.name) for item in rest} == {(0, None, None)}
    assert json.loads("".join(item.function.arguments for item in deltas)) == {"city": "Seoul"}


# instructor


@pytest.mark.parametrize("mode", ["TOOLS", "JSON", "JSON_SCHEMA", "PARALLEL_TOOLS"])
def test_instructor_asks_in_each_mode(sdk: openai.OpenAI, mode: str) -> None:
    instructor = pytest.importorskip("instructor", reason="see `make test`")
    client = instructor.from_openai(sdk, mode=instructor.Mode[mode])
    found = client.chat.completions.create(
        model="scripted",
        messages=asks("Who, by a tool?" if "TOOLS" in mode else "Who was first?"),
        response_model=Iterable[Person] if mode == "PARALLEL_TOOLS" else Person,  # type: ignore[type-abstract]
        temperature=0,
        max_retries=0,
    )
    if mode == "PARALLEL_TOOLS":
        assert list(found) == [ADA]
    elif mode == "JSON":
        assert found.model_dump() == ADA.model_dump()  # it makes a class of its own of Person
    else:
        assert is_forced(found)


def test_instructor_reads_while_it_comes(sdk: openai.OpenAI) -> None:
    instructor = pytest.importorskip("instructor", reason="see `make test`")

    class Seat(pydantic.BaseModel):
        row: int
        kind: Literal["aisle", "window"]

    class Booking(pydantic.BaseModel):
        seats: Annotated[list[Seat], pydantic.Field(min_length=1)]

    client = instructor.from_openai(sdk)
    parts = client.chat.completions.create_partial(
        model="scripted", messages=asks("x"), response_model=Booking, temperature=0, max_retries=0
    )
    *_, last = parts
    assert last.model_dump() == {"seats": [{"row": 0, "kind": "aisle"}]}


# pydantic-ai


@asynccontextmanager
async def agents_model(server: LocalServer) -> AsyncIterator[OpenAIChatModel]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k") as client:
        provider = OpenAIProvider(openai_client=client)
        yield OpenAIChatModel("scripted", provider=provider, settings={"temperature": 0})


def test_pydantic_ai_answers_in_types(scripted: LocalServer) -> None:
    async def main() -> None:
        async with agents_model(scripted) as model:
            assert (await Agent(model).run("Hello")).output == "".join(GREETING)
            by_tool = Agent(model, output_type=Person)
            assert is_forced((await by_tool.run("Who, at last?")).output)
            native = Agent(model, output_type=NativeOutput(Person))
            assert is_forced((await native.run("Who was first?")).output)
            prompted = Agent(model, output_type=PromptedOutput(Person))
            assert (await prompted.run("Who was first?")).output == ADA

    asyncio.run(main())


def test_pydantic_ai_calls_tools(scripted: LocalServer) -> None:
    asked: list[str] = []

    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "rain, 12 degrees"

    async def main() -> None:
        async with agents_model(scripted) as model:
            agent = Agent(model, tools=[get_weather])
            assert (await agent.run("Tell me the weather in Seoul?")).output == "It rains."
            async with agent.iter("Tell me the weather in Seoul?") as run:
                async for node in run:
                    if Agent.is_model_request_node(node):
                        async with node.stream(run.ctx) as stream:
                            _ = [event async for event in stream]
                assert run.result is not None
                assert run.result.output == "It rains."

    asyncio.run(main())
    assert asked == ["Seoul", "Seoul"]


# langchain-openai


def chat_model(server: LocalServer, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="k",
        model="scripted",
        max_retries=0,
        temperature=0,
        **options,
    )


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structures_in_each_method(scripted: LocalServer, method: Any) -> None:
    chat = chat_model(scripted).with_structured_output(Person, method=method, include_raw=True)
    asked = "Who, by a tool?" if method == "function_calling" else "Who was first?"
    found: Any = chat.invoke(asked)
    assert found["parsing_error"] is None
    assert found["parsed"] == ADA if method == "json_mode" else is_forced(found["parsed"])


def test_langchain_calls_tools(scripted: LocalServer) -> None:
    @tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return "rain, 12 degrees"

    asked = HumanMessage("Tell me the weather in Seoul?")
    chat = chat_model(scripted, stream_usage=True).bind_tools([get_weather])
    whole = chat.invoke([asked])
    streamed: Any = None
    for chunk in chat.stream([asked]):
        streamed = chunk if streamed is None else streamed + chunk
    for message in (whole, streamed):
        assert message.text == "Let me look."
        (call,) = message.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Seoul"})
        assert message.invalid_tool_calls == []
        assert message.usage_metadata["output_tokens"] == 6
        answer = chat.invoke([asked, message, get_weather.invoke(call)])
        assert answer.text == "It rains."
    forced = chat_model(scripted).bind_tools([get_weather], tool_choice="any").invoke("Hello")
    assert [call["name"] for call in forced.tool_calls] == ["get_weather"]
    assert "".join(part.text for part in chat_model(scripted).stream("Hello")) == "".join(GREETING)


def test_langchain_knows_that_a_context_is_exceeded(small: LocalServer) -> None:
    for options in ({}, {"max_tokens": 5}):
        with pytest.raises(ContextOverflowError):
            chat_model(small, **options).invoke(LONG)


# litellm


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched at the import
        import litellm

        patch.setattr(litellm, "suppress_debug_info", True)
        yield litellm


# Pydantic's word on litellm's own types, when they are first used:
AS_IT_IS = pytest.mark.filterwarnings("ignore:Items? '.*' on TypedDict class:UserWarning")


@AS_IT_IS
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "text-completion-openai"])
def test_litellm_chats(scripted: LocalServer, litellm: Any, provider: str) -> None:
    options = {
        "model": f"{provider}/scripted",
        "api_base": f"{scripted.url}/v1",
        "api_key": "k",
        "temperature": 0,
    }
    found = litellm.completion(messages=asks("Hello"), **options)
    assert found.choices[0].message.content == "".join(GREETING)
    stream = litellm.completion(messages=asks("Hello"), stream=True, **options)
    texts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(texts) == "".join(GREETING)
    if provider == "text-completion-openai":
        return
    tools = [openai.pydantic_function_tool(Person)]
    options |= {"messages": asks("Who, by a tool?"), "tools": tools}
    for choice in ("auto", "required"):
        found = litellm.completion(**options, tool_choice=choice)
        arguments = json.loads(found.choices[0].message.tool_calls[0].function.arguments)
        assert Person.model_validate(arguments) == ADA if choice == "auto" else is_forced(arguments)
    options |= {"messages": asks("Who was first?"), "tools": None}
    found = litellm.completion(**options, response_format=Person)
    assert is_forced(json.loads(found.choices[0].message.content))


@AS_IT_IS
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_falls_back_to_a_larger_context(
    scripted: LocalServer, small: LocalServer, litellm: Any, provider: str
) -> None:
    served = {
        name: {"model": f"{provider}/scripted", "api_base": f"{server.url}/v1", "api_key": "k"}
        for name, server in (("small", small), ("large", scripted))
    }
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=asks(LONG), **served["small"])
    router = litellm.Router(
        model_list=[
            {"model_name": name, "litellm_params": params} for name, params in served.items()
        ],
        context_window_fallbacks=[{"small": ["large"]}],
        num_retries=0,
    )
    found = router.completion(model="small", messages=asks(LONG), temperature=0)
    assert found.choices[0].message.content == "".join(GREETING)


# OpenAI's Responses


def test_openai_responds(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "scripted", "temperature": 0}
    found = sdk.responses.create(input="Hello", **options)
    assert (found.output_text, found.status) == ("".join(GREETING), "completed")
    with sdk.responses.stream(input="Hello", **options) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        whole = stream.get_final_response()
    assert deltas == GREETING
    assert whole.output_text == "".join(GREETING)
    parsed = sdk.responses.parse(input="Who was first?", text_format=Person, **options)
    assert is_forced(parsed.output_parsed)
    with sdk.responses.stream(input="Who was first?", text_format=Person, **options) as stream:
        stream.until_done()
        assert is_forced(stream.get_final_response().output_parsed)


def test_openai_goes_on_with_what_responded(sdk: openai.OpenAI) -> None:
    options: Any = {
        "model": "scripted",
        "temperature": 0,
        "tools": [{"type": "function", "strict": False, **WEATHER["function"]}],
    }
    asked: Any = [{"role": "user", "content": "Tell me the weather in Seoul?"}]
    whole = sdk.responses.create(input=asked, **options)
    with sdk.responses.stream(input=asked, **options) as stream:
        stream.until_done()
        streamed = stream.get_final_response()
    for found in (whole, streamed):
        message, call = found.output
        assert message.type == "message"
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Seoul"})
        result = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": "rain, 12 degrees",
        }
        answer = sdk.responses.create(input=[*asked, *found.output, result], **options)
        assert answer.output_text == "It rains."


@AS_IT_IS
def test_agents_respond(scripted: LocalServer, litellm: Any) -> None:
    chat = chat_model(scripted, use_responses_api=True)
    assert chat.invoke("Hello").text == "".join(GREETING)
    assert "".join(part.text for part in chat.stream("Hello")) == "".join(GREETING)
    assert is_forced(chat.with_structured_output(Person).invoke("Who was first?"))
    options = {"api_base": f"{scripted.url}/v1", "api_key": "k", "temperature": 0}
    found = litellm.responses(model="openai/scripted", input="Hello", **options)
    assert found.output[0].content[0].text == "".join(GREETING)

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key="k") as client:
            provider = OpenAIProvider(openai_client=client)
            model = OpenAIResponsesModel("scripted", provider=provider, settings={"temperature": 0})
            assert (await Agent(model).run("Hello")).output == "".join(GREETING)
            by_tool = Agent(model, output_type=Person)
            assert is_forced((await by_tool.run("Who, at last?")).output)

    asyncio.run(main())


# Anthropic's Messages


@pytest.fixture
def claude(scripted: LocalServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=scripted.url, api_key="k", max_retries=0) as found:
        yield found


TOOL: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": WEATHER["function"]["parameters"],
}


def test_anthropic_answers(claude: anthropic.Anthropic) -> None:
    options: Any = {
        "model": "scripted",
        "max_tokens": 40,
        "messages": asks("Hello"),
    }
    found = claude.messages.create(system="Be kind. ", **options)
    (block,) = found.content
    assert block.type == "text"
    assert (block.text, found.stop_reason) == ("".join(GREETING), "end_turn")
    with claude.messages.stream(**options) as stream:
        assert list(stream.text_stream) == GREETING
        assert stream.get_final_message().usage.output_tokens == found.usage.output_tokens
    count = claude.messages.count_tokens(
        model="scripted", messages=asks("Hello"), system="Be kind. "
    )
    assert count.input_tokens == found.usage.input_tokens + (
        found.usage.cache_read_input_tokens or 0
    )
    cut = claude.messages.create(**options | {"max_tokens": 2})
    assert cut.stop_reason == "max_tokens"


def test_anthropic_calls_tools(claude: anthropic.Anthropic) -> None:
    asked = asks("Tell me the weather in Seoul?")
    options: Any = {"model": "scripted", "max_tokens": 40, "tools": [TOOL]}
    whole = claude.messages.create(messages=asked, **options)
    with claude.messages.stream(messages=asked, **options) as stream:
        streamed = stream.get_final_message()
    for found in (whole, streamed):
        assert found.stop_reason == "tool_use"
        text, call = found.content
        assert (text.type, call.type) == ("text", "tool_use")
        assert (call.name, call.input) == ("get_weather", {"city": "Seoul"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain, 12 degrees"}
        messages = [
            *asked,
            {"role": "assistant", "content": found.content},
            {"role": "user", "content": [result]},
        ]
        answer = claude.messages.create(messages=messages, **options)
        assert [block.text for block in answer.content] == ["It rains."]
    forced = claude.messages.create(messages=asks("Hello"), **options, tool_choice={"type": "any"})
    assert [block.type for block in forced.content] == ["tool_use"]


def test_anthropic_knows_what_went_wrong(claude: anthropic.Anthropic, small: LocalServer) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(model="other", max_tokens=4, messages=asks("Hello"))
    with (
        anthropic.Anthropic(base_url=small.url, api_key="k", max_retries=0) as other,
        pytest.raises(anthropic.BadRequestError, match=r"too long|context"),
    ):
        other.messages.create(model="scripted", max_tokens=4, messages=asks(LONG))


@AS_IT_IS
def test_agents_speak_anthropics(scripted: LocalServer, litellm: Any) -> None:
    found = litellm.completion(
        model="anthropic/scripted",
        api_base=scripted.url,
        api_key="k",
        messages=asks("Hello"),
        temperature=0,
    )
    assert found.choices[0].message.content == "".join(GREETING)

    async def main() -> None:
        async with anthropic.AsyncAnthropic(base_url=scripted.url, api_key="k") as client:
            provider = AnthropicProvider(anthropic_client=client)
            model = AnthropicModel("scripted", provider=provider, settings={"temperature": 0})
            assert (await Agent(model).run("Hello")).output == "".join(GREETING)
            by_tool = Agent(model, output_type=Person)
            assert is_forced((await by_tool.run("Who, at last?")).output)

    asyncio.run(main())
