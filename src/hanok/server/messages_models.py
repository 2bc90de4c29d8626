"""The bodies of Anthropic's Messages.

Explicit nulls mean the same as absent fields. The extensions of chat requests (PASSED_ON) are
accepted here too; unknown fields are ignored, and known ones that are not supported (NOT_SERVED) are
refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hanok.server.tgi_models import Body, NullFalse

NOT_SERVED: Mapping[str, str] = {
    "container": "no code runs here",
    "mcp_servers": "the client talks to tools, the server to none",
    "output_format": "send `output_config.format`",
}
"""Fields that are refused unless they have a value that asks for nothing, and why."""


class Thinking(Body):
    """Whether the model is to think, if its template supports it. Budgets are ignored."""

    type: Literal["enabled", "adaptive", "disabled"]


class ToolChoice(Body):
    """Which tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: NullFalse = False


class OutputFormat(Body):
    """The format of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """Requirements on the answer."""

    format: OutputFormat | None = None
    effort: Annotated[str, Field(max_length=64)] | None = None
    """For templates that know `reasoning_effort`."""


class CountTokensRequest(Body):
    """The body of /v1/messages/count_tokens: the fields that make up the prompt."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    messages: Annotated[
        list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=10_000)
    ]
    system: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=1000)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = None
    """Accepted if it clears nothing: `{"edits": [{"type": …, "keep": "all"}]}`."""


class MessagesRequest(CountTokensRequest):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: NullFalse = False
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    metadata: dict[str, Any] | None = None


class TokenCount(BaseModel):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class MessageBody(BaseModel):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    """Blocks: thinking, text, tool_use."""
    stop_reason: (
        Literal[
            "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
        ]
        | None
    )
    """None at the beginning of a stream."""
    stop_sequence: str | None
    usage: dict[str, Any]
