"""Turns a chat request into a prompt, and says how its answer is parsed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.grammar_spec import GrammarSpec
from hanok.errors import RequestError
from hanok.server.answer import CALL_MARKERS, REASONING, REASONING_MARKERS, Reads
from hanok.server.constraints import constraint_of
from hanok.server.errors import ServerError, invalid
from hanok.server.incoming import MAX_DEPTH
from hanok.server.openai_models import ChatRequest
from hanok.server.tools import ToolUse, tool_use
from hanok.server.web import has_many_containers

TOOL_PROMPT = (
    "These functions can be called. To call one, answer with a JSON object and nothing else: "
    '{"name": its name, "arguments": an object of its arguments}.'
)
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
"""Types of content parts that are text, in OpenAI's protocols."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation for the model to continue."""

    text: str
    """The rendered template."""
    prompt_ids: list[int]
    grammar: GrammarSpec | None
    reads: Reads
    """How the answer is parsed."""
    spelled_token_ids: tuple[int, ...]
    """Special tokens that are parsed, and so must be spelled out."""


def conversation_of(
    tokenizer: Tokenizer, body: ChatRequest, check_length: Callable[[int], None] | None = None
) -> Conversation:
    """Return a request's conversation as the checkpoint's template writes it.

    `check_length`: see `Service.encoded`.
    Raises ServerError for invalid messages, and if there is no template or it refuses them.
    """
    messages = [_message(number, message) for number, message in enumerate(body.messages)]
    use, grammar = tool_use(body.tools, body.tool_choice), constraint_of(body)
    if use.is_forced and grammar is not None:
        raise invalid("Grammar and tools are mutually exclusive", "response_format")
    continues = _continues(body, messages)
    variables = _variables(body)

    def rendered(shown: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return tokenizer.render_chat(
            shown,
            tools=tools,
            add_generation_prompt=not continues and body.add_generation_prompt is not False,
            continue_final_message=continues,
            template_variables=variables,
        )

    def knows_tools(text: str) -> bool:
        try:
            return text != rendered(messages, None)
        except RequestError:  # the model may not answer without it
            return True

    try:
        tools = list(use.tools) or None
        text = rendered(messages, tools)
        if tools and not knows_tools(text):  # as in TGI
            told = f"\n---\n{json.dumps(tools)}\n{body.tool_prompt or TOOL_PROMPT}"
            last = {**messages[-1], "content": (messages[-1].get("content") or "") + told}
            text = rendered([*messages[:-1], last], tools)
    except RequestError as error:
        raise ServerError(f"Template error: {error}", kind="template_error") from error
    if check_length is not None:
        check_length(tokenizer.fewest_tokens(text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    reads = _reads(body, use, text, is_free=grammar is None)
    return Conversation(
        text=text,
        prompt_ids=ids,
        grammar=use.grammar or grammar,
        reads=reads,
        spelled_token_ids=_spelled(tokenizer, reads),
    )


def _reads(body: ChatRequest, use: ToolUse, prompt: str, *, is_free: bool) -> Reads:
    """Return how the answer is parsed: not at all if a grammar determines it."""
    if not is_free:
        return Reads(reasoning=False)
    ending = prompt.rstrip()
    return Reads(
        functions=use.functions,
        is_forced=use.is_forced,
        allows_several=body.parallel_tool_calls is not False,
        reasoning=body.separate_reasoning is not False and not use.is_forced,
        opening=next((opening for opening in REASONING if ending.endswith(opening)), ""),
    )


def _spelled(tokenizer: Tokenizer, reads: Reads) -> tuple[int, ...]:
    """Return the special tokens that serve as markers in an answer."""
    read = REASONING_MARKERS if reads.reasoning else frozenset()
    if reads.functions:
        read |= CALL_MARKERS
    ids = (tokenizer.token_to_id(marker) for marker in read)
    special = tokenizer.special_token_ids
    return tuple(sorted(token for token in ids if token is not None and token in special))


def _continues(body: ChatRequest, messages: list[dict[str, Any]]) -> bool:
    """Return whether the last message is the assistant's and is to be continued, as in TGI.

    Clients that want a new answer set `continue_final_message` or `add_generation_prompt`.
    """
    last = messages[-1]
    if body.continue_final_message is not None:
        return body.continue_final_message
    is_open = last["role"] == "assistant" and bool(last.get("content"))
    return is_open and not last.get("tool_calls") and not body.add_generation_prompt


def _variables(body: ChatRequest) -> dict[str, Any]:
    """Return the template's variables besides the messages."""
    given, effort = body.chat_template_kwargs or {}, body.reasoning_effort
    reserved = {"messages", "tools", "documents", "add_generation_prompt"}
    wrong = sorted(reserved & set(given))
    if wrong:
        raise invalid(f"`chat_template_kwargs` cannot set {wrong[0]!r}", "chat_template_kwargs")
    if effort is None:
        return dict(given)
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **given}


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its content as text and its calls checked.

    Calls in OpenAI's deprecated form, `function_call` and the role "function", are converted.
    """
    place = f"messages.{number}"
    role = message.get("role")
    if not isinstance(role, str):
        raise invalid(f"{place}.role must be a string", place)
    found = {key: value for key, value in message.items() if value is not None}
    older = found.pop("function_call", None)
    calls = found.pop("tool_calls", None) or ([{"function": older}] if older else [])
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise invalid(f"{place}.tool_calls must be a list of calls", place)
    found["content"] = content_text(message.get("content"), f"{place}.content")
    if role == "function":
        found |= {"role": "tool", "tool_call_id": _id_of(message.get("name"))}
    if calls:
        found["tool_calls"] = [_call(call, f"{place}.tool_calls") for call in calls]
        found["content"] = found["content"] or None
    return found


def content_text(content: Any, place: str) -> str:
    """Return the text of a message or of its parts; ServerError, which names the place, for others."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{place} must be a string or a list of parts", place)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS:
            name = str(kind).removesuffix("_url").removeprefix("input_")
            raise invalid(f"{name} modality is not supported.", place)
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise invalid(f"{place} has a part without a text", place)
        texts.append(text)
    return "".join(texts)


def _call(call: Any, place: str) -> dict[str, Any]:
    """Return a checked tool call, whose function has a name; its arguments stay as sent."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise invalid(f"{place} has a call without a function's name", place)
    arguments = function.get("arguments", {})
    value = arguments
    if isinstance(arguments, str):
        if has_many_containers(arguments.encode()):
            raise invalid(f"{place} has arguments with too many arrays and objects", place)
        try:
            value = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            value = arguments  # an incomplete call, of an answer that was cut off
        except RecursionError:
            raise _too_deep(place) from None
    if _depth(value) > MAX_DEPTH:
        raise _too_deep(place)
    name = function["name"]
    return {
        **call,
        "id": call.get("id") or _id_of(name),
        "type": "function",
        "function": {**function, "arguments": {} if arguments is None else arguments},
    }


def _id_of(name: Any) -> str:
    """Return an id for a call that was sent without one, by which its result is found."""
    return f"call_{name}"


def _too_deep(place: str) -> ServerError:
    return invalid(f"{place} has arguments nested deeper than {MAX_DEPTH} levels", place)


def _depth(value: Any) -> int:
    """Return how deep arrays and objects are nested."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        level = [
            item for each in level for item in (each.values() if isinstance(each, dict) else each)
        ]
    return depth
