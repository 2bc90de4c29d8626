"""Shared by all routes: the model, admission control, and how a request becomes tickets."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hanok.checkpoint.infill import Infill, find_infill
from hanok.checkpoint.pooling import Pooling, choose_pooling
from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.engine import Engine
from hanok.engine.grammar import GrammarCompiler
from hanok.engine.grammar_spec import GrammarSpec
from hanok.engine.model import Model
from hanok.engine.params import SamplingOptions, seed_of_answer
from hanok.engine.sequence import GenerationSequence, TokenEvent
from hanok.engine.ticket import Request as EngineRequest
from hanok.engine.ticket import Ticket
from hanok.errors import CheckpointError, UnsupportedError
from hanok.server.errors import ServerError, as_server_error, invalid, overloaded
from hanok.server.log import log_request
from hanok.server.metrics import Metrics, RequestRecord
from hanok.server.options import ServerOptions
from hanok.server.web import (
    AT_ONCE,
    COMMENT,
    EventStream,
    Exchange,
    Json,
    dumps_in_parts,
    exchange_of,
    until_gone,
)

if TYPE_CHECKING:
    from hanok.server.metrics import Outcome

LOG = logging.getLogger("hanok.server")
State = Literal["loading", "ready", "draining", "failed"]
P = ParamSpec("P")
T = TypeVar("T")
OUTCOMES: dict[str, "Outcome"] = {
    "overloaded": "overloaded",
    "generation": "generation",
    "dropped": "dropped",
    "template_error": "template",
    "timeout": "incomplete",
    "internal": "generation",
}
"""TGI's failure reasons by our kinds; any other is a failed validation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One prompt, ready to be generated `count` times."""

    prompt_ids: list[int]
    options: SamplingOptions
    count: int = 1
    grammar: GrammarSpec | None = None
    scored: int | None = None
    """See `engine.ticket.Request`."""
    timeout_s: float | None = None
    priority: int = 0
    salt: str | None = None
    pooling: Pooling | None = None
    """See `engine.ticket.Request`."""
    adapter: str | None = None
    """See `engine.ticket.Request`."""


