"""A chat request as a prompt, and the model's text as a message."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.grammar_spec import GrammarSpec
from hanok.errors import RequestError
from hanok.server.constraints import constraint_of
from hanok.server.errors import ServerError, invalid
from hanok.server.openai_models import ChatRequest
from hanok.server.tools import ToolCall, ToolReader, ToolUse, tool_use

TOOL_PROMPT = (
    "These functions can be called. To call one, answer with a JSON object and nothing else: "
    '{"name": its name, "arguments": an object of its arguments}.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation that the model goes on with."""

    text: str
    """What the template made of it."""
    prompt_ids: list[int]
    grammar: GrammarSpec | None
    tools: ToolUse

    def message(self, text: str) -> tuple[dict[str, Any], bool]:
        """Return the model's text as a message, and whether it calls tools."""
        reader = ToolReader(use=self.tools)
        content = reader.push(text)[0] + reader.finish()[0]
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reader.calls:
            message["content"] = content.strip() or None
            message["tool_calls"] = [call.body() for call in reader.calls]
        return message, bool(reader.calls)

    def deltas(self) -> "Deltas":
        """Return what turns pieces of the model's text into pieces of a message."""
        return Deltas(ToolReader(use=self.tools))


class Deltas:
    """Pieces of text to pieces of a message."""

    def __init__(self, reader: ToolReader) -> None:
        self._reader = reader
        self._num_calls = 0

    @property
    def has_calls(self) -> bool:
        """Whether tools were called."""
        return self._num_calls > 0

    def push(self, text: str) -> list[dict[str, Any]]:
        """Return the pieces that are certain now."""
        return self._pieces(*self._reader.push(text))

    def finish(self) -> list[dict[str, Any]]:
        """Return what was held back."""
        return self._pieces(*self._reader.finish())

    def _pieces(self, content: str, calls: list[ToolCall]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"content": content}] if content else []
        for call in calls:
            index, self._num_calls = self._num_calls, self._num_calls + 1
            found.append({"tool_calls": [{"index": index, **call.body()}]})
        return found


def conversation_of(
    tokenizer: Tokenizer, body: ChatRequest, check_length: Callable[[int], None] | None = None
) -> Conversation:
    """Return a request's conversation as the checkpoint's template writes it.

    `check_length`: see `Service.encoded`.
    Raises ServerError for messages that are not, and where there is no template or it refuses.
    """
    messages = [_message(number, message) for number, message in enumerate(body.messages)]
    use, grammar = tool_use(body.tools, body.tool_choice), constraint_of(body)
    if use.is_forced and grammar is not None:
        raise invalid("Grammar and tools are mutually exclusive", "response_format")
    continues = _continues(body, messages)
    variables = _variables(body.chat_template_kwargs)

    def rendered(shown: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return tokenizer.render_chat(
            shown,
            tools=tools,
            add_generation_prompt=not continues and body.add_generation_prompt is not False,
            continue_final_message=continues,
            template_variables=variables,
        )

    try:
        tools = list(use.tools) or None
        text = rendered(messages, tools)
        if tools and text == rendered(messages, None):  # a template that knows no tools, as in TGI
            told = f"\n---\n{json.dumps(tools)}\n{body.tool_prompt or TOOL_PROMPT}"
            last = {**messages[-1], "content": messages[-1]["content"] + told}
            text = rendered([*messages[:-1], last], tools)
    except RequestError as error:
        raise ServerError(f"Template error: {error}", kind="template_error") from error
    if check_length is not None:
        check_length(tokenizer.fewest_tokens(text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return Conversation(text=text, prompt_ids=ids, grammar=use.grammar or grammar, tools=use)


def _continues(body: ChatRequest, messages: list[dict[str, Any]]) -> bool:
    """Return whether the last message is the assistant's and goes on, as in TGI.

    Who asks for a new answer says so: `continue_final_message` or `add_generation_prompt`.
    """
    last = messages[-1]
    if body.continue_final_message is not None:
        return body.continue_final_message
    is_open = last["role"] == "assistant" and bool(last.get("content"))
    return is_open and not last.get("tool_calls") and not body.add_generation_prompt


def _variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    reserved = {"messages", "tools", "documents", "add_generation_prompt"}
    wrong = sorted(reserved & set(given or {}))
    if wrong:
        raise invalid(f"`chat_template_kwargs` cannot set {wrong[0]!r}", "chat_template_kwargs")
    return dict(given or {})


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates read it: text for content, objects for a call's arguments."""
    place = f"messages.{number}"
    role = message.get("role")
    if not isinstance(role, str):
        raise invalid(f"{place}.role must be a text", place)
    found = {key: value for key, value in message.items() if value is not None}
    found["content"] = _content(message.get("content"), f"{place}.content")
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [_call(call, f"{place}.tool_calls") for call in calls]
    return found


def _content(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{place} must be a text or a list of parts", place)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            name = str(kind).removesuffix("_url").removeprefix("input_")
            raise invalid(f"{name} modality is not supported.", place)
        if not isinstance(part.get("text"), str):
            raise invalid(f"{place} has a part without a text", place)
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any, place: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as published templates want it."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise invalid(f"{place} has a call without a function's name", place)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise invalid(
                f"{place} has arguments that are not JSON: {arguments!r}", place
            ) from None
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
