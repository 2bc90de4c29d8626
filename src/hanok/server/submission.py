"""Queues a conversation's answers, for every chat protocol."""

from collections.abc import Callable, Sequence

from starlette.requests import Request

from hanok.engine.ticket import Ticket
from hanok.server.chat import Conversation, conversation_of
from hanok.server.errors import context_exceeded, invalid
from hanok.server.openai_models import ChatRequest
from hanok.server.openai_sampling import check, check_model, sampling_options
from hanok.server.service import Prepared, Service
from hanok.server.web import note_parameters


async def submitted(
    service: Service,
    request: Request,
    body: ChatRequest,
    *,
    place: str = "messages",
    is_shortened: bool = False,
) -> tuple[Conversation, list[Ticket]]:
    """Queue the answers that a conversation asks for. `place` is its field in the body.

    With `is_shortened`, a requested length beyond the available room is reduced instead of refused.

    Raises ServerError, with nothing queued, for a request that is invalid or does not fit.
    """
    options = service.options
    check(body, options)
    adapter = check_model(body.model, service)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
    wanted = body.max_completion_tokens or body.max_tokens
    is_cut = body.truncate_prompt_tokens is not None
    check_length = None if is_cut else fitting(service, 1 if is_shortened else wanted, place)
    talk = await service.aside(conversation_of, service.needed_tokenizer, body, check_length)
    prompt_ids = truncated(service, talk.prompt_ids, body.truncate_prompt_tokens, wanted or 1)
    if is_shortened and wanted is not None:
        wanted = min(wanted, max(1, service.max_total_tokens - len(prompt_ids)))
    most = check_prompt(service, prompt_ids, wanted, place)
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
        adapter=adapter,
    )
    note_parameters(request, sampling)
    return talk, await service.submit(request, [prepared])


def truncated(service: Service, ids: list[int], kept: int | None, most: int) -> list[int]:
    """Return the last tokens of a prompt: `kept` of them, or with -1 what `most` leaves room for."""
    if kept is None:
        return ids
    if kept == -1:
        kept = min(service.max_input_tokens, max(1, service.max_total_tokens - most))
    return ids[-kept:] if kept else []


def check_prompt(service: Service, ids: Sequence[int], most: int | None, parameter: str) -> int:
    """Return how many tokens to generate at the most: `most`, or what there is room for.

    Raises ServerError for a prompt that is empty or too long. `parameter` is its field in the body.
    """
    if not ids:
        raise invalid(f"`{parameter}` cannot be empty", parameter)
    return _room(service, len(ids), most, parameter)


def fitting(service: Service, most: int | None, parameter: str) -> Callable[[int], None]:
    """Return a function that raises ServerError if a prompt of at least so many tokens is too long."""

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
