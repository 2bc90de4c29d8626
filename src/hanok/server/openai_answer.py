"""Common parts of answers on OpenAI's routes: head, usage, and choices streamed as they arrive."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hanok.engine.ticket import Ticket
from hanok.package import __version__
from hanok.server.errors import openai_body
from hanok.server.openai_models import (
    CompletionRequest,
    Sampling,
)
from hanok.server.openai_sampling import answering
from hanok.server.service import Service
from hanok.server.times import stream_headers
from hanok.server.web import (
    AT_ONCE,
    as_event,
    dumps,
    dumps_in_parts,
    exchange_of,
)

REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
DONE = as_event("[DONE]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The fields of every chunk of an answer."""

    id: str
    object: str
    created: int
    model: str

    def fields(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"{__version__}-native",
        }


def head_of(service: Service, request: Request, kind: str, prefix: str, asked: str | None) -> Head:
    """Return the head of an answer; its id is the request's if that is a valid one.

    `asked` is the model that the request names.
    """
    return Head(
        id=f"{prefix}-{uuid.uuid5(uuid.NAMESPACE_OID, exchange_of(request).id).hex}",
        object=kind,
        created=service.created_now(),
        model=answering(asked, service),
    )


def usage_of(
    tickets: Sequence[Ticket],
    num_prompts: int,
    reasoning_tokens: int = 0,
    *,
    is_answered: bool = True,
) -> dict[str, Any]:
    """Return the tokens of a request; several answers to one prompt count it once.

    Not `is_answered`: only the prompt was requested, and the one generated token is not counted.
    """
    each = max(1, len(tickets) // num_prompts)
    firsts = tickets[::each]
    prompt = sum(len(ticket.request.sequence.prompt_ids) for ticket in firsts)
    answered = tickets if is_answered else ()
    generated = sum(len(ticket.request.sequence.generated_ids) for ticket in answered)
    guessed = [ticket.request.sequence.speculation for ticket in tickets]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(ticket.num_cached_tokens for ticket in firsts)
        },
        "completion_tokens_details": {
            **({"reasoning_tokens": reasoning_tokens} if reasoning_tokens else {}),
            "accepted_prediction_tokens": sum(counts.accepted for counts in guessed),
            "rejected_prediction_tokens": sum(
                counts.proposed - counts.accepted for counts in guessed
            ),
        },
    }


def stream(
    service: Service,
    request: Request,
    body: Sampling,
    head: Head,
    parts: Sequence[AsyncIterator[dict[str, Any]]],
    tickets: Sequence[Ticket],
    usage: Callable[[], dict[str, Any]],
) -> Response:
    """Answer with the chunks of all choices as they arrive, usage if requested, and [DONE].

    Completions that do not ask for usage get each choice's in its last chunk, as in TGI.
    """
    asked = body.stream_options

    async def events() -> AsyncGenerator[str, None]:
        common = head.fields()
        async with aclosing(merged(parts)) as chunks:
            async for choice in chunks:
                is_last = choice["finish_reason"] is not None
                own = None
                if asked is None and is_last and isinstance(body, CompletionRequest):
                    ticket = tickets[choice["index"]]
                    own = usage_of([ticket], 1, is_answered=body.max_tokens != 0)
                chunk = common | {"choices": [choice], "usage": own}
                # An echoed prompt may have as many scores as the context has tokens.
                is_long = len((choice["logprobs"] or {}).get("tokens", ())) > AT_ONCE
                texts = dumps_in_parts(chunk)
                yield as_event(await service.aside("".join, texts) if is_long else dumps(chunk))
        if asked is not None and asked.include_usage:
            yield as_event(dumps(common | {"choices": [], "usage": usage()}))
        yield DONE

    return service.stream(
        request,
        tickets,
        events(),
        failed=lambda error: [as_event(dumps(openai_body(error))), DONE],
        headers=stream_headers(0),
    )


async def merged(
    parts: Sequence[AsyncIterator[dict[str, Any]]],
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield from several iterators as items arrive. An exception of one ends all."""
    found: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def pump(part: AsyncIterator[dict[str, Any]]) -> None:
        try:
            async for item in part:
                found.put_nowait(item)
        finally:
            found.put_nowait(None)

    tasks = [asyncio.ensure_future(pump(part)) for part in parts]
    try:
        left = len(tasks)
        while left:
            item = await found.get()
            if item is not None:
                yield item
                continue
            left -= 1
            for task in tasks:
                if task.done():
                    task.result()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
