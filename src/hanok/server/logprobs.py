"""Tokens and their log-probabilities, as answers give them."""

from collections.abc import Sequence
from typing import Any

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.sequence import TokenEvent
from hanok.engine.ticket import Ticket


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; "" for a padding row of the embedding."""
    return tokenizer.token_text(token) if token < tokenizer.vocab_size else ""


def logprob_of(tokenizer: Tokenizer, event: TokenEvent) -> dict[str, Any]:
    """Return a token with its log-probability and those of the likeliest, as JSON."""
    top = [_one(tokenizer, token, logprob) for token, logprob in event.top_logprobs]
    return _one(tokenizer, event.token_id, event.logprob) | {"top_logprobs": top}


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


def num_scores(tickets: Sequence[Ticket]) -> int:
    """Return the most scores an answer may have: of each token and of its likely alternatives."""
    return sum(
        (len(ticket.prompt_scores) + len(ticket.request.sequence.generated_ids))
        * (1 + ticket.request.sequence.params.top_logprobs)
        for ticket in tickets
    )


def _one(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text, data = text_of(tokenizer, token), tokenizer.token_bytes(token)
    # Null if no library reports which part of a character it is.
    shown = list(data) if data or not text else None
    return {"token": text, "logprob": logprob, "bytes": shown}
