"""OpenAI's routes: completions, chat completions and the list of models."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hanok import __version__
from hanok.checkpoint.infill import Infill
from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.params import SamplingOptions
from hanok.engine.sequence import Ranked, TokenEvent
from hanok.engine.ticket import Ticket
from hanok.server.answer import Answer, AnswerReader, Content, Event, Reasoning
from hanok.server.calls import CallArguments, CallBegun
from hanok.server.chat import Conversation, conversation_of
from hanok.server.constraints import constraint_of
from hanok.server.errors import as_server_error, context_exceeded, invalid, openai_body
from hanok.server.openai_models import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
    Sampling,
)
from hanok.server.openai_sampling import (
    check,
    check_model,
    sampling_options,
    unknown_model,
)
from hanok.server.routes.tgi import batch_too_large, num_scores, text_of
from hanok.server.service import Prepared, Service, give_up
from hanok.server.times import stream_headers, timing_headers
from hanok.server.web import (
    AT_ONCE,
    EventStream,
    Json,
    Route,
    dumps,
    dumps_in_parts,
    exchange_of,
    note_parameters,
)

DEFAULT_COMPLETION_TOKENS = 16
REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
DONE = "[DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every chunk of an answer says."""

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


def head_of(service: Service, request: Request, kind: str, prefix: str) -> Head:
    """Return the head of an answer; its id is the request's own where that is one."""
    return Head(
        id=f"{prefix}-{uuid.uuid5(uuid.NAMESPACE_OID, exchange_of(request).id).hex}",
        object=kind,
        created=service.created_now(),
        model=service.options.model_id,
    )


