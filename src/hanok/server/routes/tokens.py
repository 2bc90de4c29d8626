"""Text to tokens and back: TGI's /tokenize and vLLM's at one path, and vLLM's /detokenize."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, RootModel
from starlette.requests import Request
from starlette.responses import Response

from hanok.server.chat import conversation_of
from hanok.server.errors import invalid
from hanok.server.logprobs import text_of
from hanok.server.openai_models import ChatRequest, TokenId
from hanok.server.openai_sampling import check, check_model
from hanok.server.route import Route
from hanok.server.service import Service
from hanok.server.tgi_models import Body, Name, NullFalse, TokenizedToken
from hanok.server.token_list import token_list
from hanok.server.web import Json, Pieces, validated

ONE_OF = ("inputs", "prompt", "messages")


class TokenizeRequest(Body):
    """The body of /tokenize: TGI's has `inputs`, vLLM's `prompt` or the fields of a chat request."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    inputs: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    model: Name | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose template writes them."""
    return_token_strs: NullFalse = False


class TokenIds(Body):
    """The tokens of a prompt or a conversation, as vLLM writes them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Tokenized(RootModel[list[TokenizedToken] | TokenIds]):
    """The answer of /tokenize, in the format of the body's protocol."""


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    model: Name | None = None


class Detokenized(Body):
    """The answer of /detokenize."""

    prompt: str


async def tokenize(service: Service, request: Request, body: TokenizeRequest) -> Response:
    """Answer with the tokens of a text; for TGI's clients with their positions."""
    given = [name for name in ONE_OF if getattr(body, name) is not None]
    if len(given) != 1:
        raise invalid(f"exactly one of {', '.join(ONE_OF)} must be given, not {len(given)}")
    check_model(body.model, service)
    tokenizer = service.needed_tokenizer
    if body.inputs is not None:
        ids = await service.encoded(body.inputs)
        pieces = token_list(service, body.inputs, ids)
        return Pieces(pieces, write_timeout_s=service.options.write_timeout_s)
    text, adds_special = body.prompt, body.add_special_tokens is not False
    if text is None:
        chat = validated(body.model_dump(exclude={"add_special_tokens"}), ChatRequest)
        check(chat, service.options)
        talk = await service.aside(conversation_of, tokenizer, chat)
        text, adds_special, ids = talk.text, bool(body.add_special_tokens), talk.prompt_ids
    if adds_special or body.prompt is not None:
        ids = await service.encoded(text, add_special_tokens=adds_special)

    def found() -> dict[str, Any]:
        texts = [text_of(tokenizer, token) for token in ids] if body.return_token_strs else None
        size = service.max_total_tokens
        return {"count": len(ids), "max_model_len": size, "tokens": ids, "token_strs": texts}

    return await service.answered(found, len(ids), {})


async def detokenize(service: Service, request: Request, body: DetokenizeRequest) -> Response:
    """Answer with the text of tokens, special ones spelled out."""
    check_model(body.model, service)
    tokenizer, size = service.needed_tokenizer, service.needed_model.config.vocab_size
    check_ids(body.tokens, size, "tokens")
    text = await service.aside(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return Json(Detokenized(prompt=text).model_dump())


def check_ids(ids: Sequence[int], size: int, parameter: str) -> None:
    """Raise ServerError for an id that no row of the embedding has."""
    wrong = max(ids, default=0)
    if wrong >= size:
        raise invalid(
            f"`{parameter}` has {wrong}, which is not a token id: they are 0 to {size - 1}",
            parameter,
        )


_COMMON: dict[str, Any] = {
    "method": "POST",
    "needs_key": True,
    "needs_model": True,
    "statuses": (404, 424, 429, 500),
}
ROUTES = (
    Route(
        path="/tokenize",
        handler=tokenize,
        summary="The tokens of a text, or of a conversation",
        body=TokenizeRequest,
        answer=Tokenized,
        **_COMMON,
    ),
    Route(
        path="/detokenize",
        handler=detokenize,
        summary="The text of tokens",
        body=DetokenizeRequest,
        answer=Detokenized,
        **_COMMON,
    ),
)
