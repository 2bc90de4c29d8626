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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.engine.passes import Passes
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
        passes = Passes(self._decoder, self._decoder.new_cache(len(sequences), capacity))
        count = min(self.depth, len(sequences))
        groups = [list(range(first, len(sequences), count)) for first in range(count)]
        waiting = deque((group, self._submit(sequences, group, passes)) for group in groups)
        try:
            while waiting:
                group, future = waiting.popleft()
                choices = choose([sequences[index] for index in group], future.result())
                for index, choice in zip(group, choices, strict=True):
                    yield sequences[index].take(index, choice)
                group = [index for index in group if sequences[index].finish_reason is None]
                if group:
                    waiting.append((group, self._submit(sequences, group, passes)))
        finally:
            for _, future in waiting:
                future.exception()

    def _submit(
        self, sequences: list[GenerationSequence], group: list[int], passes: Passes
    ) -> "Future[Tensor]":
        """Send the missing tokens of a group through the stages; the future is its next logits."""
        missing = passes.missing({index: sequences[index].token_ids for index in group})
        size, is_prompt = PREFILL_TOKENS, any(len(new) > 1 for new in missing.values())
        if is_prompt:
            # Each prompt in separate chunks, so that the first stage can take the next one early.
            total = sum(len(item.token_ids) for item in sequences)
            share = -(-total // (CHUNKS_PER_STAGE * len(self._stages)))
            size = min(PREFILL_TOKENS, max(SMALLEST_CHUNK, share))
        outputs: list[Future[Tensor]] = []
        for batch, ends in passes.chunks(missing, size=size, are_apart=is_prompt):
            passes.count(batch)
            output = self._through_stages(batch, passes.cache, list(ends.values()))
            if ends:
                outputs.append(output)
            if self.depth == 1:
                output.exception()  # one batch at a time, as without a pipeline
        return self._workers[-1].submit(lambda: torch.cat([item.result() for item in outputs]))

    def _through_stages(
        self, batch: ForwardBatch, cache: KVCache | None, rows: list[int]
    ) -> "Future[Tensor]":
        """Return the future logits of some rows of a batch; without rows, of anything."""
        before: Future[Tensor] | None = None
        for index, worker in enumerate(self._workers):
            before = worker.submit(self._run, index, before, batch, cache, rows)
        if before is None:
            raise RuntimeError("a pipeline has stages")
        return before

    @torch.inference_mode()
    def _run(
        self,
        index: int,
        before: "Future[Tensor] | None",
        batch: ForwardBatch,
        cache: KVCache | None,
        rows: list[int],
    ) -> Tensor:
        """Compute one stage of a batch, in its thread."""
        stage = self._stages[index]
        x = before.result() if before is not None else None
        started = time.perf_counter()
        try:
            x = self._decoder.embed(batch) if x is None else x
            x = self._decoder.run_stage(stage, x, batch, cache)
            if index == len(self._stages) - 1 and rows:
                x = self._decoder.logits(x[rows])
            return x
        finally:
            self.busy_s[index] += time.perf_counter() - started


def _settle(stage: Stage) -> None:
    """Let a stage's thread compute on its core alone, where it has one."""
    if stage.core is not None:
        os.sched_setaffinity(0, {stage.core})
        torch.set_num_threads(1)
