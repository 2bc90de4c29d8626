"""Tokens and their log-probabilities as OpenAI's conversations tell them."""

from typing import Any

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.engine.sequence import TokenEvent


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; "" for a row of the embedding that has none."""
    return tokenizer.token_text(token) if token < tokenizer.vocab_size else ""


def logprob_of(tokenizer: Tokenizer, event: TokenEvent) -> dict[str, Any]:
    """Return a token with its log-probability and those of the likeliest, as JSON."""
    top = [_one(tokenizer, token, logprob) for token, logprob in event.top_logprobs]
    return _one(tokenizer, event.token_id, event.logprob) | {"top_logprobs": top}


def _one(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text, data = text_of(tokenizer, token), tokenizer.token_bytes(token)
    # Null where no library tells what part of a character it is.
    shown = list(data) if data or not text else None
    return {"token": text, "logprob": logprob, "bytes": shown}
