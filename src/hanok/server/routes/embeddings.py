"""OpenAI's route for embeddings: texts as vectors of length 1, made of a decoder's hidden states."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from hanok.engine.embed import unit_length
from hanok.engine.ticket import Ticket
from hanok.errors import HanokError
from hanok.server.errors import ServerError, invalid
from hanok.server.openai_models import Prompt
from hanok.server.openai_sampling import check_model
from hanok.server.route import Route
from hanok.server.service import Prepared, Service
from hanok.server.submission import check_prompt, fitting
from hanok.server.tgi_models import Body, Name
from hanok.server.times import timing_headers
from hanok.server.web import dumps, exchange_of

AT_ONCE = 32
AT_ONCE_TOKENS = 4096
"""Texts of a request, and their tokens, that are queued at a time: others may come in between."""


class EmbeddingRequest(Body):
    """The body of /v1/embeddings."""

    input: Prompt
    model: Name | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Keep only this many of the first numbers, scaled to length 1 again."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of little-endian float32."""
    user: Name | None = None
    # Beyond OpenAI's:
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    cache_salt: Name | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None


class Embedding(BaseModel):
    """One text's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens counted."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def embeddings(service: Service, request: Request, body: EmbeddingRequest) -> Response:
    """Answer with the vector of each text."""
    check_model(body.model, service)
    if isinstance(service.pooling, HanokError):
        raise ServerError(f"this model makes no embeddings: {service.pooling}", parameter="model")
    if body.truncate_prompt_tokens is not None:
        raise invalid(
            "`truncate_prompt_tokens` is not supported: shorten the texts", "truncate_prompt_tokens"
        )
    hidden_size = service.needed_model.config.hidden_size
    if body.dimensions is not None and body.dimensions > hidden_size:
        raise invalid(
            f"`dimensions` must be <= {hidden_size}. Given: {body.dimensions}", "dimensions"
        )
    inputs = _inputs(service, body)
    all_ids = await service.aside(_encoded, service, body, inputs)
    prepared = [
        Prepared(
            prompt_ids=ids,
            options={"max_new_tokens": 1},
            timeout_s=body.timeout,
            priority=body.priority or 0,
            salt=body.cache_salt,
            pooling=service.pooling,
        )
        for ids in all_ids
    ]
    tickets = await service.in_turn(request, prepared, at_once=AT_ONCE, num_tokens=AT_ONCE_TOKENS)
    count = sum(map(len, all_ids))
    answer = {
        "object": "list",
        "model": service.options.model_id,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    text = await service.aside(_written, answer, tickets, body)
    num_characters = sum(len(text) for text in inputs if isinstance(text, str))
    headers = timing_headers(exchange_of(request), tickets, num_characters)
    return Response(text, headers=headers, media_type="application/json")


def _inputs(service: Service, body: EmbeddingRequest) -> list[str | list[int]]:
    """Return the inputs of a body, each a text or token ids."""
    given = body.input
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("`input` cannot be empty", "input")
    if isinstance(given[0], int):
        return [list(given)]
    most = service.options.max_embedding_inputs
    if len(given) > most:
        raise invalid(
            f"`input` has {len(given)} texts and may have {most}: send less at once", "input"
        )
    return list(given)


def _encoded(
    service: Service, body: EmbeddingRequest, inputs: Sequence[str | list[int]]
) -> list[list[int]]:
    """Return the tokens of inputs. ServerError for one that is empty, or longer than the context."""
    adds = body.add_special_tokens is not False
    check_length = fitting(service, 0, "input")
    found = []
    for text in inputs:
        ids = text
        if isinstance(ids, str):
            check_length(service.needed_tokenizer.fewest_tokens(ids))
            ids = service.needed_tokenizer.encode(ids, add_special_tokens=adds)
        check_prompt(service, ids, 0, "input")
        found.append(ids)
    return found


def _written(answer: dict[str, Any], tickets: Sequence[Ticket], body: EmbeddingRequest) -> str:
    """Return the answer as JSON text, with a vector of length 1 for each ticket."""
    rows = torch.stack([ticket.pooled for ticket in tickets if ticket.pooled is not None])
    rows = unit_length(rows[:, : body.dimensions])
    data = []
    for index, row in enumerate(rows):  # one by one, so that other threads can run
        vector: Any = row.tolist()
        if body.encoding_format == "base64":
            vector = base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
        data.append(dumps({"object": "embedding", "index": index, "embedding": vector}))
    return dumps(answer)[:-1] + f',"data":[{",".join(data)}]}}'


_COMMON: dict[str, Any] = {"needs_key": True, "needs_model": True}
ROUTES = (
    Route(
        method="POST",
        path="/v1/embeddings",
        handler=embeddings,
        summary="Texts as vectors",
        body=EmbeddingRequest,
        answer=Embeddings,
        statuses=(404, 424, 429, 500),
        **_COMMON,
    ),
)
