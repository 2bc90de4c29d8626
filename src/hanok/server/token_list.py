"""A text's tokens as a JSON list, written in parts."""

from collections.abc import AsyncGenerator, Sequence
from itertools import accumulate
from typing import Any

from hanok.checkpoint.tokenizer import Tokenizer
from hanok.server.logprobs import text_of
from hanok.server.service import Service
from hanok.server.web import dumps

TOKENS_AT_ONCE = 1000
"""Tokens that are written to JSON at once: a millisecond, during which the event loop is blocked."""


async def token_list(service: Service, text: str, ids: list[int]) -> AsyncGenerator[str, None]:
    """Yield the JSON list of a text's tokens in parts: it is dozens of times as long as the text."""
    tokenizer, total = service.needed_tokenizer, len(text.encode())
    stream, stop = tokenizer.stream(skip_special_tokens=True), 0

    def part(part_ids: list[int]) -> str:
        nonlocal stop
        sizes = [len(stream.push(token).encode()) for token in part_ids]
        stops = list(accumulate(sizes, initial=stop))[1:]
        stop = stops[-1]
        return dumps(tokens_of(tokenizer, part_ids, sizes, stops, total))[1:-1]

    yield "["
    for start in range(0, len(ids), TOKENS_AT_ONCE):
        text = await service.aside(part, ids[start : start + TOKENS_AT_ONCE])
        yield f",{text}" if start else text
    yield "]"


def tokens_of(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sizes: Sequence[int],
    stops: Sequence[int],
    total: int,
) -> list[dict[str, Any]]:
    """Return tokens of a text; `start` and `stop` are bytes of its UTF-8, 0 for special tokens.

    Every token has the bytes that it adds to the text; one that only begins a character has none, and
    the one that completes it has all of its bytes.
    """
    found = []
    for token, size, stop in zip(ids, sizes, stops, strict=True):
        is_special = token in tokenizer.special_token_ids
        stop = min(stop, total)
        start = max(0, stop - size)
        found.append(
            {
                "id": token,
                "text": text_of(tokenizer, token),
                "start": 0 if is_special else start,
                "stop": 0 if is_special else stop,
            }
        )
    return found
