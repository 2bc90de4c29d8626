"""Converts Anthropic's Messages to a chat request: blocks become the messages that templates know."""

from collections.abc import Mapping
from typing import Any

from hanok.server.errors import ServerError, invalid
from hanok.server.messages_models import (
    NOT_SERVED,
    CountTokensRequest,
    MessagesRequest,
    ToolChoice,
)
from hanok.server.openai_models import PASSED_ON, ChatRequest, passed_on
from hanok.server.web import validated

Block = Mapping[str, Any]

ERROR = "Error: "
"""Prefix of a failed tool's result, since templates have no field for it."""


def chat_request(body: CountTokensRequest) -> ChatRequest:
    """Return the body as a chat request. Raises ServerError for what is not supported."""
    extra = body.model_extra or {}
    for name, reason in NOT_SERVED.items():
        if extra.get(name):
            raise invalid(f"`{name}` is not supported: {reason}", name)
    _check_clears_nothing(body.context_management)
    tools = [_tool(number, tool) for number, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    output = body.output_config
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "tools": tools or None,
        "tool_choice": _tool_choice(choice),
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        "chat_template_kwargs": _variables(body),
    }
    if output is not None and output.format is not None:
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"schema": output.format.schema_},
        }
    if not isinstance(body, MessagesRequest):  # counting ignores what does not affect the prompt
        extra = {name: value for name, value in extra.items() if name in PASSED_ON}
    else:
        fields |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
        }
        if body.stop_sequences:
            fields["stop"] = body.stop_sequences
    return validated(passed_on(extra, "/v1/messages") | fields, ChatRequest)


def _check_clears_nothing(management: Mapping[str, Any] | None) -> None:
    edits = (management or {}).get("edits") or []
    keeps = isinstance(edits, list) and all(
        isinstance(edit, Mapping) and edit.get("keep") == "all" for edit in edits
    )
    if not keeps:
        raise invalid(
            "`context_management` is not supported: conversations are not made shorter here. Send "
            "fewer `messages`",
            "context_management",
        )


def _variables(body: CountTokensRequest) -> dict[str, Any]:
    """Return the template's variables besides the messages."""
    given = (body.model_extra or {}).get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise invalid("`chat_template_kwargs` must be an object", "chat_template_kwargs")
    found: dict[str, Any] = {}
    if body.thinking is not None:
        found["enable_thinking"] = body.thinking.type != "disabled"
    if body.output_config is not None and body.output_config.effort is not None:
        found["reasoning_effort"] = body.output_config.effort
    return {**found, **given}


def _tool_choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None or choice.type in ("auto", "none"):
        return None if choice is None else choice.type
    if choice.type == "any":
        return "required"
    if choice.name is None:
        raise invalid("`tool_choice.name` is missing", "tool_choice")
    return {"type": "function", "function": {"name": choice.name}}


def _tool(number: int, tool: Block) -> dict[str, Any]:
    """Return a tool in the form that templates know."""
    kind, name, schema = tool.get("type"), tool.get("name"), tool.get("input_schema")
    if kind not in (None, "custom"):
        raise invalid(
            f"tools.{number} is of type {kind!r}, which this server does not have: it takes tools "
            "with an `input_schema`, which the client runs",
            "tools",
        )
    if not isinstance(name, str) or not name:
        raise invalid(f"tools.{number}.name must be a string", "tools")
    if not isinstance(schema, Mapping):
        raise invalid(f"tools.{number}.input_schema must be a JSON schema, an object", "tools")
    function: dict[str, Any] = {"name": name, "parameters": dict(schema)}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    """Return the messages; consecutive ones of one role form one turn, as in Anthropic's protocol."""
    turns: list[tuple[str, str, list[Block]]] = []
    if body.system:
        turns.append(("system", "system", _blocks(body.system, "system")))
    for number, message in enumerate(body.messages):
        place, role = f"messages.{number}", message.get("role")
        if not isinstance(role, str) or role not in ("user", "assistant", "system"):
            raise invalid(f"{place}.role must be user, assistant or system, not {role!r}", place)
        blocks = _blocks(message.get("content"), f"{place}.content")
        if turns and turns[-1][0] == role:
            turns[-1][2].extend(blocks)
        else:
            turns.append((role, place, blocks))
    found: list[dict[str, Any]] = []
    for role, place, blocks in turns:
        if role == "system":
            found.append({"role": role, "content": _text(blocks, place, "\n\n")})
        else:
            found += _assistant(blocks, place) if role == "assistant" else _user(blocks, place)
    return found


def _blocks(content: Any, place: str) -> list[Block]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise invalid(f"{place} must be a string or a list of blocks", place)
    return list(content)


def _user(blocks: list[Block], place: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            found.append(_tool_result(block, place))
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += "\n" + _text([block], place)
        else:
            found.append({"role": "user", "content": _text([block], place)})
    return found or [{"role": "user", "content": ""}]


def _tool_result(block: Block, place: str) -> dict[str, Any]:
    if not isinstance(block.get("tool_use_id"), str):
        raise invalid(f"{place} has a tool_result without a `tool_use_id`", place)
    content = block.get("content")
    text = _text(_blocks("" if content is None else content, place), place)
    if block.get("is_error"):
        text = ERROR + text
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}


def _assistant(blocks: list[Block], place: str) -> list[dict[str, Any]]:
    """Redacted thinking is skipped: it is encrypted for another server."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(_text_of(block, "thinking", place))
        elif kind == "tool_use":
            calls.append(_tool_use(block, place))
        elif kind != "redacted_thinking":
            texts.append(_text([block], place))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _tool_use(block: Block, place: str) -> dict[str, Any]:
    for name in ("id", "name"):
        if not isinstance(block.get(name), str):
            raise invalid(f"{place} has a tool_use whose `{name}` is not a string", place)
    arguments = block.get("input") or {}
    if not isinstance(arguments, Mapping):
        raise invalid(f"{place} has a tool_use whose `input` is not an object", place)
    function = {"name": block["name"], "arguments": dict(arguments)}
    return {"id": block["id"], "type": "function", "function": function}


def _text(blocks: list[Block], place: str, between: str = "\n") -> str:
    """Return the text of blocks that must all be text."""
    for block in blocks:
        if block.get("type") != "text":
            raise _unknown(block.get("type"), place)
    return between.join(_text_of(block, "text", place) for block in blocks)


def _text_of(block: Block, name: str, place: str) -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise invalid(f"{place} has a block whose `{name}` is not a string", place)
    return text


def _unknown(kind: Any, place: str) -> ServerError:
    return invalid(
        f"{place} has a block of type {kind!r}, which is not supported there: this model reads text",
        place,
    )
