"""The bodies of OpenAI's Responses API, without stored responses.

Explicit nulls mean the same as absent fields. The extensions of chat requests (PASSED_ON) are accepted
here too; unknown fields are ignored, and known ones that are not supported (NOT_SERVED) are refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hanok.server.tgi_models import Body, Name, NullFalse

_STORED = "nothing is stored here. Send the whole conversation as `input`"
NOT_SERVED: Mapping[str, str] = {
    "background": "answers are made while the client waits, or streams",
    "context_management": "conversations are not made shorter here. Send a shorter `input`",
    "conversation": _STORED,
    "moderation": "nothing is moderated here",
    "previous_response_id": _STORED,
    "prompt": "no prompts are stored here. Send `instructions` and `input`",
}
"""Fields that are refused unless they have a value that asks for nothing, and why."""

INCLUDED = ("message.output_text.logprobs", "reasoning.encrypted_content")
"""Values that `include` may have; reasoning is returned in plain text and needs no encrypted copy."""


class Reasoning(Body):
    """Options of reasoning. It is returned whole, so `summary` asks for less than there is."""

    effort: Annotated[str, Field(max_length=64)] | None = None
    """For templates that support it; "none": without reasoning, if the template can switch it off."""
    summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Body):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """Requirements on the answer's text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Body):
    """The body of /v1/responses."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=10_000)]
    instructions: str | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=1000)] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Limits tools that run on the server; there are none."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str], Field(fail_fast=True, max_length=100)] | None = None
    truncation: Literal["disabled"] | None = None
    stream: NullFalse = False
    stream_options: dict[str, Any] | None = None
    """Options of padding against eavesdroppers; deltas are not padded."""
    store: bool | None = None
    """Accepted, since clients send it by default; nothing is stored, and the answer says so."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None


class InputTokens(BaseModel):
    """The answer of /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class ResponseUsage(BaseModel):
    """Tokens counted."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseBody(BaseModel):
    """The answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    background: Literal[False]
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    """Items: reasoning, message, function_call."""
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    """None while the answer is not finished."""
    user: str | None
