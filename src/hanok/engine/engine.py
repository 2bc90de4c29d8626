"""Many requests, one model: a thread repeats steps that plan, compute and commit.

    with hanok.Engine(model) as engine:
        ticket = engine.submit("Once upon a time", max_new_tokens=64)
        text = "".join(event.text for event in ticket)

A request's tokens depend on its own prompt, options and seed, not on what else runs. A request that
fails fails alone: when a pass over several raises, each is computed again separately.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Unpack

from torch import Tensor

from hanok.engine.blocks import BlockPool
from hanok.engine.embed import finished
from hanok.engine.model import Model, Prompt
from hanok.engine.options import MAX_RUNNING, MAX_STEP_S
from hanok.engine.params import SamplingOptions
from hanok.engine.runner import BLOCK_TOKENS, Runner, StepResult
from hanok.engine.schedule import Chunk, Row, Scheduler, StepPlan
from hanok.engine.sequence import Sampler, Taken, num_right, take_next
from hanok.engine.speculate import Speculation, Speculator
from hanok.engine.stats import Counts, EngineStats
from hanok.engine.step_budget import StepBudget
from hanok.engine.ticket import Request, Ticket
from hanok.errors import (
    ClosedError,
    DeadlineError,
    GenerationError,
    HanokError,
    OptionError,
    RequestAbortedError,
    RequestError,
)
from hanok.memory.needs import DRAFTED_SEQUENCES, PREFILL_TOKENS

LOG = logging.getLogger("hanok.engine")
ALONE_STEP_S = 1.0
# How long a step may take before it counts as stuck: the first one, which reads the weights from disk;
# later ones; and how many times as long as the longest so far.
FIRST_STALL_S, STALL_S, STALL_FACTOR = 600.0, 8.0, 10.0


class StepObserver(Protocol):
    """Hears of each step, in the engine's thread."""

    def step(
        self,
        kind: Literal["prefill", "decode"],
        *,
        num_sequences: int,
        num_tokens: int,
        forward_s: float,
        total_s: float,
        succeeded: bool,
        accepted: Sequence[int],
    ) -> None:
        """Take note of a step; "prefill" where prompts were among it.

        `accepted` says for each request with guesses how many were right.
        """


