"""A server under load: requests that keep clients busy, or come when they come, and what users see.

In a closed loop each client sends its next request when its last one has ended, so a slow server is
asked less. In an open one requests are sent at times that were fixed before, whatever became of those
before them, and times to first token count from then: what a client was late is in them, and reported.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hanok.bench.arrivals import Arrival
from hanok.bench.prompts import Prompts, Site, find_protocol, target_of, tokenize
from hanok.bench.traffic import HAS_NO_ANSWER, Answer, Ask, Target, closed, opened, send
from hanok.errors import OptionError

LATE_S = 0.01
"""A request that is sent later than this after its time counts as late."""
BUSY_CLIENT = 0.2  # of a core, above which the client may be what was measured
Protocol = Literal["auto", "tgi", "openai"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """So many clients, each with one request after the other, for `duration_s`."""

    clients: int
    duration_s: float
    prompt_tokens: int
    new_tokens: int

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise OptionError(f"there are {self.clients} clients; at least 1 is needed.")
        if not self.duration_s > 0:
            raise OptionError(f"the duration is {self.duration_s:g}; it must be greater than 0.")

    def __str__(self) -> str:
        return f"closed loop, {self.clients} clients for {self.duration_s:g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests at times that are fixed before."""

    arrivals: Sequence[Arrival]
    origin: str
    """Where the times come from."""

    def __str__(self) -> str:
        length = self.arrivals[-1].at_s
        return f"open loop, {len(self.arrivals)} requests in {length:.1f} s, {self.origin}"


Schedule = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a user is promised, in seconds; None: nothing."""

    first_token_s: float | None = None
    between_s: float | None = None
    """Mean time between the tokens of a request."""

    def __post_init__(self) -> None:
        for name, value in (("first token", self.first_token_s), ("next token", self.between_s)):
            if value is not None and not value > 0:
                raise OptionError(f"the bound of the {name} is {value:g} s; it must be above 0.")

    @property
    def is_set(self) -> bool:
        """Whether anything is promised."""
        return self.first_token_s is not None or self.between_s is not None

    def is_kept(self, answer: Answer) -> bool:
        """Return whether a request was answered in full and within the bound."""
        if not answer.is_complete or answer.first_token_s is None:
            return False
        if self.first_token_s is not None and answer.first_token_s > self.first_token_s:
            return False
        mean = mean_between_s(answer)
        return self.between_s is None or mean is None or mean <= self.between_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """The smallest values that 50, 90 and 99 of 100 do not exceed."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles | None":
        """Return them; None for no values."""
        if not values:
            return None
        return cls(p50=_rank(values, 50), p90=_rank(values, 90), p99=_rank(values, 99))


