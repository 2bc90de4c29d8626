"""The bodies of TGI's routes. Types are checked here, ranges in `tgi_limits.py` with TGI's own words.

Explicit nulls mean the same as absent fields, and unknown fields are ignored, as TGI does.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(max_length=1000)]
"""A text that names something; the limit is far beyond any name."""
Stops = Annotated[
    list[Annotated[str, Field(max_length=1000)]],
    Field(max_length=1000, fail_fast=True),
    BeforeValidator(lambda v: [v] if isinstance(v, str) else v or []),
]
"""One stop text or several. The limit of a route is lower, with an error in its protocol's words."""


class Body(BaseModel):
    """A body of a request."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


def _absent_is(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


NullFalse = Annotated[bool, _absent_is(False)]


class Grammar(Body):
    """The format of the answer: "json" and "json_schema" take a schema, "regex" an expression."""

    type: Literal["json", "regex", "json_schema", "json_object"]
    value: Any = None


class Parameters(Body):
    """How to generate."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: NullFalse = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: Stops = Field(default_factory=list)
    truncate: int | None = None
    watermark: NullFalse = False
    details: NullFalse = False
    decoder_input_details: NullFalse = False
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    adapter_id: Name | None = None
    # Beyond TGI's:
    presence_penalty: float | None = None
    min_p: float | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: NullFalse = False
    include_stop_str_in_output: bool | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    cache_salt: Name | None = None


class GenerateRequest(Body):
    """The body of /generate and /generate_stream."""

    inputs: str
    parameters: Parameters | None = None


class CompatGenerateRequest(GenerateRequest):
    """The body of POST /."""

    stream: NullFalse = False


class VertexRequest(Body):
    """The body of /vertex."""

    instances: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=10_000)]


class ErrorResponse(BaseModel):
    """What went wrong."""

    error: str
    error_type: str


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(BaseModel):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(BaseModel):
    """One of several answers."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class Details(BaseModel):
    """How an answer was generated."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(BaseModel):
    """An answer."""

    generated_text: str
    details: Details | None = None


class TokenizedToken(BaseModel):
    """A token of a text, and its position in bytes of UTF-8."""

    id: int
    text: str
    start: int
    stop: int