class Engine:
    """Continuous batching over one model."""

    def __init__(
        self,
        model: Model,
        *,
        cache_tokens: int | None = None,
        max_running: int = MAX_RUNNING,
        max_step_s: float = MAX_STEP_S,
        speculation: Speculation | None = None,
    ) -> None:
        """Claim the cache; `start`, or a `with` block, begins the work.

        `cache_tokens` are the tokens whose keys and values are kept, of all requests together; by
        default what the model's load plan counted on. `max_running` requests are computed at a time,
        in steps that prompts do not make longer than about `max_step_s` seconds. `speculation` guesses
        tokens ahead while no prompt is computed, as far as that is faster: the fewer requests run, the
        more. A draft model guesses for DRAFTED_SEQUENCES of them at a time, fewer where the cache is for
        fewer, and as far as the context reaches that the load plan counted on.
        """
        if model.pipeline_depth is not None:
            raise OptionError(
                f"the model was loaded with pipeline_depth={model.pipeline_depth}, which an engine does "
                "not have: it puts the tokens of all requests into one pass, which goes from device to "
                "device. Load it without; `Model.generate` is what takes it."
            )
        needs = model.plan.needs if model.plan is not None else None
        if cache_tokens is None:
            cache_tokens = needs.context * needs.batch if needs else model.config.max_context_tokens
        if cache_tokens < BLOCK_TOKENS or max_running < 1:
            raise OptionError(
                f"an engine of {cache_tokens} tokens for {max_running} requests at a time; it needs "
                f"at least {BLOCK_TOKENS} tokens and one request."
            )
        self.model = model
        pool = BlockPool(-(-cache_tokens // BLOCK_TOKENS), BLOCK_TOKENS)
        self.cache_tokens = pool.num_blocks * BLOCK_TOKENS
        self.max_tokens = min(model.config.max_context_tokens, self.cache_tokens)
        """Of one request, prompt and answer."""
        self._shares_angles = model.config.shares_angles(1, self.max_tokens)
        self._scheduler = Scheduler(pool, max_running)
        self._runner = Runner(model.decoder, pool.num_blocks, pool.needed(self.max_tokens))
        self._speculator: Speculator | None = None
        if speculation is not None:
            speculation.check(model)
            drafted_tokens = min(self.max_tokens, needs.context if needs else self.max_tokens)
            self._speculator = Speculator(
                speculation,
                model.decoder,
                num_sequences=min(
                    max_running, DRAFTED_SEQUENCES, self.cache_tokens // drafted_tokens
                ),
                max_tokens=drafted_tokens,
            )
        self._step_budget = StepBudget(
            mixed_s=max_step_s, alone_s=ALONE_STEP_S, most_tokens=PREFILL_TOKENS
        )
        self.observer: StepObserver | None = None
        """Hears of each step; to be set before the work begins."""
        self._open: dict[int, Ticket] = {}
        self._inbox: deque[Ticket | int | Callable[[], None]] = deque()
        """Submitted, or the number of what was given up, or to be done between two steps."""
        self._retired: set[int] = set()
        """Adapters that are removed once no request has them."""
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._state: Literal["open", "draining", "closed"] = "open"
        self._numbers = count(1)
        self._counts = Counts()
        self._step_began: float | None = None
        self._longest_step_s = 0.0

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin the work, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hanok-engine", daemon=True)
            self._thread.start()
            # A thread that Python ends in the middle of a pass takes the whole program down with it.
            atexit.register(self.close)

    def submit(
        self, prompt: Prompt, *, adapter: str | None = None, **options: Unpack[SamplingOptions]
    ) -> Ticket:
        """Queue a prompt, with the options of `Model.generate`, and return its ticket at once.

        `adapter` is the name of one of `Model.adapters`; None: the one that the model uses, or none.
        Raises RequestError for a prompt that cannot be served, OptionError for an option.
        """
        sequence = self.model.sequence(prompt, options)
        return self.submit_request(Request(sequence=sequence, adapter=adapter))

    def submit_request(self, request: Request) -> Ticket:
        """Queue a request and return its ticket at once; ClosedError where the engine takes none.

        A model without a head takes only requests with `pooling`: OptionError for others.
        """
        if request.pooling is None or request.scored is not None:
            self.model.check_head()
        sequence = request.sequence
        sequence.max_tokens = min(sequence.max_tokens, self.max_tokens)
        if sequence.room < 1:
            raise RequestError(
                f"the prompt has {len(sequence.prompt_ids)} tokens, and the engine holds "
                f"{self.max_tokens} of one request. Shorten the prompt, or start the engine with more "
                "cache_tokens."
            )
        with self._wake:  # no adapter is retired in between
            return self._queued(request)

    def _queued(self, request: Request) -> Ticket:
        sequence, name = request.sequence, request.adapter or self.model.adapters.active
        adapter = -1 if name is None else self.model.adapters.index_of(name)
        number = next(self._numbers)
        row = Row(
            id=number,
            adapter=adapter,
            tokens=sequence.token_ids,
            priority=request.priority,
            root=(adapter, request.salt) if self._shares_angles else number,
            # What is scored or summed up is looked at in each of its tokens.
            is_shared=request.scored is None and request.pooling != "mean" and self._shares_angles,
        )
        ticket = Ticket(request, row, lambda: self._post(number))
        if self._state != "open":
            raise ClosedError("the engine is stopping and takes no more requests.")
        self._post(ticket)
        return ticket

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read an adapter while the work goes on, and add it between two steps; from any thread.

        Returns when requests may name it. Raises as `Adapters.load` does, BudgetError where the plan of
        the load leaves too little memory, and ClosedError.
        """
        if self._state == "closed":
            raise ClosedError("the engine was stopped and takes no adapters.")
        adapters = self.model.adapters
        weights = adapters.read(name, folder, is_limited=True)
        done: Future[None] = Future()

        def add() -> None:
            try:
                adapters.add(name, weights)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        if self._thread is None:
            add()
        else:
            self._post(add)
        done.result()

    def unload_adapter(self, name: str) -> None:
        """Take no more requests with an adapter, from any thread; OptionError for an unknown name.

        It is removed, and its memory free, when the requests that have it are finished.
        """
        with self._wake:
            self._retired.add(self.model.adapters.retire(name))
            self._wake.notify_all()

    def weights_changed(self) -> None:
        """Say that weights of the model were changed: see `Model.weights_changed`; from any thread.

        From the next step on nothing that others computed is used: what waits begins with the new
        weights, and what runs is computed again, so that its next token is that of the new weights.
        Change weights while no step is computing, or that step sees some of them old, some new.
        """
        self.model.weights_changed()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that are there; return whether all ended."""
        with self._wake:
            self._state = "draining"
            self._wake.notify_all()
            return self._wake.wait_for(lambda: not self._has_work, timeout_s)

    def close(self) -> None:
        """End the work; what is unfinished fails with ClosedError."""
        with self._wake:
            self._state = "closed"
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.close)
        self._drain_inbox()
        self._fail_all(ClosedError("the engine was stopped before the request was finished."))

    def stats(self) -> EngineStats:
        """Return what it does now; from any thread."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        queued = [item.row for item in list(self._inbox) if isinstance(item, Ticket)]
        waiting = [*scheduler.waiting, *queued]
        return EngineStats(
            num_waiting=len(waiting),
            num_running=len(scheduler.running),
            waiting_tokens=sum(len(row.tokens) for row in waiting),
            used_blocks=pool.num_used,
            cached_blocks=pool.num_cached,
            total_blocks=pool.num_blocks,
            block_size=pool.block_size,
            preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.num_cached_tokens,
            prefix_query_tokens=scheduler.num_prompt_tokens,
            **asdict(self._counts),
        )

    @property
    def drain_rate(self) -> float:
        """Prompt tokens per second at which those that wait begin; 0: not known yet."""
        return self._step_budget.drain_rate

    @property
    def is_stuck(self) -> bool:
        """Whether its step takes far longer than any before, or its thread is gone."""
        began, thread = self._step_began, self._thread
        if thread is None or self._state == "closed":
            return False
        later_s = max(STALL_S, STALL_FACTOR * self._longest_step_s)
        limit = later_s if self._counts.steps else FIRST_STALL_S
        return not thread.is_alive() or (began is not None and time.monotonic() - began > limit)

    def step(self) -> bool:
        """Plan, compute and commit once; return whether there was anything to do."""
        retired = set(self._retired)  # whose requests are all in the inbox by now
        self._drain_inbox()
        for index in retired - {ticket.row.adapter for ticket in self._open.values()}:
            self.model.adapters.remove(index)
            self._retired.discard(index)
        self._drop_late()
        if self._runner.notice_weights():
            self._scheduler.restart_all()
        began = self._step_began = time.monotonic()
        decoding = sum(row.is_decoding for row in self._scheduler.running)
        plan = self._scheduler.plan(self._step_budget.prompt_tokens(decoding), self._drafts())
        if plan.chunks:
            planned = time.monotonic()
            chunks, result, failures = self._compute(plan.chunks)
            computed = time.monotonic()
            for chunk, error in failures:
                self._end(self._open[chunk.row.id], error)
            if self._speculator is not None and not failures and not plan.num_prompt_tokens:
                num_tokens = plan.num_decoding + plan.num_drafted_tokens
                self._speculator.timed(num_tokens, computed - planned)
            accepted = self._commit(chunks, result) if result is not None else []
            self._record(plan, began, computed, succeeded=not failures, accepted=accepted)
        self._step_began = None
        return bool(plan.chunks)

    @property
    def _has_work(self) -> bool:
        return bool(self._inbox or self._open or self._retired)

    def _post(self, item: Ticket | int | Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(item)
            self._wake.notify_all()

    def _run(self) -> None:
        """Step while there is work, until closed."""
        while True:
            with self._wake:
                self._wake.notify_all()  # who drains looks again
                self._wake.wait_for(lambda: self._has_work or self._state == "closed")
                if self._state == "closed":
                    return
            try:
                self.step()
            except Exception as error:  # a bug of ours: no request may wait forever
                self._fail_all(GenerationError(f"the engine failed: {error!r}"))
            self.model.promote()

    def _drain_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Ticket):
                leader = item.request.leader
                ahead = self._open.get(leader.id) if leader is not None else None
                item.row.leader = ahead.row if ahead is not None else None
                self._open[item.row.id] = item
                self._scheduler.add(item.row)
            elif callable(item):
                item()
            elif item in self._open:
                ticket = self._open[item]
                self._counts.cancelled += 1
                late = ticket.num_tokens_after_abort
                self._counts.most_tokens_after_abort = max(
                    self._counts.most_tokens_after_abort, late
                )
                self._end(ticket, RequestAbortedError("the request was given up."))

    def _drop_late(self) -> None:
        """End what is out of time, and compute again what was computed with other angles."""
        now = time.monotonic()
        for ticket in list(self._open.values()):
            request, row = ticket.request, ticket.row
            deadline, began = request.deadline, request.asked_at
            if deadline is not None and now >= deadline:
                began = ticket.times.submitted if began is None else began
                given = max(0.0, deadline - began)
                self._end(ticket, DeadlineError(f"not finished within {given:.3g} s."))
            elif not self._shares_angles and row.num_computed:
                config = self.model.config
                if not config.shares_angles(row.num_computed, len(row.tokens)):
                    self._scheduler.restart(row)

    def _compute(
        self, chunks: Sequence[Chunk]
    ) -> tuple[list[Chunk], StepResult | None, list[tuple[Chunk, GenerationError]]]:
        """Return the chunks that could be computed, their results, and what failed."""
        try:
            requests = [self._open[chunk.row.id].request for chunk in chunks]
            return list(chunks), self._runner.run(chunks, requests), []
        except Exception as error:  # whatever it is, only those that cause it may fail
            if len(chunks) == 1 and not chunks[0].draft:
                failure = GenerationError(f"computing the request failed: {error!r}")
                return [], None, [(chunks[0], failure)]
        done: list[Chunk] = []
        results: list[StepResult] = []
        failures: list[tuple[Chunk, GenerationError]] = []
        for chunk in chunks:
            computed, result, failed = self._compute([replace(chunk, draft=())])
            done += computed
            results += [result] if result is not None else []
            failures += failed
        return done, StepResult.joined(results) if results else None, failures

    def _drafts(self) -> Mapping[int, Sequence[int]]:
        """Return guesses by the numbers of requests: of all that run, unless a prompt is computed."""
        scheduler = self._scheduler
        is_decoding = all(row.is_decoding for row in scheduler.running)
        if self._speculator is None or scheduler.waiting or not is_decoding:
            return {}
        try:
            tickets = [self._open[row.id] for row in scheduler.running]
            return self._speculator.drafts(
                {
                    ticket.row.id: ticket.request.sequence
                    for ticket in tickets
                    if ticket.request.pooling is None
                }
            )
        except Exception as error:  # a draft model's: requests do not depend on it
            LOG.warning("speculation failed and is off from now on: %r", error)
            self._speculator = None
            return {}

    def _commit(self, chunks: Sequence[Chunk], result: StepResult) -> list[int]:
        """Count what was computed, choose tokens and hand them over.

        Returns how many guesses were right, for each chunk that had any.
        """
        sampler = Sampler(result.logits) if result.logits is not None else None
        row, accepted = 0, []
        for chunk, scores, pooled in zip(chunks, result.scores, result.pooled, strict=True):
            ticket = self._open[chunk.row.id]
            # At their places: a sequence that was begun again is scored again.
            ticket.prompt_scores[chunk.start : chunk.start + len(scores)] = scores
            if pooled is not None:
                self._scheduler.commit(chunk)
                self._pool(ticket, chunk, pooled)
                continue
            if not chunk.is_last or sampler is None:
                self._scheduler.commit(chunk)
                continue
            taken = take_next(ticket.request.sequence, 0, chunk.draft, sampler, row)
            row += 1 + len(chunk.draft)
            self._scheduler.commit(chunk, num_accepted=max(0, len(taken.events) - 1))
            if chunk.draft:
                accepted.append(num_right(chunk.draft, taken.events))
            if self._speculator is not None:
                number = len(taken.events)
                self._speculator.learn(
                    ticket.row.id, ticket.request.sequence, len(chunk.draft), number
                )
            self._hand_over(ticket, taken)
        self._counts.drafted_tokens += sum(len(chunk.draft) for chunk in chunks)
        self._counts.accepted_tokens += sum(accepted)
        return accepted

    def _pool(self, ticket: Ticket, chunk: Chunk, pooled: Tensor) -> None:
        """Add a chunk's result to its request's pooled sum; finish the request with its last chunk."""
        pooling = ticket.request.pooling or "last"
        # From the first token on, also where it was begun again.
        begun = ticket.pooled_sum if pooling == "mean" and chunk.start else None
        ticket.pooled_sum = pooled if begun is None else begun + pooled
        if not chunk.is_last:
            return
        try:
            ticket.pooled = finished(ticket.pooled_sum, pooling, len(chunk.row.tokens))
        except GenerationError as error:
            self._end(ticket, error)
        else:
            self._end(ticket, None)

    def _hand_over(self, ticket: Ticket, taken: Taken) -> None:
        """Give a request its new tokens, and end it where they do."""
        number = len(taken.events)
        self._counts.generated_tokens += number
        times = ticket.times
        if number:
            times.first_token = times.first_token or time.monotonic()
        for event in taken.events:
            ticket.add(event)
        if taken.error is not None or ticket.request.sequence.finish_reason is not None:
            self._end(ticket, taken.error)

    def _record(
        self,
        plan: StepPlan,
        began: float,
        computed: float,
        *,
        succeeded: bool,
        accepted: Sequence[int],
    ) -> None:
        for chunk in plan.chunks:
            ticket = self._open.get(chunk.row.id)
            if ticket is not None and ticket.times.begun is None:
                ticket.times.begun = began
        self._counts.steps += 1
        took = time.monotonic() - began
        self._longest_step_s = max(self._longest_step_s, took)
        is_waited = bool(self._scheduler.waiting)
        self._step_budget.record(
            plan.num_prompt_tokens, plan.num_decoding, took, is_waited=is_waited
        )
        if self.observer is not None:
            self.observer.step(
                "prefill" if plan.num_prompt_tokens else "decode",
                num_sequences=len(plan.chunks),
                num_tokens=plan.num_prompt_tokens + plan.num_decoding + plan.num_drafted_tokens,
                forward_s=computed - began,
                total_s=took,
                succeeded=succeeded,
                accepted=accepted,
            )

    def _end(self, ticket: Ticket, error: HanokError | None) -> None:
        del self._open[ticket.row.id]
        self._scheduler.remove(ticket.row)
        if self._speculator is not None:
            self._speculator.forget(ticket.row.id)
        ticket.finish(error)

    def _fail_all(self, error: HanokError) -> None:
        for ticket in list(self._open.values()):
            self._end(ticket, error)
