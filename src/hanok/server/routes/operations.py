"""Routes for operators: health, what is served, metrics, and what a request would do."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from hanok.package import __version__
from hanok.server import messages_input, responses_input
from hanok.server.chat import conversation_of
from hanok.server.errors import ServerError, invalid
from hanok.server.messages_models import MessagesRequest
from hanok.server.openai_models import ChatRequest, CompletionRequest
from hanok.server.openai_sampling import check, origins, sampling_options
from hanok.server.responses_models import ResponsesRequest
from hanok.server.route import Route
from hanok.server.routes import openai, tgi
from hanok.server.routes.chat import chat_completions
from hanok.server.routes.openai import prompts_of
from hanok.server.service import Service
from hanok.server.submission import check_prompt, fitting, truncated
from hanok.server.tgi_models import Body, CompatGenerateRequest, GenerateRequest, Name
from hanok.server.web import Json, Pieces, dumps, validated


class Info(BaseModel):
    """What is served, and within which limits: TGI's fields first."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_input_length: int
    """`max_input_tokens`, under its name in TGI before 2.0."""
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    model_dtype: str
    model_device_type: str
    max_batch_total_tokens: int
    cache_tokens: int
    concurrent_users: int
    """Requests of the greatest length that fit at a time."""
    memory_plan: list[dict[str, Any]]


class Status(BaseModel):
    """The health of a server."""

    status: str
    progress: float


class ExplainRequest(Body):
    """A request of another route, to be explained and not carried out."""

    route: Name = "/v1/chat/completions"
    body: dict[str, Any] = Field(default_factory=dict)


class Explanation(BaseModel):
    """What a request means."""

    prompts: list[dict[str, Any]]
    parameters: dict[str, Any]


class Anything(Body):
    """Any JSON object."""

    model_config = ConfigDict(extra="allow")


