"""How many prompt tokens a step may compute, so that it takes about as long as asked.

A step's time is taken as what decoding so many sequences takes, plus a time for each prompt token. Both
are measured on the steps themselves. Imports no torch.
"""

SMOOTHING = 0.2  # weight of the newest step
FIRST_GUESS_TOKENS = 256
SMALLEST_TOKENS = 16  # below this a step is mostly reading weights
DRAIN_MEMORY_S = 10.0  # over about so many seconds of waiting the queue's speed is measured
DRAIN_SURE_S = 2.0  # the first steps, which read the weights from disk, say little about it


class StepBudget:
    """The measured speed of an engine's steps."""

    def __init__(self, *, mixed_s: float, alone_s: float, most_tokens: int) -> None:
        self.mixed_s = mixed_s
        """Seconds that a step should take where sequences wait for their next token."""
        self.alone_s = alone_s
        """Seconds of a step where none does: a request that goes away is noticed after so long."""
        self.most_tokens = most_tokens
        self._token_s: float | None = None
        self._decode_s: dict[int, float] = {}
        self._drained_tokens = self._drained_s = 0.0

    def prompt_tokens(self, num_decoding: int) -> int:
        """Return how many prompt tokens fit in addition to so many sequences' next tokens."""
        if self._token_s is None:
            return min(self.most_tokens, FIRST_GUESS_TOKENS)
        target = self.mixed_s if num_decoding else self.alone_s
        tokens = int((target - self._decoding_s(num_decoding)) / self._token_s)
        return max(SMALLEST_TOKENS, min(tokens, self.most_tokens))

    @property
    def drain_rate(self) -> float:
        """Prompt tokens per second that were computed while others waited; 0: not known yet."""
        is_known = self._drained_s >= DRAIN_SURE_S
        return self._drained_tokens / self._drained_s if is_known else 0.0

    def record(
        self, num_prompt: int, num_decoding: int, seconds: float, *, is_waited: bool
    ) -> None:
        """Learn from a step; `is_waited` says whether more prompts were waiting."""
        if is_waited:
            kept = max(0.0, 1 - seconds / DRAIN_MEMORY_S)
            self._drained_tokens = kept * self._drained_tokens + num_prompt
            self._drained_s = kept * self._drained_s + seconds
        if not num_prompt:
            known = self._decode_s.get(num_decoding, seconds)
            self._decode_s[num_decoding] = known + SMOOTHING * (seconds - known)
        elif num_prompt >= SMALLEST_TOKENS:
            token_s = max(seconds - self._decoding_s(num_decoding), seconds / 10) / num_prompt
            known = token_s if self._token_s is None else self._token_s
            self._token_s = known + SMOOTHING * (token_s - known)

    def _decoding_s(self, num_decoding: int) -> float:
        """Return what decoding takes, by the nearest number of sequences that was measured."""
        if not num_decoding or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda number: abs(number - num_decoding))
        return self._decode_s[nearest]
