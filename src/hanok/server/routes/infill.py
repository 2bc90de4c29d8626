"""llama.cpp's /infill, with which editors fill in text at the cursor, given the text on both sides.

Its options have llama.cpp's names and defaults. `samplers` is ignored, since the processors have a fixed
order here, and so are its time limits.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from hanok.engine.sequence import TokenEvent
from hanok.engine.ticket import Ticket
from hanok.server.constraints import constraint_of
from hanok.server.errors import flat_body, invalid
from hanok.server.openai_models import CompletionRequest
from hanok.server.openai_sampling import check, check_model, sampling_options
from hanok.server.prompts import end_with, gapped
from hanok.server.route import Route
from hanok.server.service import Prepared, Service
from hanok.server.submission import check_prompt
from hanok.server.tgi_models import Body, NullFalse
from hanok.server.times import stream_headers, timing_headers
from hanok.server.web import Json, as_event, dumps, exchange_of, note_parameters, validated

DEFAULTS: Mapping[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
NOT_HERE: Mapping[str, Any] = {
    "add_special_tokens": None,
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "n": 1,
    "prompt_logprobs": None,
    "suffix": None,
    "truncate_prompt_tokens": None,
}
"""Options of /v1/completions that /infill lacks, with the values that ask for nothing."""


class InfillFile(Body):
    """A file, or a part of one, that the model should know."""

    filename: str | None = None
    text: str


class InfillRequest(Body):
    """The body of /infill; further fields are those of /v1/completions."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[InfillFile], Field(fail_fast=True, max_length=1000)] | None = None
    prompt: str | None = None
    """How the text in the gap begins; it is not part of the answer."""
    n_predict: Annotated[int, Field(ge=-1)] | None = None
    """-1: as many as fit; 0: only the prompt is computed, and cached for the next request."""
    seed: Annotated[int, Field(ge=-1, lt=2**64)] | None = None
    """-1: another one each time."""
    repeat_penalty: Annotated[float, Field(gt=0)] | None = None
    stream: NullFalse = False
    response_fields: Annotated[list[str], Field(fail_fast=True, max_length=100)] | None = None
    """Only these are answered; "a/b" is the field b of the field a."""


class InfillAnswer(BaseModel):
    """The answer of /infill."""

    index: int
    content: str
    stop: bool
    stop_type: str
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: bool
    has_new_line: bool
    timings: dict[str, float]


async def infill(service: Service, request: Request, body: InfillRequest) -> Response:
    """Answer with the text between two others."""
    asked = _completion_of(body)
    check(asked, service.options)
    check_model(asked.model, service)
    markers = service.needed_infill
    prompt_ids = await gapped(
        service,
        markers,
        body.input_prefix,
        body.input_suffix,
        most=None,
        files=[(file.filename or "", file.text) for file in body.input_extra or ()],
        middle=body.prompt or "",
    )
    room = check_prompt(service, prompt_ids, None, "prompt")
    wanted = asked.max_tokens if body.n_predict is None else body.n_predict
    most = room if wanted is None or wanted < 0 else max(1, min(wanted, room))
    sampling = sampling_options(asked, service.needed_model.defaults, most)
    end_with(sampling, markers)
    note_parameters(request, sampling)
    prepared = Prepared(
        prompt_ids=prompt_ids,
        options=sampling,
        grammar=constraint_of(asked),
        timeout_s=asked.timeout,
        priority=asked.priority or 0,
        salt=asked.cache_salt,
    )
    tickets = await service.submit(request, [prepared])
    num_characters = len(body.input_prefix) + len(body.input_suffix)
    if body.stream:
        return _streamed(service, request, body, tickets, num_characters)
    events = (await service.results(request, tickets))[0]
    answer = _chosen(_answer(service, body, tickets[0], events), body.response_fields)
    headers = timing_headers(exchange_of(request), tickets, num_characters)
    return Json(answer, headers=headers)


