"""What a request is, and what its sender holds while the engine works on it.

A ticket is read from any thread, or from an event loop: iterate over it for the tokens as they come.
The engine only ever appends to it; a slow or absent reader blocks nothing.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from hanok.checkpoint.pooling import Pooling
from hanok.engine.schedule import Row
from hanok.engine.sequence import GenerationSequence, Ranked, TokenEvent
from hanok.errors import HanokError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScore:
    """How likely a token of a prompt was after those before it."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest."""
    top_logprobs: Ranked


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate, and how it is to be treated."""

    sequence: GenerationSequence
    priority: int = 0
    """Smaller ones are served first."""
    deadline: float | None = None
    """Of `time.monotonic`, in seconds; what is not finished then is given up."""
    asked_at: float | None = None
    """Since when its time runs, of `time.monotonic`; None: since it was submitted."""
    adapter: str | None = None
    """The name of the adapter that computes it; None: the one that the model uses, or none."""
    salt: Hashable = None
    """Requests with another salt share nothing in the cache."""
    scored: int | None = None
    """So many of the likeliest tokens are reported for each of the prompt's; None: no scores."""
    leader: "Ticket | None" = None
    """One with the same prompt, whose keys and values are worth waiting for."""
    pooling: Pooling | None = None
    """Ends with the prompt's pooled hidden states in place of tokens; None: generates."""


@dataclass(slots=True, kw_only=True)
class Times:
    """When things happened, of `time.monotonic`, in seconds."""

    submitted: float
    begun: float | None = None
    """Its first step was planned."""
    first_token: float | None = None
    aborted: float | None = None
    """It was given up."""
    finished: float | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was submitted."""

    request: Request
    row: Row
    """What the scheduler knows of it."""
    _give_up: Callable[[], None]
    times: Times = field(default_factory=lambda: Times(submitted=time.monotonic()))
    prompt_scores: list[PromptScore] = field(default_factory=list)
    """Of the prompt's tokens but the first; there before the first token is."""
    pooled: "Tensor | None" = None
    """Of a request with `pooling`, once it is finished: (hidden,) float32 on the CPU."""
    pooled_sum: "Tensor | None" = None
    """For the engine: of a request with `pooling`, the sum or the last of its hidden states so far."""
    error: HanokError | None = None
    _events: list[TokenEvent] = field(default_factory=list)
    _moments: list[float] = field(default_factory=list)
    """When each came."""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _wakers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def id(self) -> int:
        """Its number in the engine, from 1."""
        return self.row.id

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that did not have to be computed; known before the first token."""
        return self.row.num_cached

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.times.finished is not None

    def abort(self) -> None:
        """Give it up: it is gone with the next step."""
        self.times.aborted = self.times.aborted or time.monotonic()
        self._give_up()

    @property
    def num_tokens_after_abort(self) -> int:
        """Tokens that came all the same: those of the step that was under way."""
        aborted = self.times.aborted
        return sum(at > aborted for at in list(self._moments)) if aborted is not None else 0

    def __iter__(self) -> Iterator[TokenEvent]:
        """Yield the tokens, waiting for each. Raises what the request failed with."""
        number = 0
        while True:
            with self._changed:
                while len(self._events) == number and not self.is_finished:
                    self._changed.wait()
                found = self._events[number:]
            if not found:
                break
            yield from found
            number += len(found)
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yield the tokens in an event loop. Raises what the request failed with."""
        async for found in self.groups():
            for event in found:
                yield event

    async def groups(self) -> AsyncIterator[list[TokenEvent]]:
        """Yield all tokens that have come since the last ones, in an event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._wakers.append(wake)
        number = 0
        try:
            while True:
                changed.clear()
                found, is_finished = self._events[number:], self.is_finished
                if found:
                    number += len(found)
                    yield found
                elif is_finished:
                    break
                else:
                    await changed.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)
        if self.error is not None:
            raise self.error

    def result(self) -> list[TokenEvent]:
        """Wait for the end and return all tokens. Raises what the request failed with."""
        return list(self)

    def gaps(self) -> list[float]:
        """Return the seconds between each token and the next."""
        return [after - before for before, after in pairwise(list(self._moments))]

    def add(self, event: TokenEvent) -> None:
        """Append a token; for the engine."""
        with self._changed:
            self._events.append(event)
            self._moments.append(time.monotonic())
            self._notify()

    def finish(self, error: HanokError | None = None) -> None:
        """End it; for the engine. Only the first end counts."""
        with self._changed:
            if self.times.finished is None:
                self.error = error
                self.times.finished = time.monotonic()
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._wakers:
            wake()