async def page(service: Service, request: Request, body: None) -> Response:
    """Answer a browser with a page, and any other client like /health."""
    if "text/html" in request.headers.get("accept", ""):
        text = files("hanok.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text)
    return await health(service, request, body)


async def health(service: Service, request: Request, body: None) -> Response:
    """Answer 200 while the engine makes progress; 503 while loading, and if it is stuck."""
    if service.state == "loading" or service.state == "failed" or service.engine is None:
        return Json(
            {
                "error": service.failure or "loading",
                "error_type": "healthcheck",
                "status": service.state,
                "progress": round(service.progress, 4),
            },
            503,
        )
    if service.engine.is_stuck:
        return Json({"error": "unhealthy", "error_type": "healthcheck"}, 503)
    return Response(status_code=200)


async def ready(service: Service, request: Request, body: None) -> Response:
    """Answer 200 while requests are accepted; unlike /health, 503 as soon as the server is stopping."""
    is_well = service.engine is not None and not service.engine.is_stuck
    status = 200 if service.state == "ready" and is_well else 503
    return Json({"status": service.state, "progress": round(service.progress, 4)}, status)


async def info(service: Service, request: Request, body: None) -> Response:
    """Answer with what is served."""
    options, model, engine = service.options, service.needed_model, service.engine
    if engine is None:
        raise ServerError("the model is loading", kind="overloaded", status=503)
    total = service.max_total_tokens
    found = Info(
        model_id=options.model_id,
        model_sha=None,
        model_pipeline_tag="text-generation" if model.config.has_head else "feature-extraction",
        max_concurrent_requests=options.max_concurrent_requests,
        max_best_of=options.max_best_of,
        max_stop_sequences=options.max_stop_sequences,
        max_input_tokens=service.max_input_tokens,
        max_input_length=service.max_input_tokens,
        max_total_tokens=total,
        validation_workers=options.validation_workers,
        max_client_batch_size=options.max_client_batch_size,
        router="text-generation-router",
        version=__version__,
        sha=None,
        docker_label=None,
        model_dtype=str(model.dtype),
        model_device_type=model.device.type,
        max_batch_total_tokens=engine.cache_tokens,
        cache_tokens=engine.cache_tokens,
        concurrent_users=engine.cache_tokens // total,
        memory_plan=service.facts.get("memory_plan", []),
    )
    return Json(found.model_dump())


async def metrics(service: Service, request: Request, body: None) -> Response:
    """Answer in Prometheus' text format."""
    if service.metrics is None or service.engine is None:
        raise ServerError("the model is loading", kind="overloaded", status=503)
    text, kind = service.metrics.render(service.engine.stats())
    return Response(text, headers={"content-type": kind})


async def chat_tokenize(service: Service, request: Request, body: ChatRequest) -> Response:
    """Answer with the tokens of a conversation and the text its template makes."""
    check(body, service.options)
    tokenizer = service.needed_tokenizer
    talk = await service.aside(conversation_of, tokenizer, body)
    ids = await service.aside(tokenizer.encode, talk.text, add_special_tokens=False)

    async def pieces() -> AsyncGenerator[str, None]:
        yield '{"tokenize_response":'
        async with aclosing(tgi.token_list(service, talk.text, ids)) as tokens:
            async for piece in tokens:
                yield piece
        yield f',"templated_text":{dumps(talk.text)}}}'

    return Pieces(pieces(), write_timeout_s=service.options.write_timeout_s)


async def invocations(service: Service, request: Request, body: Anything) -> Response:
    """Answer any of the three kinds of requests at one path, as SageMaker sends them."""
    given = body.model_extra or {}
    if "messages" in given:
        return await chat_completions(service, request, validated(given, ChatRequest))
    if "prompt" in given:
        completion = validated(given, CompletionRequest)
        return await openai.completions(service, request, completion)
    compat = validated(given, CompatGenerateRequest)
    return await tgi.compat_generate(service, request, compat)


def _chat_of(asked: ExplainRequest) -> ChatRequest | None:
    """Return a conversation of any protocol as a chat request; None for other routes' bodies."""
    if asked.route == "/v1/chat/completions":
        return validated(asked.body, ChatRequest)
    if asked.route == "/v1/responses":
        return responses_input.chat_request(validated(asked.body, ResponsesRequest))
    if asked.route == "/v1/messages":
        return messages_input.chat_request(validated(asked.body, MessagesRequest))
    return None


async def explain(service: Service, request: Request, body: ExplainRequest) -> Response:
    """Answer with the prompt's tokens and the effective parameters with their origins."""
    model = service.needed_model
    prompts: list[dict[str, Any]] = []
    if (chat := _chat_of(body)) is not None:
        check(chat, service.options)
        wanted = chat.max_completion_tokens or chat.max_tokens
        kept = chat.truncate_prompt_tokens
        check_length = fitting(service, wanted, "messages") if kept is None else None
        talk = await service.aside(conversation_of, service.needed_tokenizer, chat, check_length)
        ids = truncated(service, talk.prompt_ids, kept, wanted or 1)
        most = check_prompt(service, ids, wanted, "messages")
        options = sampling_options(chat, model.defaults, most)
        params = model.defaults.updated(options)
        prompts = [{"text": talk.text, "token_ids": ids}]
        return Json({"prompts": prompts, "parameters": origins(chat, params, model.defaults)})
    if body.route == "/v1/completions":
        completion = validated(body.body, CompletionRequest)
        check(completion, service.options)
        wanted, infill = completion.max_tokens, openai.infill_of(service, completion)
        most = openai.DEFAULT_COMPLETION_TOKENS if wanted is None else max(1, wanted)
        for prompt in prompts_of(service, completion):
            ids = await openai.encoded(service, completion, prompt, most, infill)
            ids = truncated(service, ids, completion.truncate_prompt_tokens, most)
            check_prompt(service, ids, most, "prompt")
            prompts.append({"text": prompt if isinstance(prompt, str) else None, "token_ids": ids})
        options = sampling_options(completion, model.defaults, most)
        if infill is not None:
            openai.end_with(options, infill)
        params = model.defaults.updated(options)
        return Json({"prompts": prompts, "parameters": origins(completion, params, model.defaults)})
    if body.route in ("/", "/generate", "/generate_stream"):
        generate = validated(body.body, GenerateRequest)
        asked = await tgi.asked_of(service, request, generate, streams=False, full_text=False)
        params = model.defaults.updated(asked.prepared.options)
        parameters = {
            name: {"value": value, "origin": tgi.origin_of(asked.parameters, name)}
            for name, value in asdict(params).items()
        }
        prompts = [{"text": body.body.get("inputs"), "token_ids": asked.prepared.prompt_ids}]
        return Json({"prompts": prompts, "parameters": parameters})
    raise invalid(
        f"`route` is {body.route!r}; it must be /generate, /v1/completions, /v1/chat/completions, "
        "/v1/responses or /v1/messages",
        "route",
    )


_GET: dict[str, Any] = {"method": "GET"}
_POST: dict[str, Any] = {"method": "POST", "needs_key": True, "needs_model": True}
ROUTES = (
    Route(
        path="/",
        handler=page,
        summary="A page to chat on; without a browser the server's health",
        content_type="text/html",
        statuses=(503,),
        **_GET,
    ),
    Route(
        path="/health",
        handler=health,
        summary="Is it well?",
        content_type="",
        statuses=(503,),
        **_GET,
    ),
    Route(
        path="/ping",
        handler=health,
        summary="Is it well?",
        content_type="",
        statuses=(503,),
        **_GET,
    ),
    Route(
        path="/ready",
        handler=ready,
        summary="Does it take requests?",
        answer=Status,
        statuses=(503,),
        **_GET,
    ),
    Route(
        path="/info", handler=info, summary="What is served", answer=Info, statuses=(503,), **_GET
    ),
    Route(
        path="/metrics",
        handler=metrics,
        summary="Metrics for Prometheus",
        content_type="text/plain",
        statuses=(503,),
        **_GET,
    ),
    Route(
        path="/chat_tokenize",
        handler=chat_tokenize,
        summary="The tokens of a conversation",
        body=ChatRequest,
        **_POST,
    ),
    Route(
        path="/invocations",
        needs_head=True,
        handler=invocations,
        summary="Any of the generating requests, as SageMaker sends them",
        body=Anything,
        streams=True,
        statuses=(404, 424, 429, 500),
        **_POST,
    ),
    Route(
        path="/explain",
        needs_head=True,
        handler=explain,
        summary="What a request means: its prompt, its effective parameters and their origins",
        body=ExplainRequest,
        answer=Explanation,
        statuses=(404,),
        **_POST,
    ),
)
