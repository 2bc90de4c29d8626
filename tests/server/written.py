"""What the tests of conversations share: a template that hides nothing, and answers that are given."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from hanok.engine.params import SamplingParams
from hanok.engine.sequence import TokenEvent


class Spelled:
    """A tokenizer that shows what the template would see."""

    bos_token_id = None
    vocab_size = 0
    special_token_ids = frozenset({5, 6, 8})

    def __init__(self, ending: str = "") -> None:
        self._ending = ending
        self.options: dict[str, Any] = {}
        """With which the last conversation was rendered."""

    def render_chat(self, messages: Any, **options: Any) -> str:
        self.options = options
        return json.dumps([messages, options["tools"]]) + self._ending

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [1]

    def fewest_tokens(self, text: str) -> int:
        return 1

    def token_bytes(self, token: int) -> bytes:
        return b""

    def token_to_id(self, text: str) -> int | None:
        return {"[TOOL_CALLS]": 5, "<tool_call>": 7, "<think>": 8}.get(text)


class Given:
    """A ticket whose tokens are all there."""

    num_cached_tokens = 0

    def __init__(self, pieces: list[str], reason: Any, stop: str = "") -> None:
        sequence = SimpleNamespace(
            params=SamplingParams(),
            prompt_ids=[1, 2],
            generated_ids=[*range(len(pieces))],
            stops=SimpleNamespace(reached=stop),
        )
        self.request = SimpleNamespace(sequence=sequence)
        self._events = [
            TokenEvent(
                sequence=0,
                token_id=number,
                text=piece,
                logprob=-1.0,
                top_logprobs=(),
                finish_reason=reason if number == len(pieces) - 1 else None,
            )
            for number, piece in enumerate(pieces)
        ]

    @property
    def events(self) -> list[TokenEvent]:
        return self._events

    async def groups(self) -> Any:
        for event in self._events:
            yield [event]


def collected(stream: Any) -> Iterator[Any]:
    """What an iterator yields that never waits."""
    while True:
        try:
            stream.__anext__().send(None)
        except StopIteration as found:
            yield found.value
        except StopAsyncIteration:
            return
