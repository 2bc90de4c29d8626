"""TGI's headers with times, in milliseconds, as text."""

from collections.abc import Sequence
from time import monotonic

from hanok.engine.ticket import Ticket
from hanok.server.web import Exchange

COMPUTE_TYPE = "cpu+optimized"


def stream_headers(num_characters: int) -> dict[str, str]:
    """Return the headers of a stream, which are sent before anything is computed."""
    return {"x-compute-type": COMPUTE_TYPE, "x-compute-characters": str(num_characters)}


def timing_headers(
    exchange: Exchange, tickets: Sequence[Ticket], num_characters: int
) -> dict[str, str]:
    """Return the headers of a whole answer; several sequences count as one with their total time."""
    total = monotonic() - exchange.began
    submitted = min(ticket.times.submitted for ticket in tickets)
    begun = min(ticket.times.begun or submitted for ticket in tickets)
    finished = max(ticket.times.finished or begun for ticket in tickets)
    generated = sum(len(ticket.request.sequence.generated_ids) for ticket in tickets)
    prompts = sum(len(ticket.request.sequence.prompt_ids) for ticket in tickets)
    inference = finished - begun
    times = {
        "x-total-time": total,
        "x-validation-time": exchange.validation_s,
        "x-queue-time": begun - submitted,
        "x-inference-time": inference,
        "x-time-per-token": inference / max(1, generated),
    }
    return {
        **stream_headers(num_characters),
        "x-compute-time": f"{total:.6f}",
        **{name: str(int(1000 * seconds)) for name, seconds in times.items()},
        "x-prompt-tokens": str(prompts),
        "x-generated-tokens": str(generated),
    }