def _completion_of(body: InfillRequest) -> CompletionRequest:
    """Return the options of a body as those of a completion."""
    given = {**DEFAULTS, **(body.model_extra or {})}
    for name, nothing in NOT_HERE.items():
        if given.pop(name, None) not in (None, nothing):
            raise invalid(f"`{name}` is not supported by /infill: leave it out", name)
    for name, default in DEFAULTS.items():
        given[name] = default if given[name] is None else given[name]
    if isinstance(given["temperature"], int | float) and given["temperature"] < 0:
        given["temperature"] = 0
    if isinstance(given["top_k"], int) and given["top_k"] < 0:
        given["top_k"] = 0
    given["seed"] = None if body.seed == -1 else body.seed
    given["repetition_penalty"] = body.repeat_penalty
    return validated({**given, "prompt": "", "stream": body.stream}, CompletionRequest)


def _answer(
    service: Service, body: InfillRequest, ticket: Ticket, events: Sequence[TokenEvent]
) -> dict[str, Any]:
    """Return the whole answer; `events` are all of its tokens."""
    if body.n_predict == 0:
        events = []
    text = "".join(event.text for event in events)
    times, number = ticket.times, len(ticket.request.sequence.prompt_ids)
    begun = times.begun or times.submitted
    first = times.first_token or begun
    prompt_ms, predicted_ms = 1000 * (first - begun), 1000 * ((times.finished or first) - first)
    return {
        "index": 0,
        "content": text,
        "stop": True,
        "stop_type": _stop_type(service, events),
        "model": service.options.model_id,
        "tokens_predicted": len(events),
        "tokens_evaluated": number,
        "tokens_cached": ticket.num_cached_tokens,
        "truncated": False,
        "has_new_line": "\n" in text,
        "timings": {
            "prompt_n": number - ticket.num_cached_tokens,
            "prompt_ms": prompt_ms,
            "predicted_n": len(events),
            "predicted_ms": predicted_ms,
        },
    }


def _stop_type(service: Service, events: Sequence[TokenEvent]) -> str:
    """Return why a text ended: "eos" also for a marker, however it was recognized."""
    if not events or events[-1].finish_reason == "length":
        return "limit"
    is_marker = events[-1].token_id in service.needed_infill.end_ids
    return "eos" if is_marker or events[-1].finish_reason == "eos_token" else "word"


def _chosen(answer: Mapping[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
    """Return the requested fields of an answer, under the names by which they were requested."""
    found: dict[str, Any] = {}
    for path in answer if fields is None else fields:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found[path] = value
    return found


def _streamed(
    service: Service,
    request: Request,
    body: InfillRequest,
    tickets: Sequence[Ticket],
    num_characters: int,
) -> Response:
    """Answer with server-sent events: pieces of the text, and with the last all other fields."""
    ticket = tickets[0]

    async def texts() -> AsyncGenerator[str, None]:
        events: list[TokenEvent] = []
        async for group in ticket.groups():
            events += group
            content = "" if body.n_predict == 0 else "".join(event.text for event in group)
            if content:
                yield as_event(dumps({"index": 0, "content": content, "stop": False}))
        last = _answer(service, body, ticket, events) | {"content": ""}
        yield as_event(dumps(_chosen(last, body.response_fields)))

    return service.stream(
        request,
        tickets,
        texts(),
        failed=lambda error: [as_event(dumps(flat_body(error)))],
        headers=stream_headers(num_characters),
    )


_COMMON: dict[str, Any] = {
    "needs_key": True,
    "needs_model": True,
    "needs_head": True,
    "streams": True,
}
ROUTES = (
    Route(
        method="POST",
        path="/infill",
        handler=infill,
        summary="The text in a gap of a text",
        body=InfillRequest,
        answer=InfillAnswer,
        statuses=(404, 424, 429, 500),
        **_COMMON,
    ),
)