@dataclass(slots=True, kw_only=True)
class Service:
    """A server's state. Only the event loop's thread changes it, except for `progress`."""

    options: ServerOptions
    state: State = "loading"
    progress: float = 0.0
    """Share of the weights loaded, 0 to 1."""
    failure: str = ""
    model: Model | None = None
    engine: Engine | None = None
    metrics: Metrics | None = None
    grammars: GrammarCompiler | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Contents of /info besides the options: the plan, the weights."""
    created: int = field(default_factory=lambda: int(time.time()))
    num_open: int = 0
    """Sequences whose answers are not sent yet."""
    pooling: Pooling | UnsupportedError | CheckpointError = "last"
    """How a text becomes a vector, or why there are no embeddings."""
    _workers: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._workers = ThreadPoolExecutor(self.options.validation_workers, "hanok-validation")

    def open(self, model: Model, engine: Engine) -> None:
        """Begin to serve with an engine that was not started."""
        self.model, self.engine = model, engine
        try:
            checkpoint = model.checkpoint
            self.pooling = choose_pooling(
                self.options.pooling, checkpoint.folder, checkpoint.config
            )
        except (UnsupportedError, CheckpointError) as error:
            LOG.warning("there are no embeddings: %s", error)
            self.pooling = error
        self.metrics = Metrics(
            max_input_tokens=self.max_input_tokens, max_total_tokens=self.max_total_tokens
        )
        engine.observer = self.metrics
        engine.start()
        has_grammars = self.options.has_grammars and model.config.has_head
        if model.tokenizer is not None and has_grammars:
            self.grammars = GrammarCompiler(model.tokenizer, model.config.vocab_size, model.end_ids)
        self.state = "ready"

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown(cancel_futures=True)

    def created_now(self) -> int:
        """Return the time of day, in seconds since 1970."""
        return int(time.time())

    @property
    def needed_model(self) -> Model:
        """The model; ServerError before it is loaded."""
        if self.model is None:
            raise self._unready()
        return self.model

    @property
    def needed_engine(self) -> Engine:
        """The engine; ServerError before it is loaded, and while it accepts no requests."""
        if self.engine is None or self.state != "ready":
            raise self._unready()
        return self.engine

    @property
    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer; ServerError if the checkpoint has none."""
        found = self.needed_model.tokenizer
        if found is None:
            raise invalid("this checkpoint has no tokenizer: send token ids")
        return found

    @property
    def needed_infill(self) -> Infill:
        """The markers for filling in the middle; ServerError if the tokenizer has none."""
        found = find_infill(self.needed_tokenizer)
        if found is None:
            raise ServerError(
                "`suffix` is not supported: this model's tokenizer has none of the markers that are "
                "known for filling in the middle. Serve a model that was trained for it",
                kind="suffix not supported",
                parameter="suffix",
            )
        return found

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that requests may name; before the model is loaded those it will have."""
        if self.model is None:
            return tuple(self.options.adapter_folders)
        return self.model.adapters.names

    @property
    def max_total_tokens(self) -> int:
        """Tokens of one request, prompt and answer."""
        held = self.engine.max_tokens if self.engine is not None else 1
        return min(held, self.options.max_total_tokens or held)

    @property
    def max_input_tokens(self) -> int:
        """Tokens of a prompt."""
        total = self.max_total_tokens
        return min(self.options.max_input_tokens or total, total - 1)

    def _unready(self) -> ServerError:
        words = {
            "loading": f"the model is loading ({self.progress:.0%})",
            "draining": "the server is stopping",
            "failed": f"loading the model failed: {self.failure}",
        }
        message = words.get(self.state, "the model is not there")
        return ServerError(message, kind="overloaded", status=503, headers={"Retry-After": "5"})

    async def aside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run slow work, such as tokenizing, in a thread, so that streams continue."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: function(*args, **kwargs))

    async def encoded(
        self,
        text: str,
        check: Callable[[int], None] | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Return a text's tokens, in a thread.

        A text that is too long should not cost the seconds of tokenizing it: `check` is given a lower
        bound on its tokens, and raises ServerError if that is too many.
        """
        tokenizer = self.needed_tokenizer

        def encode() -> list[int]:
            if check is not None:
                check(tokenizer.fewest_tokens(text))
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

        return await self.aside(encode)

    async def answered(
        self, build: Callable[[], Any], num_scores: int, headers: Mapping[str, str]
    ) -> Response:
        """Answer with the JSON value that `build` makes of so many scores of tokens.

        Many are written in a thread, so that streams continue; a few directly, which is faster.
        """
        if num_scores <= AT_ONCE:
            return Json(build(), headers=headers)
        content = await self.aside(lambda: "".join(dumps_in_parts(build())).encode())
        return Response(content, headers=headers, media_type=Json.media_type)

    async def submit(self, request: Request, prompts: Sequence[Prepared]) -> list[Ticket]:
        """Queue prompts, each as often as it says, and return their tickets in that order.

        Raises ServerError, with nothing queued, if one is invalid or there is no room.
        """
        self._admit(exchange_of(request), sum(prompt.count for prompt in prompts))
        return await self._queued(request, prompts)

    async def in_turn(
        self, request: Request, prompts: Sequence[Prepared], *, at_once: int, num_tokens: int
    ) -> list[Ticket]:
        """Queue prompts as `submit` does, but only some at once, and return when all are finished.

        At most so many, or fewer if they have more tokens together: other requests wait for these.
        """
        self._admit(exchange_of(request), min(at_once, len(prompts)))
        found: list[Ticket] = []
        while len(found) < len(prompts):
            following = prompts[len(found) : len(found) + at_once]
            totals = accumulate(len(prompt.prompt_ids) for prompt in following)
            count = sum(1 for _ in takewhile(lambda total: total <= num_tokens, totals))
            tickets = await self._queued(request, following[: max(1, count)])
            await self.results(request, tickets)
            found += tickets
        return found

    async def _queued(self, request: Request, prompts: Sequence[Prepared]) -> list[Ticket]:
        engine, exchange = self.needed_engine, exchange_of(request)
        sequences = await self.aside(self._sequences, prompts)
        tickets: list[Ticket] = []
        exchange.validation_s = exchange.validation_s or time.monotonic() - exchange.began
        try:
            for prompt, copies in zip(prompts, sequences, strict=True):
                leader = None
                for sequence in copies:
                    timeout_s = prompt.timeout_s or self.options.timeout_s
                    asked = EngineRequest(
                        sequence=sequence,
                        priority=prompt.priority,
                        deadline=None if timeout_s is None else exchange.began + timeout_s,
                        asked_at=exchange.began,
                        adapter=prompt.adapter,
                        salt=prompt.salt,
                        scored=prompt.scored,
                        leader=leader,
                        pooling=prompt.pooling,
                    )
                    tickets.append(engine.submit_request(asked))
                    leader = leader or tickets[-1]
        except BaseException:
            give_up(tickets)
            raise
        finally:
            exchange.tickets += tickets
        return tickets

    async def results(self, request: Request, tickets: Sequence[Ticket]) -> list[list[TokenEvent]]:
        """Wait for all tickets. If the client disconnects, or one fails, all are aborted."""
        leaving = asyncio.ensure_future(until_gone(request.receive))
        collecting = asyncio.ensure_future(_all_collected(tickets))
        try:
            tasks: set[asyncio.Future[Any]] = {leaving, collecting}
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnect
            return collecting.result()
        finally:
            give_up(tickets)
            for task in (leaving, collecting):
                task.cancel()
            await asyncio.gather(leaving, collecting, return_exceptions=True)

    def stream(
        self,
        request: Request,
        tickets: Sequence[Ticket],
        events: AsyncGenerator[str, None],
        *,
        failed: Callable[[ServerError], Iterable[str]],
        headers: Mapping[str, str],
        keep_alive: str = COMMENT,
    ) -> EventStream:
        """Answer with server-sent events; after a failure, with those that `failed` makes of it.

        If the client disconnects, or stops reading for too long, all tickets are aborted.
        """
        exchange = exchange_of(request)

        async def with_errors() -> AsyncGenerator[str, None]:
            try:
                async with aclosing(events) as texts:
                    async for text in texts:
                        yield text
            except Exception as error:  # too late for a status
                for text in failed(exchange.failed(error)):
                    yield text

        return EventStream(
            with_errors(),
            lambda: give_up(tickets),
            keep_alive_s=self.options.keep_alive_s,
            write_timeout_s=self.options.write_timeout_s,
            keep_alive=keep_alive,
            headers=headers,
        )

    def ended(self, exchange: Exchange, *, is_counted: bool) -> None:
        """Count and log a request whose answer was sent, or cannot be sent any more."""
        give_up(exchange.tickets)
        self.num_open -= exchange.num_open
        if is_counted and self.metrics is not None:
            self._count(exchange, self.metrics)
        log_request(exchange, as_json=self.options.logs_json)

    def _admit(self, exchange: Exchange, count: int) -> None:
        """Admit a request with so many sequences at a time, until its answer is sent."""
        engine = self.needed_engine
        stats = engine.stats()
        rate = engine.drain_rate
        wait_s = stats.waiting_tokens / rate if rate else 0.0
        if self.num_open + count > self.options.max_concurrent_requests:
            raise overloaded(wait_s)
        if wait_s > self.options.max_queue_s:
            raise overloaded(wait_s - self.options.max_queue_s)
        self.num_open += count  # at once, before others are admitted
        exchange.num_open += count

    def _sequences(self, prompts: Sequence[Prepared]) -> list[list[GenerationSequence]]:
        """Make the sequences of some prompts, with their grammars compiled."""
        model, found = self.needed_model, []
        for prompt in prompts:
            grammar = None
            if prompt.grammar is not None:
                if self.grammars is None:
                    raise invalid("grammar is not supported")
                began = time.monotonic()
                grammar = self.grammars.compile(prompt.grammar)
                if self.metrics is not None:
                    self.metrics.grammar(time.monotonic() - began)
            copies = []
            for index in range(prompt.count):
                options = prompt.options.copy()
                options["seed"] = seed_of_answer(options.get("seed"), index)
                sequence = model.sequence(prompt.prompt_ids, options)
                sequence.max_tokens = min(sequence.max_tokens, self.max_total_tokens)
                sequence.grammar = grammar.matcher() if grammar is not None else None
                copies.append(sequence)
            found.append(copies)
        return found

    def _count(self, exchange: Exchange, metrics: Metrics) -> None:
        metrics.received()
        now, tickets = time.monotonic(), exchange.tickets
        error = exchange.error
        failed = [ticket.error for ticket in tickets if ticket.error is not None]
        if error is None and failed:
            error = as_server_error(failed[0])
        if error is None and exchange.status >= 400:
            return  # a protocol error: the model was not used
        outcome: Outcome = "success"
        if error is not None:
            outcome = OUTCOMES.get(error.kind, "validation")
        begun = [ticket.times.begun for ticket in tickets if ticket.times.begun is not None]
        first = [ticket.times.first_token for ticket in tickets if ticket.times.first_token]
        submitted = [ticket.times.submitted for ticket in tickets]
        metrics.request(
            RequestRecord(
                route=exchange.path,
                outcome=outcome,
                prompt_tokens=sum(len(t.request.sequence.prompt_ids) for t in tickets),
                generated_tokens=sum(len(t.request.sequence.generated_ids) for t in tickets),
                max_new_tokens=max((t.request.sequence.room for t in tickets), default=0),
                cached_tokens=sum(ticket.num_cached_tokens for ticket in tickets),
                validation_s=exchange.validation_s,
                queue_s=min(begun) - min(submitted) if begun else 0.0,
                inference_s=now - min(begun) if begun else 0.0,
                total_s=now - exchange.began,
                first_token_s=min(first) - exchange.began if first else None,
                inter_token_s=[gap for ticket in tickets for gap in ticket.gaps()],
            )
        )


async def _all_collected(tickets: Sequence[Ticket]) -> list[list[TokenEvent]]:
    return list(await asyncio.gather(*map(_collected, tickets)))


async def _collected(ticket: Ticket) -> list[TokenEvent]:
    return [event async for event in ticket]


def give_up(tickets: Sequence[Ticket]) -> None:
    """Abort those that are not finished."""
    for ticket in tickets:
        if not ticket.is_finished:
            ticket.abort()
