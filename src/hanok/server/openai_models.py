"""The bodies of OpenAI's routes, with the extensions of other servers that clients commonly send.

Explicit nulls mean the same as absent fields. Unknown fields are ignored; known ones that are not
supported (NOT_SERVED) are refused by the route, never silently ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from hanok.server.errors import invalid
from hanok.server.tgi_models import Body, Name, NullFalse, Stops

MOST_BIASES = 10_000
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
"""A token id; neither true nor a string of digits is one."""
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
MOST_CHOICES = 1000
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _few(value: Any) -> Any:
    """Refuse a large table before its entries are validated: each wrong one would be reported."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise ValueError(f"at most {MOST_BIASES:,} tokens can be given a bias")
    return value


def _kind_of_prompt(value: Any) -> str:
    """Return the kind of a prompt by its first item, so that it is validated as that kind only."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, str):
        return "text"
    if isinstance(first, str):
        return "texts"
    return "token_id_lists" if isinstance(first, list) else "token_ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("token_ids")]
    | Annotated[list[str], Field(fail_fast=True, max_length=10_000), Tag("texts")]
    | Annotated[list[TokenIds], Field(fail_fast=True, max_length=10_000), Tag("token_id_lists")],
    Discriminator(_kind_of_prompt),
]
Biases = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(max_length=MOST_BIASES),
    BeforeValidator(_few),
]


NOT_SERVED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": ({},),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": ("",),
    "documents": ([],),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "echo": (False,),
    "function_call": (),
    "functions": ([],),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora": ([],),
    "mirostat": (0,),
    "modalities": (["text"], []),
    "negative_prompt": ("",),
    "n_probs": (0,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "tfs_z": (1,),
    "top_a": (0,),
    "use_beam_search": (False,),
    "web_search_options": (),
    "xtc_probability": (0,),
}
"""Fields that change an answer elsewhere and are not supported, with the values that ask for nothing."""


class StreamOptions(Body):
    """What a stream contains besides the text."""

    include_usage: NullFalse = False


class Sampling(Body):
    """Fields common to all of OpenAI's generating routes."""

    # Kept, so that those of NOT_SERVED can be distinguished from unknown ones.
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Name | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops = Field(default_factory=list)
    stream: NullFalse = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Name | None = None
    # Beyond OpenAI's:
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: NullFalse = False
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1000)] | None = None
    include_stop_str_in_output: NullFalse = False
    timeout: Annotated[float, Field(gt=0)] | None = None
    cache_salt: Name | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Use only this many of the prompt's last tokens; -1: as many as fit."""
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose template writes them."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to return at each position of the prompt, besides its own."""
    # Constraints on the answer; see `server/constraints.py`.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=MOST_CHOICES, fail_fast=True)] | None = (
        None
    )
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: Any = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: Any = None
    ebnf: Any = None
    structural_tag: Any = None


class CompletionRequest(Sampling):
    """The body of /v1/completions."""

    prompt: Prompt
    best_of: Annotated[int, Field(ge=1)] | None = None
    # @huggingface/inference sends TGI's name for it.
    echo: NullFalse = Field(False, validation_alias=AliasChoices("echo", "return_full_text"))
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    suffix: str | None = None


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[
        list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=10_000)
    ]
    logprobs: NullFalse = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=1000)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    reasoning_effort: str | None = None
    """Reaches the template under this name, and as `enable_thinking`, false for "none"."""
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


PASSED_ON = frozenset(
    (
        "add_special_tokens",
        "cache_salt",
        "chat_template_kwargs",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "priority",
        "repetition_penalty",
        "seed",
        "separate_reasoning",
        "stop",
        "stop_token_ids",
        "timeout",
        "tool_prompt",
        "top_k",
        "truncate_prompt_tokens",
        "typical_p",
        "user",
    )
)
"""Fields of a chat request for which other protocols have no name."""


def passed_on(extra: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the chat-request fields in the body of another protocol.

    Raises ServerError for fields that only a chat request has, or that would be refused there.
    """
    for name, value in extra.items():
        if name in ChatRequest.model_fields and name not in PASSED_ON and value is not None:
            raise invalid(f"`{name}` is not a field of {path}", name)
    return {name: value for name, value in extra.items() if name in PASSED_ON | NOT_SERVED.keys()}


class Usage(BaseModel):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class Logprobs(BaseModel):
    """Log-probabilities of a completion's tokens, and where in its text each begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


PromptLogprobs = list[dict[str, dict[str, Any]] | None]
"""For each token of the prompt a table by token id, as vLLM writes it; None for the first."""


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    """Tokens of one request, prompt and answer; None while the model is loading."""


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]
