"""Converts the input of a Response to a chat request: items become the messages that templates know.

One turn of the assistant is several items (reasoning, message, calls) but one message.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hanok.server.chat import content_text
from hanok.server.errors import ServerError, invalid
from hanok.server.openai_models import ChatRequest, passed_on
from hanok.server.responses_models import (
    INCLUDED,
    NOT_SERVED,
    ResponsesRequest,
    TextFormat,
)
from hanok.server.web import validated

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
"""Roles of messages, and the roles that templates use for them."""


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """Return the body as a chat request. Raises ServerError for what is not supported."""
    extra = body.model_extra or {}
    for name, reason in NOT_SERVED.items():
        if extra.get(name):
            raise invalid(f"`{name}` is not supported: {reason}", name)
    for name in body.include or ():
        if name not in INCLUDED:
            raise invalid(
                f"`include` asks for {name!r}; there is {' and '.join(INCLUDED)}", "include"
            )
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": _History.of(body).messages,
        "add_generation_prompt": True,
        "tools": [_tool(number, tool) for number, tool in enumerate(body.tools or ())] or None,
        "tool_choice": body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": tells_logprobs(body),
        "top_logprobs": body.top_logprobs,
        "response_format": _response_format(body.text.format if body.text else None),
        "chat_template_kwargs": _variables(body),
    }
    return validated(passed_on(extra, "/v1/responses") | fields, ChatRequest)


def tells_logprobs(body: ResponsesRequest) -> bool:
    """Return whether the answer has log-probabilities."""
    return bool(body.top_logprobs) or "message.output_text.logprobs" in (body.include or ())


def _response_format(given: TextFormat | None) -> dict[str, Any] | None:
    if given is None or given.type != "json_schema":
        return None if given is None else {"type": given.type}
    if given.schema_ is None:
        raise invalid("`text.format.schema` is missing", "text.format.schema")
    return {"type": "json_schema", "json_schema": {"schema": given.schema_}}


def _variables(body: ResponsesRequest) -> dict[str, Any]:
    """Return the template's variables besides the messages."""
    given = (body.model_extra or {}).get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise invalid("`chat_template_kwargs` must be an object", "chat_template_kwargs")
    effort = body.reasoning.effort if body.reasoning else None
    if effort is None:
        return dict(given)
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **given}


def _tool(number: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function in the form that templates know."""
    kind = tool.get("type")
    if kind != "function":
        raise invalid(
            f"tools.{number} is of type {kind!r}, and no such tool runs here: this server takes "
            "those of type 'function', which the client runs",
            "tools",
        )
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise invalid(f"tools.{number}.name must be a string", "tools")
    names = ("name", "description", "parameters")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


class _History:
    """Builds messages from items."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    @classmethod
    def of(cls, body: ResponsesRequest) -> "_History":
        history = cls()
        if body.instructions:
            history.messages.append({"role": "system", "content": body.instructions})
        if isinstance(body.input, str):
            history.messages.append({"role": "user", "content": body.input})
            return history
        if not body.input:
            raise invalid("`input` cannot be empty", "input")
        for number, item in enumerate(body.input):
            place = f"input.{number}"
            kind = item.get("type") or "message"
            read = _ITEMS.get(kind) if isinstance(kind, str) else None
            if read is None:
                raise _unknown(kind, place)
            read(history, item, place)
        return history

    def message(self, item: Mapping[str, Any], place: str) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise invalid(f"{place}.role must be {', '.join(ROLES)}, not {role!r}", place)
        role, text = ROLES[role], content_text(item.get("content"), f"{place}.content")
        last = self.messages[-1] if self.messages else None
        if role == "assistant":
            self._turn("content", "tool_calls")["content"] = text
        elif role == "system" and last is not None and last["role"] == "system":
            last["content"] += f"\n\n{text}"  # many templates support only one, at the beginning
        else:
            self.messages.append({"role": role, "content": text})

    def reasoning(self, item: Mapping[str, Any], place: str) -> None:
        """Encrypted reasoning cannot be read here; it is skipped."""
        parts = item.get("content") or item.get("summary") or []
        texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
        if not isinstance(parts, list) or not all(isinstance(text, str) for text in texts):
            raise invalid(f"{place}.content must be a list of parts with a text", place)
        if texts:
            turn = self._turn("reasoning_content", "content", "tool_calls")
            turn["reasoning_content"] = "".join(map(str, texts))

    def call(self, item: Mapping[str, Any], place: str) -> None:
        for name in ("name", "arguments", "call_id"):
            if not isinstance(item.get(name), str):
                raise invalid(f"{place}.{name} must be a string", place)
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        self._turn().setdefault("tool_calls", []).append(call)

    def call_output(self, item: Mapping[str, Any], place: str) -> None:
        if not isinstance(item.get("call_id"), str):
            raise invalid(f"{place}.call_id must be a string", place)
        text = content_text(item.get("output"), f"{place}.output")
        self.messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})

    def _turn(self, *ended_by: str) -> dict[str, Any]:
        """Return the assistant's current message; a new one if it already has one of these."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant" or any(last.get(name) for name in ended_by):
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        return last


_ITEMS: Mapping[str, Callable[[_History, Mapping[str, Any], str], None]] = {
    "message": _History.message,
    "reasoning": _History.reasoning,
    "function_call": _History.call,
    "function_call_output": _History.call_output,
}


def _unknown(kind: Any, place: str) -> ServerError:
    if kind == "item_reference":
        return invalid(
            f"{place} refers to a stored item; nothing is stored here, send the item", place
        )
    return invalid(
        f"{place} is of type {kind!r}, which is not supported; there is {', '.join(_ITEMS)}", place
    )