def usage_of(
    tickets: Sequence[Ticket], num_prompts: int, reasoning_tokens: int = 0
) -> dict[str, Any]:
    """Return the tokens of a request; several answers to one prompt count it once."""
    each = max(1, len(tickets) // num_prompts)
    firsts = tickets[::each]
    prompt = sum(len(ticket.request.sequence.prompt_ids) for ticket in firsts)
    generated = sum(len(ticket.request.sequence.generated_ids) for ticket in tickets)
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


def prompts_of(service: Service, body: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a body, each a text or token ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("`prompt` cannot be empty", "prompt")
    if isinstance(given[0], int):
        return [list(given)]
    if len(given) > service.options.max_client_batch_size:
        raise batch_too_large(service)
    return list(given)


async def completions(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Complete prompts."""
    options = service.options
    check(body, options)
    check_model(body.model, options)
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
            )
        )
    note_parameters(request, prepared[0].options)
    tickets = await service.submit(request, prepared)
    head = head_of(service, request, "text_completion", "cmpl")
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
    if body.stream:
        parts = [writer.stream(index) for index, writer in enumerate(writers)]
        return stream(
            service, request, body, head, parts, tickets, lambda: usage_of(tickets, len(given))
        )
    results = await service.results(request, tickets)

    def answer() -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for start in range(0, len(tickets), best_of):
            group = range(start, start + best_of)
            if best_of > count:
                group = sorted(group, key=lambda i: -_mean(results[i]))[:count]  # type: ignore[assignment]
            choices += [writers[index].whole(len(choices), results[index]) for index in group]
        return head.fields() | {"choices": choices, "usage": usage_of(tickets, len(given))}

    headers = timing_headers(exchange_of(request), tickets, _num_characters(given))
    return await service.answered(answer, num_scores(tickets), headers)


def infill_of(service: Service, body: CompletionRequest) -> Infill | None:
    """Return what writes a prompt with its `suffix`; None where there is none.

    Raises ServerError where the tokenizer has no markers for it, and for options that a prompt in
    another order than its text leaves no meaning.
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
            raise invalid(f"`{name}` cannot be given beside `suffix`", name)
    return service.needed_infill


def end_with(sampling: SamplingOptions, infill: Infill) -> None:
    """Let a text in a gap end where its model writes a marker, which is no part of it."""
    sampling["stop_token_ids"] = [*sampling.get("stop_token_ids", ()), *infill.end_ids]
    sampling["stop"] = [*sampling.get("stop", ()), *infill.end_texts()]


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


async def gapped(
    service: Service,
    infill: Infill,
    prefix: str | list[int],
    suffix: str,
    *,
    most: int | None,
    files: Sequence[tuple[str, str]] = (),
    middle: str = "",
) -> list[int]:
    """Return the tokens of a text with a gap (see `Infill.encode`), in which `most` are to be generated.

    A text that cannot be served is refused before it is tokenized, as by `Service.encoded`.
    """

    def encode() -> list[int]:
        texts = [suffix, middle, *(part for file in files for part in file)]
        texts += [prefix] if isinstance(prefix, str) else []
        fitting(service, most, "prompt")(sum(map(service.needed_tokenizer.fewest_tokens, texts)))
        return infill.encode(prefix, suffix, files=files, middle=middle)

    return await service.aside(encode)


def truncated(service: Service, ids: list[int], kept: int | None, most: int) -> list[int]:
    """Return the last tokens of a prompt: `kept` of them, or with -1 what `most` leaves room for."""
    if kept is None:
        return ids
    if kept == -1:
        kept = min(service.max_input_tokens, max(1, service.max_total_tokens - most))
    return ids[-kept:] if kept else []


def check_prompt(service: Service, ids: Sequence[int], most: int | None, parameter: str) -> int:
    """Return how many tokens to generate at the most: `most`, or what there is room for.

    Raises ServerError for a prompt that is empty or too long. `parameter` is where it came from.
    """
    if not ids:
        raise invalid(f"`{parameter}` cannot be empty", parameter)
    return _room(service, len(ids), most, parameter)


def fitting(service: Service, most: int | None, parameter: str) -> Callable[[int], None]:
    """Return what raises ServerError for a prompt of at least so many tokens, if that is too long."""

    def check_length(fewest: int) -> None:
        if fewest > service.max_input_tokens:
            _room(service, fewest, most, parameter, are_counted=False)

    return check_length


def _room(
    service: Service, count: int, most: int | None, parameter: str, *, are_counted: bool = True
) -> int:
    max_input, max_total = service.max_input_tokens, service.max_total_tokens
    wanted = max(1, max_total - count) if most is None else most
    if count > max_input or count + wanted > max_total:
        raise context_exceeded(
            count,
            wanted,
            max_input=max_input,
            max_total=max_total,
            parameter=parameter,
            are_counted=are_counted,
        )
    return wanted


def _scored(body: CompletionRequest) -> int | None:
    """Return how many likeliest tokens the prompt is scored with; None: it is not."""
    wanted = (body.logprobs if body.echo else None, body.prompt_logprobs)
    return max((number for number in wanted if number is not None), default=None)


def prompt_logprobs_of(
    tokenizer: Tokenizer | None, ticket: Ticket, number: int
) -> list[dict[str, dict[str, Any]] | None]:
    """Return each prompt token's log-probability with those of the `number` likeliest, None first."""
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for score in ticket.prompt_scores:
        ranks = enumerate(score.top_logprobs[:number], 1)
        table = {token: (logprob, rank) for rank, (token, logprob) in ranks}
        table.setdefault(score.token_id, (score.logprob, score.rank))
        found.append(
            {
                str(token): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": text_of(tokenizer, token) if tokenizer else None,
                }
                for token, (logprob, rank) in table.items()
            }
        )
    return found[: len(ticket.request.sequence.prompt_ids)]


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
    """Tokens asked for; 0 where only the prompt is wanted back."""
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


async def submitted(
    service: Service, request: Request, body: ChatRequest
) -> tuple[Conversation, list[Ticket]]:
    """Queue the answers that a conversation asks for.

    Raises ServerError, with nothing queued, for a request that is not valid or does not fit.
    """
    options = service.options
    check(body, options)
    check_model(body.model, options)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
    wanted = body.max_completion_tokens or body.max_tokens
    is_cut = body.truncate_prompt_tokens is not None
    check_length = None if is_cut else fitting(service, wanted, "messages")
    talk = await service.aside(conversation_of, service.needed_tokenizer, body, check_length)
    prompt_ids = truncated(service, talk.prompt_ids, body.truncate_prompt_tokens, wanted or 1)
    most = check_prompt(service, prompt_ids, wanted, "messages")
    sampling = sampling_options(body, service.needed_model.defaults, most)
    sampling["top_logprobs"] = body.top_logprobs or 0
    sampling["spelled_token_ids"] = talk.spelled_token_ids
    prepared = Prepared(
        prompt_ids=prompt_ids,
        options=sampling,
        count=body.n or 1,
        grammar=talk.grammar,
        scored=body.prompt_logprobs,
        timeout_s=body.timeout,
        priority=body.priority or 0,
        salt=body.cache_salt,
    )
    note_parameters(request, sampling)
    return talk, await service.submit(request, [prepared])


async def chat_completions(service: Service, request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    talk, tickets = await submitted(service, request, body)
    head = head_of(service, request, "chat.completion", "chatcmpl")
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
        answer = Answer.of(self._events(events, AnswerReader(self.talk.reads, is_whole=True)))
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [call.body() for call in answer.calls]
        reason = REASONS[events[-1].finish_reason or "length"]
        logprobs = [self._logprob(event) for event in events] if self.body.logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else {"content": logprobs},
            "finish_reason": "tool_calls" if answer.calls and reason == "stop" else reason,
        }

    async def stream(self, index: int) -> AsyncIterator[dict[str, Any]]:
        """Yield the choice's chunks; the first says who speaks."""
        reader, has_calls = AnswerReader(self.talk.reads), False
        yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)
        async for events in self.ticket.groups():
            for event in events:
                found = [
                    delta
                    for item in self._events([event], reader)
                    if (delta := _delta(item)) is not None
                ]
                has_calls = has_calls or any("tool_calls" in delta for delta in found)
                logprobs = [self._logprob(event)] if self.body.logprobs else None
                if not found and logprobs:
                    found = [{"content": ""}]
                for number, delta in enumerate(found):
                    yield self._chunk(index, delta, logprobs if number == 0 else None, None)
                if event.finish_reason is not None:
                    reason = REASONS[event.finish_reason]
                    if has_calls and reason == "stop":
                        reason = "tool_calls"
                    yield self._chunk(index, {} if has_calls else {"content": ""}, None, reason)

    def _events(self, events: Sequence[TokenEvent], reader: AnswerReader) -> list[Event]:
        """Return what some tokens add to an answer."""
        found: list[Event] = []
        for event in events:
            found += reader.push(event.text)
            self.num_reasoning_tokens += reader.is_reasoning
            if event.finish_reason is not None:
                found += reader.finish()
        return found

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

    def _logprob(self, event: TokenEvent) -> dict[str, Any]:
        found = self._one(event.token_id, event.logprob)
        top = [self._one(token, logprob) for token, logprob in event.top_logprobs]
        return found | {"top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = text_of(self.tokenizer, token), self.tokenizer.token_bytes(token)
        # Null where no library tells what part of a character it is.
        shown = list(data) if data or not text else None
        return {"token": text, "logprob": logprob, "bytes": shown}


def _delta(event: Event) -> dict[str, Any] | None:
    """Return what a chunk says of an event; None of the end of a call, of which it says nothing."""
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


def stream(
    service: Service,
    request: Request,
    body: Sampling,
    head: Head,
    parts: Sequence[AsyncIterator[dict[str, Any]]],
    tickets: Sequence[Ticket],
    usage: Callable[[], dict[str, Any]],
) -> Response:
    """Answer with the chunks of all choices as they come, usage if asked for, and [DONE].

    Completions whose request says nothing of usage have each choice's in its last chunk, as TGI's do.
    """
    exchange, options = exchange_of(request), service.options
    asked = body.stream_options
    tells_each = asked is None and isinstance(body, CompletionRequest)

    async def events() -> AsyncGenerator[str, None]:
        common = head.fields()
        try:
            async with aclosing(merged(parts)) as chunks:
                async for choice in chunks:
                    is_last = choice["finish_reason"] is not None
                    own = None
                    if tells_each and is_last:
                        own = usage_of([tickets[choice["index"]]], 1)
                    chunk = common | {"choices": [choice], "usage": own}
                    # A prompt that is echoed may have as many scores as the context has tokens.
                    is_long = len((choice["logprobs"] or {}).get("tokens", ())) > AT_ONCE
                    texts = dumps_in_parts(chunk)
                    yield await service.aside("".join, texts) if is_long else dumps(chunk)
            if asked is not None and asked.include_usage:
                yield dumps(common | {"choices": [], "usage": usage()})
        except Exception as error:
            exchange.error = as_server_error(error)
            yield dumps(openai_body(exchange.error))
        yield DONE

    return EventStream(
        events(),
        lambda: give_up(tickets),
        keep_alive_s=options.keep_alive_s,
        write_timeout_s=options.write_timeout_s,
        headers=stream_headers(0),
    )


async def merged(
    parts: Sequence[AsyncIterator[dict[str, Any]]],
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield what several iterators yield, as it comes. What one raises ends all."""
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


async def models(service: Service, request: Request, body: None) -> Response:
    """Answer with the one model there is, under each of its names."""
    cards = [card_of(service, name) for name in service.options.model_names]
    return Json({"object": "list", "data": cards})


async def model(service: Service, request: Request, body: None) -> Response:
    """Answer with the model of a name, which may have slashes."""
    name = request.path_params["model"]
    if name not in service.options.model_names:
        raise unknown_model(name, service.options)
    return Json(card_of(service, name))


def card_of(service: Service, name: str) -> dict[str, Any]:
    """Return what /v1/models says of the model under one of its names."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": service.options.model_id,
        "max_model_len": None if service.engine is None else service.max_total_tokens,
    }


_COMMON: dict[str, Any] = {
    "method": "POST",
    "needs_key": True,
    "needs_model": True,
    "needs_head": True,
    "streams": True,
    "statuses": (404, 424, 429, 500),
}
ROUTES = (
    Route(
        path="/v1/completions",
        handler=completions,
        summary="Complete prompts",
        body=CompletionRequest,
        answer=Completion,
        **_COMMON,
    ),
    Route(
        path="/v1/chat/completions",
        handler=chat_completions,
        summary="Answer a conversation",
        body=ChatRequest,
        answer=ChatCompletion,
        **_COMMON,
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
