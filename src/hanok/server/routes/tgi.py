"""TGI's own routes, /generate and others, with TGI's names and messages."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.sequence import Ranked, TokenEvent
from hanok.engine.ticket import Ticket
from hanok.server import tgi_limits as limits
from hanok.server.chat import conversation_of
from hanok.server.errors import ServerError, flat_body, invalid
from hanok.server.logprobs import num_scores, text_of
from hanok.server.openai_models import ChatRequest
from hanok.server.prompts import batch_too_large
from hanok.server.route import Route
from hanok.server.service import Prepared, Service
from hanok.server.tgi_models import (
    CompatGenerateRequest,
    GenerateRequest,
    GenerateResponse,
    Parameters,
    VertexRequest,
)
from hanok.server.times import stream_headers, timing_headers
from hanok.server.web import Json, as_event, dumps, exchange_of, note_parameters, validated

UNFINISHED = ServerError(
    "Incomplete generation stream", kind="incomplete_generation_stream", status=500
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for text, checked."""

    parameters: Parameters
    inputs: str
    prepared: Prepared
    returns_full_text: bool

    @property
    def has_details(self) -> bool:
        """Whether more than the text is wanted."""
        return self.parameters.details or self.parameters.decoder_input_details


async def asked_of(
    service: Service, request: Request, body: GenerateRequest, *, streams: bool, full_text: bool
) -> Asked:
    """Check a body and tokenize its text."""
    # Without parameters at all TGI samples; with some it does not unless they say so.
    parameters = body.parameters or Parameters(do_sample=True)
    max_input, max_total = service.max_input_tokens, service.max_total_tokens
    limits.check(parameters, service.options, max_input=max_input, streams=streams)
    adapter = check_adapter(parameters.adapter_id, service)
    if not body.inputs:
        raise invalid("`inputs` cannot be empty", "inputs")
    check = partial(limits.check_lengths, parameters, max_input=max_input, max_total=max_total)
    if parameters.truncate is None:

        def check_fewest(count: int) -> None:
            if count > max_input:
                check(count, are_counted=False)

        prompt_ids = await service.encoded(body.inputs, check_fewest)
    else:
        prompt_ids = await service.aside(service.needed_tokenizer.encode, body.inputs)
        prompt_ids = prompt_ids[-parameters.truncate :]
    if not prompt_ids:
        raise invalid("`inputs` cannot be empty", "inputs")
    most = check(len(prompt_ids))
    options = limits.sampling_options(parameters, service.options, most, includes_stop=True)
    wants_scores = parameters.decoder_input_details and service.options.has_prompt_logprobs
    note_parameters(request, options)
    full = parameters.return_full_text
    return Asked(
        parameters=parameters,
        inputs=body.inputs,
        returns_full_text=full_text if full is None else full,
        prepared=Prepared(
            prompt_ids=prompt_ids,
            options=options,
            count=parameters.best_of or 1,
            grammar=limits.grammar_of(parameters.grammar),
            scored=0 if wants_scores else None,
            timeout_s=parameters.timeout,
            salt=parameters.cache_salt,
            adapter=adapter,
        ),
    )


def origin_of(asked: Parameters, name: str) -> str:
    """Return where the value of an engine's parameter comes from."""
    spellings = {
        "stop": asked.stop or None,
        "top_logprobs": asked.top_n_tokens,
        "min_new_tokens": asked.min_tokens,
        "include_stop": asked.include_stop_str_in_output,
        "watermark_delta": asked.watermark or None,
    }
    given = spellings[name] if name in spellings else getattr(asked, name, None)
    return "default" if given in (None, False) else "request"


def check_adapter(name: str | None, service: Service) -> str | None:
    """Return the adapter that a request names, if any; ServerError for an unknown one.

    The base model never replaces it, but for its own names, which TGI takes as well.
    """
    if name is None or name in service.options.model_names:
        return None
    if name not in service.adapter_names:
        raise ServerError(
            f"there is no adapter {name!r}", kind="adapter_not_found", status=404, code="not_found"
        )
    return name


async def generate(service: Service, request: Request, body: GenerateRequest) -> Response:
    """Answer with the whole text."""
    asked = await asked_of(service, request, body, streams=False, full_text=False)
    return await whole(service, request, asked, as_list=False)


async def generate_stream(service: Service, request: Request, body: GenerateRequest) -> Response:
    """Answer with each token as it arrives."""
    asked = await asked_of(service, request, body, streams=True, full_text=False)
    return await streamed(service, request, asked)


async def compat_generate(
    service: Service, request: Request, body: CompatGenerateRequest
) -> Response:
    """Answer as the hosted inference API does: a list, or a stream if the body asks for it."""
    asked = await asked_of(service, request, body, streams=body.stream, full_text=True)
    if body.stream:
        return await streamed(service, request, asked)
    return await whole(service, request, asked, as_list=True)


async def whole(service: Service, request: Request, asked: Asked, *, as_list: bool) -> Response:
    """Generate everything, then answer."""
    tickets = await service.submit(request, [asked.prepared])
    results = await service.results(request, tickets)
    tokenizer = service.needed_tokenizer

    def answer() -> Any:
        answers = [
            _answer(tokenizer, asked, ticket, events)
            for ticket, events in zip(tickets, results, strict=True)
        ]
        means = [sum(e.logprob for e in events) / len(events) for events in results]
        best = answers.pop(means.index(max(means)))
        text = best.pop("generated_text")
        found: dict[str, Any] = {"generated_text": text}
        if asked.has_details:
            found["details"] = best | ({"best_of_sequences": answers} if answers else {})
        return [found] if as_list else found

    headers = timing_headers(exchange_of(request), tickets, len(asked.inputs))
    return await service.answered(answer, num_scores(tickets), headers)


