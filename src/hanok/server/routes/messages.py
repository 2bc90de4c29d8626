"""Anthropic's Messages: answers as lists of blocks."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from hanok.engine.sequence import TokenEvent
from hanok.engine.ticket import Ticket
from hanok.server.answer import AnswerReader, Content, Event, Reads, Reasoning
from hanok.server.calls import CallArguments, CallBegun
from hanok.server.chat import conversation_of
from hanok.server.errors import anthropic_body
from hanok.server.messages_input import chat_request
from hanok.server.messages_models import (
    CountTokensRequest,
    MessageBody,
    MessagesRequest,
    TokenCount,
)
from hanok.server.openai_sampling import answering, check_model
from hanok.server.route import Route
from hanok.server.service import Service
from hanok.server.submission import submitted
from hanok.server.times import stream_headers, timing_headers
from hanok.server.web import Json, as_event, dumps, exchange_of

WireEvents = list[dict[str, Any]]


def _as_event(event: dict[str, Any]) -> str:
    return as_event(dumps(event), event["type"])


PING = _as_event({"type": "ping"})
DELTAS = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}


async def messages(service: Service, request: Request, body: MessagesRequest) -> Response:
    """Answer a conversation with blocks."""
    talk, (ticket,) = await submitted(service, request, chat_request(body), is_shortened=True)
    writer = MessageWriter(
        id=f"msg_{uuid.uuid5(uuid.NAMESPACE_OID, exchange_of(request).id).hex}",
        model=answering(body.model, service),
        max_tokens=body.max_tokens,
        reads=talk.reads,
        ticket=ticket,
    )
    if body.stream:
        return service.stream(
            request,
            [ticket],
            _events(writer),
            failed=lambda error: [_as_event(anthropic_body(error))],
            headers=stream_headers(0),
            keep_alive=PING,
        )
    (events,) = await service.results(request, [ticket])
    answer = writer.whole(events)
    return Json(answer, headers=timing_headers(exchange_of(request), [ticket], len(talk.text)))


async def _events(writer: "MessageWriter") -> AsyncGenerator[str, None]:
    async for event in writer.stream():
        yield _as_event(event)


@dataclass(slots=True, kw_only=True)
class MessageWriter:
    """Writes one answer, whole or in events; the whole one is what the events put together."""

    id: str
    model: str
    max_tokens: int
    """As the request has it; the context may have room for fewer."""
    reads: Reads
    ticket: Ticket
    content: list[dict[str, Any]] = field(default_factory=list)
    """The blocks so far; the `input` of a tool_use is in `_arguments`."""
    _arguments: str = ""
    """JSON text of the last call."""
    _is_open: bool = False
    """Whether the last block is open."""
    _has_whole_call: bool = False
    _num_reasoning_tokens: int = 0

    def whole(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Return a finished answer."""
        reader = AnswerReader(self.reads, is_whole=True)
        for event in events:
            self._read(event, reader)
        self._close()
        return self._message() | self._stop(events[-1]) | {"usage": self._usage()}

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of an answer as it arrives.

        The first waits for the first token: only then is it known how much of the prompt was cached.
        """
        reader, has_begun = AnswerReader(self.reads), False
        async for events in self.ticket.groups():
            if not has_begun:
                start = {"stop_reason": None, "stop_sequence": None, "usage": self._usage(0)}
                yield {"type": "message_start", "message": self._message() | start}
                has_begun = True
            for event in events:
                for found in self._read(event, reader):
                    yield found
                if event.finish_reason is not None:
                    for found in self._close():
                        yield found
                    yield {
                        "type": "message_delta",
                        "delta": self._stop(event),
                        "usage": self._usage(),
                    }
                    yield {"type": "message_stop"}

    # From tokens to events

    def _read(self, token: TokenEvent, reader: AnswerReader) -> WireEvents:
        written: WireEvents = []
        for event in reader.read([token]):
            written += self._add(event)
        self._num_reasoning_tokens = reader.num_reasoning_tokens
        return written

    def _add(self, event: Event) -> WireEvents:
        if isinstance(event, Content):
            begun = self._block("text")
            # A block of its own needs no space between it and the one before.
            text = event.text.lstrip() if begun and len(self.content) > 1 else event.text
            return [*begun, self._text("text", text)]
        if isinstance(event, Reasoning):
            return [*self._block("thinking"), self._text("thinking", event.text)]
        if isinstance(event, CallBegun):
            self._arguments = ""
            block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
            return [*self._close(), self._begin(block)]
        if isinstance(event, CallArguments):
            self._arguments += event.text
            return [self._delta({"type": "input_json_delta", "partial_json": event.text})]
        self._has_whole_call = self._has_whole_call or event.is_whole
        return self._close()

    # Blocks

    def _block(self, kind: str) -> WireEvents:
        """Continue a block that has text, or begin one."""
        if self._is_open and self.content[-1]["type"] == kind:
            return []
        block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        return [*self._close(), self._begin(block)]

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self.content.append(block)
        self._is_open = True
        index = len(self.content) - 1
        return {"type": "content_block_start", "index": index, "content_block": {**block}}

    def _text(self, kind: str, text: str) -> dict[str, Any]:
        self.content[-1][kind] += text
        return self._delta({"type": DELTAS[kind], kind: text})

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}

    def _close(self) -> WireEvents:
        """End the open block. The input of a call that was cut off is what is certain of it."""
        if not self._is_open:
            return []
        self._is_open = False
        block, written = self.content[-1], []
        if block["type"] == "thinking":
            written.append(self._delta({"type": "signature_delta", "signature": ""}))
        elif block["type"] == "tool_use" and self._arguments:
            block["input"] = from_json(self._arguments, allow_partial=True)
        return [*written, {"type": "content_block_stop", "index": len(self.content) - 1}]

    # The message

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [*self.content],
        }

    def _stop(self, last: TokenEvent) -> dict[str, Any]:
        sequence = self.ticket.request.sequence
        found: str | None = None
        if last.finish_reason == "stop_sequence":
            reason, found = "stop_sequence", sequence.stops.reached
        elif last.finish_reason == "length":
            is_full = len(sequence.generated_ids) < self.max_tokens
            reason = "model_context_window_exceeded" if is_full else "max_tokens"
        else:
            reason = "tool_use" if self._has_whole_call else "end_turn"
        return {"stop_reason": reason, "stop_sequence": found}

    def _usage(self, num_output: int | None = None) -> dict[str, Any]:
        """Return the tokens counted; Anthropic's `input_tokens` are those that were not cached."""
        sequence, cached = self.ticket.request.sequence, self.ticket.num_cached_tokens
        generated = len(sequence.generated_ids) if num_output is None else num_output
        return {
            "input_tokens": len(sequence.prompt_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated,
            "output_tokens_details": {"thinking_tokens": self._num_reasoning_tokens},
        }


async def count_tokens(service: Service, request: Request, body: CountTokensRequest) -> Response:
    """Answer with how many tokens a conversation is."""
    check_model(body.model, service)
    asked = chat_request(body)
    talk = await service.aside(conversation_of, service.needed_tokenizer, asked)
    return Json(TokenCount(input_tokens=len(talk.prompt_ids)).model_dump())


_COMMON: dict[str, Any] = {
    "method": "POST",
    "needs_key": True,
    "key_header": "x-api-key",
    "needs_model": True,
    "statuses": (404, 424, 429, 500),
}
ROUTES = (
    Route(
        path="/v1/messages",
        handler=messages,
        summary="Answer a conversation with blocks",
        body=MessagesRequest,
        answer=MessageBody,
        needs_head=True,
        streams=True,
        **_COMMON,
    ),
    Route(
        path="/v1/messages/count_tokens",
        handler=count_tokens,
        summary="How many tokens a conversation is",
        body=CountTokensRequest,
        answer=TokenCount,
        **_COMMON,
    ),
)
