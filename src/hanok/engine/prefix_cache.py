"""Keys and values kept from prompt to prompt, so that what two share is computed once."""

from collections.abc import Callable

from hanok.attention.cache import KVCache
from hanok.engine.sequence import GenerationSequence
from hanok.engine.speculate import Speculation, Speculator
from hanok.models.decoder import Decoder


class PrefixCache:
    """Keys and values kept between prompts that begin alike, such as the turns of a conversation."""

    def __init__(self) -> None:
        self._cache: KVCache | None = None
        self._sequence: GenerationSequence | None = None
        self._speculator: tuple[Speculation, int, Speculator] | None = None

    def prepare(
        self, new_cache: Callable[[int, int], KVCache], sequence: GenerationSequence
    ) -> KVCache:
        """Return a cache that fits the sequence and holds what its prompt shares with the last one."""
        capacity = len(sequence.prompt_ids) + sequence.room
        if self._cache is None or self._cache.capacity < capacity:
            # A larger one starts empty; asking for twice as much makes that rare.
            self._cache = new_cache(1, min(2 * capacity, sequence.max_tokens))
        elif self._sequence is not None:
            shared = _common_prefix(self._sequence.token_ids, sequence.prompt_ids)
            # The last prompt token is computed again: its logits are needed.
            self._cache.truncate(0, min(shared, len(sequence.prompt_ids) - 1))
        self._sequence = sequence
        return self._cache

    def speculator(self, speculation: Speculation, decoder: Decoder) -> Speculator:
        """Return what drafts for the cache that was prepared; what it learned is kept as well."""
        capacity = self._cache.capacity if self._cache is not None else 1
        if self._speculator is None or self._speculator[:2] != (speculation, capacity):
            found = Speculator(speculation, decoder, num_sequences=1, max_tokens=capacity)
            self._speculator = speculation, capacity, found
        self._speculator[2].forget(0)  # another text begins
        return self._speculator[2]


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
