"""OpenAI's chat completions."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.sequence import TokenEvent
from hanok.engine.ticket import Ticket
from hanok.server.answer import Answer, AnswerReader, Content, Event, Reasoning
from hanok.server.calls import CallArguments, CallBegun
from hanok.server.chat import Conversation
from hanok.server.logprobs import logprob_of, num_scores, prompt_logprobs_of
from hanok.server.openai_answer import REASONS, head_of, stream, usage_of
from hanok.server.openai_models import (
    ChatCompletion,
    ChatRequest,
)
from hanok.server.route import Route
from hanok.server.service import Service
from hanok.server.submission import submitted
from hanok.server.times import timing_headers
from hanok.server.web import exchange_of


async def chat_completions(service: Service, request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    talk, tickets = await submitted(service, request, body)
    head = head_of(service, request, "chat.completion", "chatcmpl", body.model)
    writers = [
        ChatWriter(body=body, talk=talk, tokenizer=service.needed_tokenizer, ticket=ticket)
        for ticket in tickets
    ]

    def usage() -> dict[str, Any]:
        return usage_of(tickets, 1, sum(writer.num_reasoning_tokens for writer in writers))

    if body.stream:
        parts = [writer.stream(index) for index, writer in enumerate(writers)]
        head = replace(head, object="chat.completion.chunk")
        return stream(service, request, body, head, parts, tickets, usage)
    results = await service.results(request, tickets)

    def answer() -> dict[str, Any]:
        choices = [
            writer.whole(index, events)
            for index, (writer, events) in enumerate(zip(writers, results, strict=True))
        ]
        found = head.fields() | {"choices": choices, "usage": usage()}
        if body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs_of(
                service.needed_tokenizer, tickets[0], body.prompt_logprobs
            )
        return found

    headers = timing_headers(exchange_of(request), tickets, len(talk.text))
    return await service.answered(answer, num_scores(tickets), headers)


@dataclass(slots=True, kw_only=True)
class ChatWriter:
    """Writes one answer, whole or in chunks."""

    body: ChatRequest
    talk: Conversation
    tokenizer: Tokenizer
    ticket: Ticket
    num_reasoning_tokens: int = 0

    def whole(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Return the choice of a finished answer."""
        reader = AnswerReader(self.talk.reads, is_whole=True)
        answer = Answer.of(reader.read(events))
        self.num_reasoning_tokens = reader.num_reasoning_tokens
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [call.body() for call in answer.calls]
        reason = REASONS[events[-1].finish_reason or "length"]
        logprobs = None
        if self.body.logprobs:
            logprobs = [logprob_of(self.tokenizer, event) for event in events]
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else {"content": logprobs},
            "finish_reason": "tool_calls" if answer.calls and reason == "stop" else reason,
        }

    async def stream(self, index: int) -> AsyncIterator[dict[str, Any]]:
        """Yield the choice's chunks; the first has the role."""
        reader, has_calls = AnswerReader(self.talk.reads), False
        yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)
        async for events in self.ticket.groups():
            for event in events:
                found = [
                    delta for item in reader.read([event]) if (delta := _delta(item)) is not None
                ]
                self.num_reasoning_tokens = reader.num_reasoning_tokens
                has_calls = has_calls or any("tool_calls" in delta for delta in found)
                logprobs = [logprob_of(self.tokenizer, event)] if self.body.logprobs else None
                if not found and logprobs:
                    found = [{"content": ""}]
                for number, delta in enumerate(found):
                    yield self._chunk(index, delta, logprobs if number == 0 else None, None)
                if event.finish_reason is not None:
                    reason = REASONS[event.finish_reason]
                    if has_calls and reason == "stop":
                        reason = "tool_calls"
                    yield self._chunk(index, {} if has_calls else {"content": ""}, None, reason)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None,
        reason: str | None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": None if logprobs is None else {"content": logprobs},
            "finish_reason": reason,
        }


def _delta(event: Event) -> dict[str, Any] | None:
    """Return an event as a chunk; None for the end of a call, which has no chunk."""
    if isinstance(event, Content):
        return {"content": event.text}
    if isinstance(event, Reasoning):
        return {"reasoning_content": event.text}
    if isinstance(event, CallBegun):
        function = {"name": event.name, "arguments": ""}
        call = {"index": event.index, "id": event.id, "type": "function", "function": function}
        return {"tool_calls": [call]}
    if isinstance(event, CallArguments):
        call = {"index": event.index, "function": {"arguments": event.text}}
        return {"tool_calls": [call]}
    return None


ROUTES = (
    Route(
        path="/v1/chat/completions",
        handler=chat_completions,
        summary="Answer a conversation",
        body=ChatRequest,
        answer=ChatCompletion,
        method="POST",
        needs_key=True,
        needs_model=True,
        needs_head=True,
        streams=True,
        statuses=(404, 424, 429, 500),
    ),
)
