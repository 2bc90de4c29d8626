"""OpenAI's completions, and the names under which the model can be asked."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hanok.checkpoint.infill import Infill
from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.sequence import Ranked, TokenEvent
from hanok.engine.ticket import Ticket
from hanok.server.constraints import constraint_of
from hanok.server.errors import invalid
from hanok.server.logprobs import num_scores, prompt_logprobs_of, text_of
from hanok.server.openai_answer import REASONS, head_of, stream, usage_of
from hanok.server.openai_models import (
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
)
from hanok.server.openai_sampling import (
    check,
    check_model,
    sampling_options,
    unknown_model,
)
from hanok.server.prompts import end_with, gapped, prompts_of
from hanok.server.route import Route
from hanok.server.service import Prepared, Service
from hanok.server.submission import check_prompt, fitting, truncated
from hanok.server.times import timing_headers
from hanok.server.web import Json, exchange_of, note_parameters

DEFAULT_COMPLETION_TOKENS = 16


async def completions(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Complete prompts."""
    options = service.options
    check(body, options)
    adapter = check_model(body.model, service)
    infill = infill_of(service, body)
    given = prompts_of(service, body)
    count = body.n or 1
    best_of = body.best_of or count
    if not count <= best_of <= options.max_choices:
        raise invalid(
            f"`best_of` must be >= `n` and <= {options.max_choices}. Given: {best_of}", "best_of"
        )
    if best_of > count and body.stream:
        raise invalid("`best_of` > `n` is not supported when streaming tokens", "best_of")
    most = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise invalid("`max_tokens` must be >= 1 without `echo`", "max_tokens")
    prepared, shown = [], []
    for prompt in given:
        whole = await encoded(service, body, prompt, max(1, most), infill)
        ids = truncated(service, whole, body.truncate_prompt_tokens, max(1, most))
        shown.append(prompt if len(ids) == len(whole) else ids)
        check_prompt(service, ids, max(1, most), "prompt")
        sampling = sampling_options(body, service.needed_model.defaults, max(1, most))
        sampling["top_logprobs"] = body.logprobs or 0
        if infill is not None:
            end_with(sampling, infill)
        prepared.append(
            Prepared(
                prompt_ids=ids,
                options=sampling,
                count=best_of,
                grammar=constraint_of(body),
                scored=_scored(body),
                timeout_s=body.timeout,
                priority=body.priority or 0,
                salt=body.cache_salt,
                adapter=adapter,
            )
        )
    note_parameters(request, prepared[0].options)
    tickets = await service.submit(request, prepared)
    head = head_of(service, request, "text_completion", "cmpl", body.model)
    writers = [
        CompletionWriter(
            body=body,
            tokenizer=service.needed_model.tokenizer,
            ticket=ticket,
            prompt=shown[index // best_of],
            most=most,
        )
        for index, ticket in enumerate(tickets)
    ]

    def usage() -> dict[str, Any]:
        return usage_of(tickets, len(given), is_answered=most > 0)

    if body.stream:
        parts = [writer.stream(index) for index, writer in enumerate(writers)]
        return stream(service, request, body, head, parts, tickets, usage)
    results = await service.results(request, tickets)

    def answer() -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for start in range(0, len(tickets), best_of):
            group: Sequence[int] = range(start, start + best_of)
            if best_of > count:
                group = sorted(group, key=lambda i: -_mean(results[i]))[:count]
            for index in group:
                choices.append(writers[index].whole(len(choices), results[index]))
        return head.fields() | {"choices": choices, "usage": usage()}

    headers = timing_headers(exchange_of(request), tickets, _num_characters(given))
    return await service.answered(answer, num_scores(tickets), headers)


def infill_of(service: Service, body: CompletionRequest) -> Infill | None:
    """Return what writes a prompt with its `suffix`; None without one.

    Raises ServerError if the tokenizer has no markers for it, and for options without a meaning for a
    prompt that is not in the order of its text.
    """
    if not body.suffix:
        return None
    given = {
        "echo": body.echo or None,
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
        "add_special_tokens": body.add_special_tokens,
    }
    for name, value in given.items():
        if value is not None:
            raise invalid(f"`{name}` cannot be given together with `suffix`", name)
    return service.needed_infill


async def encoded(
    service: Service,
    body: CompletionRequest,
    prompt: str | list[int],
    most: int,
    infill: Infill | None = None,
) -> list[int]:
    """Return the tokens of one of a body's prompts, of which `most` are to be generated.

    With `infill` they are those of a text with a gap, before the body's suffix.
    """
    if infill is not None:
        return await gapped(service, infill, prompt, body.suffix or "", most=most)
    if not isinstance(prompt, str):
        return prompt
    is_cut = body.truncate_prompt_tokens is not None
    check_length = None if is_cut else fitting(service, most, "prompt")
    adds = body.add_special_tokens is not False
    return await service.encoded(prompt, check_length, add_special_tokens=adds)


def _scored(body: CompletionRequest) -> int | None:
    """Return how many likeliest tokens each prompt token is scored with; None: no scores."""
    wanted = (body.logprobs if body.echo else None, body.prompt_logprobs)
    return max((number for number in wanted if number is not None), default=None)


def _mean(events: Sequence[TokenEvent]) -> float:
    return sum(event.logprob for event in events) / len(events)


def _num_characters(prompts: Sequence[str | list[int]]) -> int:
    return sum(len(prompt) for prompt in prompts if isinstance(prompt, str))


@dataclass(slots=True, kw_only=True)
class CompletionWriter:
    """Writes one completion, whole or in chunks."""

    body: CompletionRequest
    tokenizer: Tokenizer | None
    ticket: Ticket
    prompt: str | list[int]
    most: int
    """Tokens requested; 0 if only the prompt is to be returned."""
    offset: int = 0
    """Characters written."""

    def whole(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Return the choice of a finished completion."""
        parts = [self._echo()] if self.body.echo else []
        if self.most:
            parts += [self._part([event]) for event in events]
        logprobs = None
        if self.body.logprobs is not None:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [x for part in parts for x in part[1][name]] for name in names}
        reason = REASONS[events[-1].finish_reason or "length"] if self.most else "length"
        text = "".join(part[0] for part in parts)
        found = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        number = self.body.prompt_logprobs
        if number is not None:
            found["prompt_logprobs"] = prompt_logprobs_of(self.tokenizer, self.ticket, number)
        return found

    async def stream(self, index: int) -> AsyncIterator[dict[str, Any]]:
        """Yield the choice's chunks."""
        is_first = True
        async for events in self.ticket.groups():
            is_echoed = is_first and self.body.echo
            parts = [await asyncio.to_thread(self._echo)] if is_echoed else []
            is_first = False
            if self.most:
                parts += [self._part([event]) for event in events]
            reason = events[-1].finish_reason
            for number, (text, logprobs) in enumerate(parts):
                is_last = number == len(parts) - 1
                yield {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs if self.body.logprobs is not None else None,
                    "finish_reason": REASONS[reason] if reason and is_last else None,
                }

    def _echo(self) -> tuple[str, dict[str, Any]]:
        """Return the prompt as the beginning of the text, with its scores."""
        ids = self.ticket.request.sequence.prompt_ids
        if isinstance(self.prompt, str):
            text = self.prompt
        else:
            text = self.tokenizer.decode(ids) if self.tokenizer else ""
        scores, most = self.ticket.prompt_scores, self.body.logprobs or 0
        stream = self.tokenizer.stream() if self.tokenizer else None
        shown = [stream.push(token) if stream else "" for token in ids]
        logprobs = {
            "tokens": [self._text(token) for token in ids],
            "token_logprobs": [None, *(score.logprob for score in scores)],
            "top_logprobs": [
                None,
                *(self._top(s.top_logprobs[:most], s.token_id, s.logprob) for s in scores),
            ],
            "text_offset": _offsets(shown, len(text)),
        }
        self.offset = len(text)
        return text, logprobs

    def _part(self, events: Sequence[TokenEvent]) -> tuple[str, dict[str, Any]]:
        offsets = []
        for event in events:
            offsets.append(self.offset)
            self.offset += len(event.text)
        return "".join(event.text for event in events), {
            "tokens": [self._text(event.token_id) for event in events],
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [self._top(e.top_logprobs, e.token_id, e.logprob) for e in events],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        """Return a token's text; of a part of a character, which has none, its bytes as OpenAI does."""
        if self.tokenizer is None:
            return f"token_id:{token}"
        text, data = text_of(self.tokenizer, token), self.tokenizer.token_bytes(token)
        is_part = bool(data) and text.encode() != data
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if is_part else text

    def _top(self, found: Ranked, token: int, logprob: float) -> dict[str, float]:
        """Return the likeliest texts, the chosen one among them."""
        table: dict[str, float] = {}
        for other, value in (*found, (token, logprob)):
            table.setdefault(self._text(other), value)
        return table


def _offsets(texts: Sequence[str], total: int) -> list[int]:
    offsets, at = [], 0
    for text in texts:
        offsets.append(min(at, total))
        at += len(text)
    return offsets


async def models(service: Service, request: Request, body: None) -> Response:
    """Answer with the one model there is, under each of its names."""
    names = (*service.options.model_names, *service.adapter_names)
    cards = [card_of(service, name) for name in names]
    return Json({"object": "list", "data": cards})


async def model(service: Service, request: Request, body: None) -> Response:
    """Answer with the model of a name, which may have slashes."""
    name = request.path_params["model"]
    if name not in (*service.options.model_names, *service.adapter_names):
        raise unknown_model(name, service)
    return Json(card_of(service, name))


def card_of(service: Service, name: str) -> dict[str, Any]:
    """Return what /v1/models says of the model under one of its names."""
    is_adapter = name in service.adapter_names
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": service.options.model_id,
        **({"parent": service.options.model_id} if is_adapter else {}),
        "max_model_len": None if service.engine is None else service.max_total_tokens,
    }


ROUTES = (
    Route(
        method="POST",
        path="/v1/completions",
        handler=completions,
        summary="Complete prompts",
        body=CompletionRequest,
        answer=Completion,
        needs_key=True,
        needs_model=True,
        needs_head=True,
        streams=True,
        statuses=(404, 424, 429, 500),
    ),
    Route(
        method="GET",
        path="/v1/models",
        handler=models,
        summary="The models that can be asked",
        answer=ModelList,
    ),
    Route(
        method="GET",
        path="/v1/models/{model:path}",
        handler=model,
        summary="A model that can be asked, by its name",
        answer=ModelCard,
        statuses=(404,),
    ),
)