def _rank(values: Sequence[float], percent: int) -> float:
    return sorted(values)[-(-percent * len(values) // 100) - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingReport:
    """What came of a load. Times in seconds; rates are over `seconds`, first request to last answer."""

    url: str
    protocol: str
    model: str
    schedule: str
    prompts: str
    requests: int
    complete: int
    statuses: dict[str, int]
    seconds: float
    requests_per_s: float
    """Of those answered in full."""
    tokens_per_s: float
    """Of all tokens that came."""
    first_token_s: Percentiles | None
    between_s: Percentiles | None
    """Between events with a token, of all requests."""
    mean_between_s: Percentiles | None
    """Time between tokens of a request on average."""
    whole_s: Percentiles | None
    """From when a request was due to its end, of those answered in full."""
    bound: Bound
    goodput_per_s: float | None
    """Requests per second that were answered in full within the bound."""
    late_s: Percentiles | None
    """How long after its time a request was sent."""
    num_late: int
    client_cores: float
    warnings: tuple[str, ...]


def measure_serving(
    url: str,
    schedule: Schedule,
    *,
    protocol: Protocol = "auto",
    model: str | None = None,
    api_key: str | None = None,
    bound: Bound | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> ServingReport:
    """Put a load on a server and return what its users saw.

    Raises OptionError where there is no server, RequestError where it takes no request.
    """
    site = Site(url, api_key)
    target = target_of(site, protocol, model=model, api_key=api_key)
    target, prompts = find_protocol(
        target, lambda text: tokenize(site, target, text), lambda where, what: _try(where, what)
    )
    progress(f"{target.protocol}, {target.model}: {prompts.kind}; {schedule}")
    before, began = time.process_time(), time.perf_counter()
    answers = asyncio.run(run(target, schedule, prompts, seed))
    wall = time.perf_counter() - began
    return summary(
        target,
        schedule,
        prompts,
        answers,
        bound=bound or Bound(),
        client_cores=(time.process_time() - before) / wall,
    )


def _try(target: Target, prompt: str | list[int]) -> tuple[int, str]:
    answer = asyncio.run(send(target, Ask(prompt=prompt, new_tokens=2)))
    failed = answer.status == 200 and answer.error
    return (HAS_NO_ANSWER if failed else answer.status), answer.error


async def run(target: Target, schedule: Schedule, prompts: Prompts, seed: int) -> list[Answer]:
    """Send what the schedule says and return all answers."""
    if isinstance(schedule, ClosedLoop):
        return await closed(target, _asks(schedule, prompts, seed), schedule.clients)
    # Made before the first is sent, so that making them delays none.
    asks = [
        (item.at_s, Ask(prompt=prompts.of(item, number, seed), new_tokens=item.new_tokens))
        for number, item in enumerate(schedule.arrivals)
    ]
    return await opened(target, asks)


def _asks(schedule: ClosedLoop, prompts: Prompts, seed: int) -> Iterator[Ask]:
    """Yield requests until the time is over."""
    loop = asyncio.get_running_loop()
    end, number = loop.time() + schedule.duration_s, 0
    length = Arrival(at_s=0.0, prompt_tokens=schedule.prompt_tokens, new_tokens=schedule.new_tokens)
    while loop.time() < end:
        yield Ask(prompt=prompts.of(length, number, seed), new_tokens=length.new_tokens)
        number += 1


def mean_between_s(answer: Answer) -> float | None:
    """Return the time from one token of a request to the next, on average; None for a single one."""
    tokens = max(answer.num_tokens, len(answer.moments))
    if len(answer.moments) < 2 or tokens < 2:
        return None
    return (answer.moments[-1] - answer.moments[0]) / (tokens - 1)


def summary(
    target: Target,
    schedule: Schedule,
    prompts: Prompts,
    answers: Sequence[Answer],
    *,
    bound: Bound,
    client_cores: float,
) -> ServingReport:
    """Return what the answers show."""
    is_open = isinstance(schedule, OpenLoop)
    whole = [answer for answer in answers if answer.is_complete]
    began = min((answer.due for answer in answers), default=0.0)
    seconds = max((answer.ended for answer in answers), default=0.0) - began
    late = [answer.sent - answer.due for answer in answers] if is_open else []
    firsts = [answer.first_token_s for answer in answers if answer.first_token_s is not None]
    means = [mean for answer in answers if (mean := mean_between_s(answer)) is not None]
    kept = sum(map(bound.is_kept, answers))
    rate = (lambda count: count / seconds) if seconds > 0 else (lambda count: 0.0)
    num_late = sum(value > LATE_S for value in late)
    return ServingReport(
        url=target.url,
        protocol=target.protocol,
        model=target.model,
        schedule=str(schedule),
        prompts=prompts.kind,
        requests=len(answers),
        complete=len(whole),
        statuses=dict(sorted(Counter(map(_outcome, answers)).items())),
        seconds=seconds,
        requests_per_s=rate(len(whole)),
        tokens_per_s=rate(sum(answer.num_tokens for answer in answers)),
        first_token_s=Percentiles.of(firsts),
        between_s=Percentiles.of([gap for answer in answers for gap in answer.between_s]),
        mean_between_s=Percentiles.of(means),
        whole_s=Percentiles.of([answer.ended - answer.due for answer in whole]),
        bound=bound,
        goodput_per_s=rate(kept) if bound.is_set else None,
        late_s=Percentiles.of(late),
        num_late=num_late,
        client_cores=client_cores,
        warnings=tuple(_warnings(target, schedule, prompts, answers, num_late, client_cores)),
    )


def _outcome(answer: Answer) -> str:
    if answer.status == HAS_NO_ANSWER:
        return "no answer"
    return str(answer.status) if answer.is_complete or answer.status != 200 else "200, broken off"


def _warnings(
    target: Target,
    schedule: Schedule,
    prompts: Prompts,
    answers: Sequence[Answer],
    num_late: int,
    client_cores: float,
) -> Iterator[str]:
    if client_cores > BUSY_CLIENT:
        yield (
            f"the client used {client_cores:.0%} of a core: some of the times are its own. Run it on "
            "another machine, or ask for less."
        )
    if num_late:
        yield (
            f"{num_late} of {len(answers)} requests were sent more than {LATE_S * 1000:.0f} ms after "
            "their time; times to first token count from then."
        )
    if not prompts.is_exact:
        yield "the server does not show how it counts tokens: prompt lengths are estimates."
    if not target.options:
        yield "the server knows no ignore_eos: answers may be shorter than asked for."
    failed = [answer for answer in answers if answer.error]
    if failed:
        yield f"{len(failed)} of {len(answers)} requests failed, the first with: {failed[0].error[:200]}"
