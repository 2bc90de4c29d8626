"""Generates with a decoder that lies on several devices, all of them at work at once.

    stage 0   A1 B1 C1 D1 A2 B2 …
    stage 1      A1 B1 C1 D1 A2 …

Layers on p devices compute one after the other, so one sequence keeps each busy 1/p of the time. Here
the sequences are parted into groups (A, B, …) that follow each other through the stages; a group begins
its next token as soon as its last one is chosen, without waiting for the others, so no bubble comes
back with every token. Prompts go in chunks. Each stage has a thread, and takes what comes in order, so
that a chunk finds the keys of the chunk before.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.engine.sequence import GenerationSequence, TokenEvent, choose
from hanok.errors import OptionError
from hanok.memory.needs import PREFILL_TOKENS
from hanok.models.decoder import Decoder, Stage

SMALLEST_CHUNK = 128  # tokens of a prompt; fewer are computed no faster
CHUNKS_PER_STAGE = (
    2  # of all prompts together: fewer leave stages idle, more read weights more often
)


class Pipeline:
    """The stages of a decoder, each with its thread; `depth` groups of sequences are on their way.

    Close it, or use it as a context: its threads end then.
    """

    def __init__(self, decoder: Decoder, depth: int | None = None) -> None:
        if decoder.layout is None:
            raise ValueError("one device computes all; there is nothing to pipeline")
        stages = decoder.layout.stages
        if depth is not None and depth < 1:
            raise OptionError(f"pipeline_depth is {depth}; it must be at least 1.")
        # As many as stages: each group reads a stage's weights anew, so more would cost bandwidth.
        self.depth = depth or len(stages)
        self.busy_s = [0.0] * len(stages)
        """Seconds that each stage has computed."""
        self._decoder = decoder
        self._stages = stages
        self._workers = [
            ThreadPoolExecutor(
                1, thread_name_prefix=f"hanok-stage-{index}", initializer=_settle, initargs=(stage,)
            )
            for index, stage in enumerate(stages)
        ]

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads when they are done."""
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)
        if any(stage.core is not None for stage in self._stages):
            # torch gives new threads the number that was set last; theirs is the caller's again.
            torch.set_num_threads(torch.get_num_threads())

    def generate(self, sequences: list[GenerationSequence]) -> Iterator[TokenEvent]:
        """Yield the tokens of all sequences as they come, those of one in their order."""
        capacity = max(len(item.prompt_ids) + item.room for item in sequences)
        cache = self._decoder.new_cache(len(sequences), capacity)
        count = min(self.depth, len(sequences))
        groups = [list(range(first, len(sequences), count)) for first in range(count)]
        waiting = deque((group, self._submit(sequences, group, cache)) for group in groups)
        try:
            while waiting:
                group, future = waiting.popleft()
                choices = choose([sequences[index] for index in group], future.result())
                for index, choice in zip(group, choices, strict=True):
                    yield sequences[index].take(index, choice)
                group = [index for index in group if sequences[index].finish_reason is None]
                if group:
                    waiting.append((group, self._submit(sequences, group, cache)))
        finally:
            for _, future in waiting:
                future.exception()

    def _submit(
        self, sequences: list[GenerationSequence], group: list[int], cache: KVCache
    ) -> "Future[Tensor]":
        """Send what a group has to compute on its way; the future is its logits, in its order."""
        lengths = {index: len(sequences[index].token_ids) for index in group}
        for index in group:
            if not self._decoder.config.shares_angles(cache.computed_for[index], lengths[index]):
                cache.truncate(index, 0)
        past = {index: cache.lengths[index] for index in group}
        tokens = {index: sequences[index].token_ids[past[index] :] for index in group}
        if all(len(item) == 1 for item in tokens.values()):
            return self._send([(group, [tokens[index] for index in group])], past, lengths, cache)
        # Each prompt in chunks of its own, so that the first stage can take the next one early.
        total = sum(len(item.token_ids) for item in sequences)
        share = -(-total // (CHUNKS_PER_STAGE * len(self._stages)))
        size = min(PREFILL_TOKENS, max(SMALLEST_CHUNK, share))
        chunks = [
            ([index], [tokens[index][start : start + size]])
            for index in group
            for start in range(0, len(tokens[index]), size)
        ]
        return self._send(chunks, past, lengths, cache)

    def _send(
        self,
        chunks: Sequence[tuple[list[int], list[list[int]]]],
        past: dict[int, int],
        lengths: dict[int, int],
        cache: KVCache,
    ) -> "Future[Tensor]":
        """Send batches through the stages; the future is the logits behind each last token."""
        outputs: list[tuple[list[int], Future[Tensor]]] = []
        for slots, tokens in chunks:
            batch = ForwardBatch.of(
                tokens,
                past=[past[slot] for slot in slots],
                slots=slots,
                sequence_lengths=[lengths[slot] for slot in slots],
                device=self._decoder.device,
            )
            host = batch.host
            cache.advance(host.slots, host.query_lengths, host.sequence_lengths)
            for slot, new in zip(slots, tokens, strict=True):
                past[slot] += len(new)
            done = [slot for slot in slots if past[slot] == lengths[slot]]
            outputs.append((done, self._through_stages(batch, cache, is_wanted=bool(done))))
            if self.depth == 1:
                outputs[-1][1].exception()  # one batch at a time, as without a pipeline
        return self._workers[-1].submit(
            lambda: torch.cat([future.result() for done, future in outputs if done])
        )

    def _through_stages(
        self, batch: ForwardBatch, cache: KVCache, *, is_wanted: bool
    ) -> "Future[Tensor]":
        """Return the logits of a batch's last tokens to come; with `is_wanted` false, anything."""
        before: Future[Tensor] | None = None
        for index, worker in enumerate(self._workers):
            before = worker.submit(self._run, index, before, batch, cache, is_wanted)
        if before is None:
            raise RuntimeError("a pipeline has stages")
        return before

    @torch.inference_mode()
    def _run(
        self,
        index: int,
        before: "Future[Tensor] | None",
        batch: ForwardBatch,
        cache: KVCache,
        is_wanted: bool,
    ) -> Tensor:
        """Compute one stage of a batch, in its thread."""
        stage = self._stages[index]
        x = before.result() if before is not None else None
        started = time.perf_counter()
        try:
            x = self._decoder.embed(batch) if x is None else x
            x = self._decoder.run_stage(stage, x, batch, cache)
            if index == len(self._stages) - 1 and is_wanted:
                x = self._decoder.logits(x[batch.last_tokens()])
            return x
        finally:
            self.busy_s[index] += time.perf_counter() - started


def _settle(stage: Stage) -> None:
    """Let a stage's thread compute on its core alone, where it has one."""
    if stage.core is not None:
        os.sched_setaffinity(0, {stage.core})
        torch.set_num_threads(1)
