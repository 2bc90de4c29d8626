"""OpenAI's Responses: answers as lists of items. Nothing is stored."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.sequence import TokenEvent
from hanok.engine.ticket import Ticket
from hanok.server.answer import AnswerReader, Content, Event, Reads, Reasoning
from hanok.server.calls import CallArguments, CallBegun
from hanok.server.chat import conversation_of
from hanok.server.errors import ServerError
from hanok.server.logprobs import logprob_of
from hanok.server.openai_sampling import answering, check_model
from hanok.server.responses_input import chat_request, tells_logprobs
from hanok.server.responses_models import InputTokens, ResponseBody, ResponsesRequest, TextOptions
from hanok.server.route import Route
from hanok.server.service import Service
from hanok.server.submission import submitted
from hanok.server.times import stream_headers, timing_headers
from hanok.server.web import Json, as_event, dumps, exchange_of

WireEvents = list[dict[str, Any]]


async def create(service: Service, request: Request, body: ResponsesRequest) -> Response:
    """Answer a conversation with items."""
    talk, (ticket,) = await submitted(service, request, chat_request(body), place="input")
    writer = ResponseWriter(
        id=uuid.uuid5(uuid.NAMESPACE_OID, exchange_of(request).id).hex,
        model=answering(body.model, service),
        created_at=service.created_now(),
        body=body,
        reads=talk.reads,
        tokenizer=service.needed_tokenizer,
        ticket=ticket,
    )
    if body.stream:
        return service.stream(
            request,
            [ticket],
            _events(writer),
            failed=lambda error: map(_as_event, writer.failed(error)),
            headers=stream_headers(0),
        )
    (events,) = await service.results(request, [ticket])
    answer = writer.whole(events)
    return Json(answer, headers=timing_headers(exchange_of(request), [ticket], len(talk.text)))


async def _events(writer: "ResponseWriter") -> AsyncGenerator[str, None]:
    async for event in writer.stream():
        yield _as_event(event)


def _as_event(event: dict[str, Any]) -> str:
    return as_event(dumps(event), event["type"])


@dataclass(slots=True, kw_only=True)
class ResponseWriter:
    """Writes one answer, whole or in events; the whole one is what the events put together."""

    id: str
    """Without the prefix for the kind."""
    model: str
    created_at: int
    body: ResponsesRequest
    reads: Reads
    tokenizer: Tokenizer
    ticket: Ticket
    output: list[dict[str, Any]] = field(default_factory=list)
    """The items so far."""
    _is_open: bool = False
    """Whether the last of them is open."""
    _num_events: int = 0
    _num_reasoning_tokens: int = 0
    _unwritten: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Texts and log-probabilities of tokens that may belong to the message."""

    def whole(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Return a finished answer."""
        reader = AnswerReader(self.reads, is_whole=True)
        for event in events:
            self._read(event, reader)
        found: dict[str, Any] = self._ended(events[-1])[-1]["response"]
        return found

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of an answer as it arrives."""
        reader = AnswerReader(self.reads)
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))
        async for events in self.ticket.groups():
            for event in events:
                for found in self._read(event, reader):
                    yield found
                if event.finish_reason is not None:
                    for found in self._ended(event):
                        yield found

    def failed(self, error: ServerError) -> WireEvents:
        """Return the events that end a failed stream."""
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": str(error)}
        return [self._event("response.failed", response=response)]

    # From tokens to events

    def _read(self, token: TokenEvent, reader: AnswerReader) -> WireEvents:
        """Return the events that one token adds."""
        written: WireEvents = []
        if tells_logprobs(self.body):
            self._unwritten.append((token.text, logprob_of(self.tokenizer, token)))
        for event in reader.read([token]):
            written += self._add(event)
        self._num_reasoning_tokens = reader.num_reasoning_tokens
        return written

    def _add(self, event: Event) -> WireEvents:
        if isinstance(event, Content):
            begun = self._item("message")
            # An item of its own needs no space between it and the one before.
            text = event.text.lstrip() if begun and len(self.output) > 1 else event.text
            return [*begun, self._text_delta(text)]
        self._unwritten.clear()
        if isinstance(event, Reasoning):
            return [*self._item("reasoning"), self._text_delta(event.text)]
        if isinstance(event, CallBegun):
            call = {"call_id": event.id, "name": event.name, "arguments": ""}
            return [*self._close("completed"), self._begin("function_call", call)]
        if isinstance(event, CallArguments):
            self.output[-1]["arguments"] += event.text
            return [self._of_item("response.function_call_arguments.delta", delta=event.text)]
        return self._close("completed" if event.is_whole else "incomplete")

    def _ended(self, last: TokenEvent) -> WireEvents:
        """Return the events after the last token."""
        is_cut = last.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        written = [] if self.output else self._item("message")  # an empty answer has the text ""
        written += self._close(status)
        response = self._response(status)
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        return [*written, self._event(f"response.{status}", response=response)]

    # Items

    def _item(self, kind: str) -> WireEvents:
        """Continue an item that has text, or begin one."""
        if self._is_open and self.output[-1]["type"] == kind:
            return []
        written = self._close("completed")
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            written.append(self._begin(kind, {"summary": [], "content": []}))
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            written.append(self._begin(kind, {"role": "assistant", "content": []}))
        self.output[-1]["content"].append(part)
        return [*written, self._of_part("response.content_part.added", part={**part})]

    def _begin(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = {
            "id": f"{prefix}_{self.id}{len(self.output):02}",
            "type": kind,
            "status": "in_progress",
            **fields,
        }
        self.output.append(item)
        self._is_open = True
        return self._event(
            "response.output_item.added", output_index=len(self.output) - 1, item=_copied(item)
        )

    def _text_delta(self, text: str) -> dict[str, Any]:
        part = self.output[-1]["content"][-1]
        part["text"] += text
        name = f"response.{part['type']}.delta"
        if "logprobs" not in part:
            return self._of_part(name, delta=text)
        logprobs = self._logprobs(len(text))
        part["logprobs"] = [
            *part["logprobs"],
            *logprobs,
        ]  # events that were written hold the old one
        return self._of_part(name, delta=text, logprobs=logprobs)

    def _logprobs(self, num_characters: int) -> list[dict[str, Any]]:
        """Return the tokens that wrote the last characters, without markers before them."""
        held = self._unwritten
        total = sum(len(text) for text, _ in held)
        while held and held[0][0] and total - len(held[0][0]) >= num_characters:
            total -= len(held.pop(0)[0])
        found = [logprob for _, logprob in held]
        held.clear()
        return found

    def _close(self, status: str) -> WireEvents:
        """End the open item."""
        if not self._is_open:
            return []
        self._is_open = False
        item, written = self.output[-1], []
        item["status"] = status
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            written.append(self._of_item("response.function_call_arguments.done", **told))
        else:
            (part,) = item["content"]
            told = {name: part[name] for name in ("text", "logprobs") if name in part}
            written.append(self._of_part(f"response.{part['type']}.done", **told))
            written.append(self._of_part("response.content_part.done", part={**part}))
        index = len(self.output) - 1
        return [
            *written,
            self._event("response.output_item.done", output_index=index, item=_copied(item)),
        ]

    # Events

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        found = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return found

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        index = len(self.output) - 1
        return self._event(kind, item_id=self.output[-1]["id"], output_index=index, **fields)

    def _of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._of_item(kind, content_index=0, **fields)

    # The answer

    def _response(self, status: str) -> dict[str, Any]:
        """Return the current answer."""
        body, params = self.body, self.ticket.request.sequence.params
        is_ended = status in ("completed", "incomplete")
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": [_copied(item) for item in self.output],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": body.reasoning.model_dump() if body.reasoning else {},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature if body.temperature is None else body.temperature,
            "text": _text_options(body.text),
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_ended else None,
            "user": body.user,
        }

    def _usage(self) -> dict[str, Any]:
        sequence = self.ticket.request.sequence
        prompt, generated = len(sequence.prompt_ids), len(sequence.generated_ids)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": self.ticket.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": prompt + generated,
        }


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item in its current state."""
    if "content" not in item:
        return {**item}
    return {**item, "content": [{**part} for part in item["content"]]}


def _text_options(given: TextOptions | None) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "text"}
    if given is not None and given.format is not None:
        described = given.format.model_dump(by_alias=True, exclude_none=True)
    return {"format": described, "verbosity": "medium"}


async def count_tokens(service: Service, request: Request, body: ResponsesRequest) -> Response:
    """Answer with how many tokens a conversation is."""
    check_model(body.model, service)
    asked = chat_request(body)
    talk = await service.aside(conversation_of, service.needed_tokenizer, asked)
    return Json(InputTokens(input_tokens=len(talk.prompt_ids)).model_dump())


async def not_stored(service: Service, request: Request, body: None) -> Response:
    """Say that there is no answer of an earlier request, of any id."""
    found = request.path_params["response_id"]
    raise ServerError(
        f"there is no response {found!r}: answers are not stored here. Keep what "
        "POST /v1/responses answers, and send the whole conversation as `input`",
        kind="not_found",
        status=404,
    )


_OF_ONE = "/v1/responses/{response_id}"
_COMMON: dict[str, Any] = {
    "method": "POST",
    "body": ResponsesRequest,
    "needs_key": True,
    "needs_model": True,
    "statuses": (404, 424, 429, 500),
}
ROUTES = (
    Route(
        path="/v1/responses",
        handler=create,
        summary="Answer a conversation with items",
        answer=ResponseBody,
        needs_head=True,
        streams=True,
        **_COMMON,
    ),
    Route(
        path="/v1/responses/input_tokens",
        handler=count_tokens,
        summary="How many tokens a conversation in items is",
        answer=InputTokens,
        **_COMMON,
    ),
    *(
        Route(
            method=method,
            path=path,
            handler=not_stored,
            summary=f"No response is stored: {what}",
            needs_key=True,
            statuses=(404,),
        )
        for method, path, what in (
            ("GET", _OF_ONE, "there is none to get"),
            ("DELETE", _OF_ONE, "there is none to delete"),
            ("POST", f"{_OF_ONE}/cancel", "there is none to cancel"),
            ("GET", f"{_OF_ONE}/input_items", "there is none whose input could be listed"),
        )
    ),
)