def _answer(
    tokenizer: Tokenizer, asked: Asked, ticket: Ticket, events: Sequence[TokenEvent]
) -> dict[str, Any]:
    text = "".join(event.text for event in events)
    found: dict[str, Any] = {
        "generated_text": asked.inputs + text if asked.returns_full_text else text,
        "finish_reason": events[-1].finish_reason,
        "generated_tokens": len(events),
        "seed": _seed(ticket),
        "prefill": _prefill(tokenizer, ticket) if asked.prepared.scored is not None else [],
        "tokens": [token_of(tokenizer, event) for event in events],
    }
    if asked.parameters.top_n_tokens:
        found["top_tokens"] = [_top(tokenizer, event.top_logprobs) for event in events]
    return found


def _seed(ticket: Ticket) -> int | None:
    sequence = ticket.request.sequence
    return sequence.seed if sequence.params.temperature else None


def _prefill(tokenizer: Tokenizer, ticket: Ticket) -> list[dict[str, Any]]:
    ids = ticket.request.sequence.prompt_ids
    logprobs = [None, *(score.logprob for score in ticket.prompt_scores)]
    return [
        {"id": token, "text": text_of(tokenizer, token), "logprob": logprob}
        for token, logprob in zip(ids, logprobs[: len(ids)], strict=True)
    ]


def token_of(tokenizer: Tokenizer, event: TokenEvent) -> dict[str, Any]:
    """Return a generated token; the texts of tokens that are not special form the answer."""
    special = event.token_id in tokenizer.special_token_ids
    return {
        "id": event.token_id,
        "text": text_of(tokenizer, event.token_id) if special else event.text,
        "logprob": event.logprob,
        "special": special,
    }


def _top(tokenizer: Tokenizer, found: Ranked) -> list[dict[str, Any]]:
    return [
        {
            "id": token,
            "text": text_of(tokenizer, token),
            "logprob": logprob,
            "special": token in tokenizer.special_token_ids,
        }
        for token, logprob in found
    ]


async def streamed(service: Service, request: Request, asked: Asked) -> Response:
    """Answer with server-sent events, without the [DONE] of other protocols."""
    tickets = await service.submit(request, [asked.prepared])
    return service.stream(
        request,
        tickets,
        _events(service.needed_tokenizer, asked, tickets[0]),
        failed=lambda error: [as_event(dumps(flat_body(error)))],
        headers=stream_headers(len(asked.inputs)),
    )


async def _events(tokenizer: Tokenizer, asked: Asked, ticket: Ticket) -> AsyncGenerator[str, None]:
    text, index, reason = "", 0, None
    async for event in ticket:
        text, index, reason = text + event.text, index + 1, event.finish_reason
        found: dict[str, Any] = {"index": index, "token": token_of(tokenizer, event)}
        if asked.parameters.top_n_tokens:
            found["top_tokens"] = _top(tokenizer, event.top_logprobs)
        found |= {"generated_text": None, "details": None}
        if reason is not None:
            found["generated_text"] = asked.inputs + text if asked.returns_full_text else text
            if asked.parameters.details:
                found["details"] = {
                    "finish_reason": reason,
                    "generated_tokens": index,
                    "seed": _seed(ticket),
                    "input_length": len(asked.prepared.prompt_ids),
                }
        yield as_event(dumps(found))
    if reason is None:
        raise UNFINISHED


async def vertex(service: Service, request: Request, body: VertexRequest) -> Response:
    """Answer several prompts at once, as Vertex AI asks; only lengths and seeds are looked at."""
    prepared: list[Prepared] = []
    if len(body.instances) > service.options.max_client_batch_size:
        raise batch_too_large(service)
    for instance in body.instances:
        given = instance.get("parameters") if isinstance(instance.get("parameters"), dict) else {}
        chosen = {key: (given or {}).get(key) for key in ("max_new_tokens", "seed")}
        if "messages" in instance:
            chat = validated({"messages": instance["messages"]}, ChatRequest)
            talk = await service.aside(conversation_of, service.needed_tokenizer, chat)
            prompt = talk.text
        else:
            prompt = instance.get("inputs", "")
        if not isinstance(prompt, str):
            raise invalid("`inputs` must be a string", "instances")
        parsed = validated({"inputs": prompt, "parameters": chosen}, GenerateRequest)
        asked = await asked_of(service, request, parsed, streams=False, full_text=False)
        prepared.append(asked.prepared)
    tickets = await service.submit(request, prepared)
    results = await service.results(request, tickets)
    return Json({"predictions": ["".join(e.text for e in events) for events in results]})


_COMMON: dict[str, Any] = {
    "method": "POST",
    "needs_key": True,
    "needs_model": True,
    "needs_head": True,
    "statuses": (404, 424, 429, 500),
}
ROUTES = (
    Route(
        path="/",
        handler=compat_generate,
        summary="Generate tokens, as a list or, with stream, as server-sent events",
        body=CompatGenerateRequest,
        streams=True,
        **_COMMON,
    ),
    Route(
        path="/generate",
        handler=generate,
        summary="Generate tokens",
        body=GenerateRequest,
        answer=GenerateResponse,
        **_COMMON,
    ),
    Route(
        path="/generate_stream",
        handler=generate_stream,
        summary="Generate tokens and send each as it comes",
        body=GenerateRequest,
        content_type="text/event-stream",
        streams=True,
        **_COMMON,
    ),
    Route(
        path="/vertex",
        handler=vertex,
        summary="Answer prompts as Vertex AI sends them",
        body=VertexRequest,
        **_COMMON,
    ),
)
