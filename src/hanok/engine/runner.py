"""Computes a step's chunks in one forward pass over the blocks of the cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.engine.embed import pooled
from hanok.engine.passes import LONG_PASS_TOKENS, Passes
from hanok.engine.schedule import Chunk
from hanok.engine.sequence import ranked
from hanok.engine.ticket import PromptScore, Request
from hanok.memory.heap import trim_heap
from hanok.models.decoder import Decoder

BLOCK_TOKENS = 64  # what our attention kernel reads at a time
# Each number of tokens keeps its buffers; with more, Python between kernels is negligible.
RECORDED_TOKENS = 16
LOGIT_ROWS = 256  # of a prompt, scored at once


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What came of some chunks.

    `logits`: (rows, vocab) float32: for each chunk that is the last of its sequence a row after its
    last token and one after each drafted one, in the chunks' order; `scores`: for each chunk those of
    the prompt tokens after its own; `pooled`: for each chunk that is pooled, (hidden,) float64 on the
    CPU, the sum of its hidden states or the last of them.
    """

    logits: Tensor | None
    scores: list[tuple[PromptScore, ...]]
    pooled: list[Tensor | None]

    @classmethod
    def joined(cls, parts: "Sequence[StepResult]") -> "StepResult":
        """Return several as one."""
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(
            logits=torch.cat(logits) if logits else None,
            scores=[scores for part in parts for scores in part.scores],
            pooled=[pooled for part in parts for pooled in part.pooled],
        )


class Runner:
    """The decoder and the cache of an engine."""

    def __init__(self, decoder: Decoder, num_blocks: int, max_blocks: int) -> None:
        self._decoder = decoder
        cache = decoder.new_cache(num_blocks, BLOCK_TOKENS, is_paged=True)
        self._passes = Passes(decoder, cache, blocks_per_sequence=max_blocks)
        self._version = self._passes.weights.number()

    def notice_weights(self) -> bool:
        """Return whether weights have changed since this was asked, so that no block is valid."""
        before, self._version = self._version, self._passes.weights.number()
        return self._version != before

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> StepResult:
        """Compute chunks; their requests say whether a prompt is scored, or pooled.

        What was in the blocks before is not changed, so a chunk that failed can be computed again.
        """
        if self._passes.replays_logits and all(map(_is_plain, chunks, requests)):
            replayed = self._passes.replay(_batch_of(chunks, torch.device("cpu")))
            return StepResult(
                logits=replayed, scores=[()] * len(chunks), pooled=[None] * len(chunks)
            )
        batch = _batch_of(chunks, self._decoder.device)
        hidden = self._hidden_states(batch)
        ends = [
            end - len(chunk.draft) for end, chunk in zip(batch.last_tokens(), chunks, strict=True)
        ]
        last = [
            row
            for end, chunk, request in zip(ends, chunks, requests, strict=True)
            if chunk.is_last and request.pooling is None
            for row in range(end, end + 1 + len(chunk.draft))
        ]
        own = batch.adapters
        logits = None
        if last:
            logits = self._decoder.logits(hidden[last], None if own is None else own[last])
        scores: list[tuple[PromptScore, ...]] = []
        vectors: list[Tensor | None] = []
        for chunk, end, request in zip(chunks, ends, requests, strict=True):
            mine = hidden[end + 1 - chunk.count : end + 1]
            scored = () if request.scored is None else self._scores(chunk, mine, request, own)
            scores.append(scored)
            vectors.append(None if request.pooling is None else pooled(mine, request.pooling))
        if len(batch.token_ids) >= LONG_PASS_TOKENS:
            del batch, hidden
            trim_heap()
        return StepResult(logits=logits, scores=scores, pooled=vectors)

    def _hidden_states(self, batch: ForwardBatch) -> Tensor:
        return self._passes.run(batch, may_record=len(batch.token_ids) <= RECORDED_TOKENS)

    def _scores(
        self, chunk: Chunk, hidden: Tensor, request: Request, adapters: Tensor | None
    ) -> tuple[PromptScore, ...]:
        """Score the prompt's tokens after a chunk's, as far as there are any.

        adapters: those of the batch, None where no token of it has one
        """
        prompt, number = request.sequence.prompt_ids, request.scored or 0
        following = prompt[chunk.start + 1 : chunk.start + chunk.count + 1]
        found: list[PromptScore] = []
        for start in range(0, len(following), LOGIT_ROWS):
            tokens = following[start : start + LOGIT_ROWS]
            own = adapters
            if own is not None:
                own = own.new_full((len(tokens),), chunk.row.adapter)
            rows = hidden[start : start + len(tokens)]
            logprobs = self._decoder.logits(rows, own).log_softmax(-1)
            for row, token in zip(logprobs, tokens, strict=True):
                top = ranked(row, number) if number else ()
                rank = 1 + int((row > row[token]).sum())
                logprob = float(row[token])
                found.append(
                    PromptScore(token_id=token, logprob=logprob, rank=rank, top_logprobs=top)
                )
        return tuple(found)


def _batch_of(chunks: Sequence[Chunk], device: torch.device) -> ForwardBatch:
    return ForwardBatch.of(
        [
            [*chunk.row.tokens[chunk.start : chunk.start + chunk.count], *chunk.draft]
            for chunk in chunks
        ],
        past=[chunk.start for chunk in chunks],
        blocks=[tuple(chunk.row.blocks) for chunk in chunks],
        sequence_lengths=[len(chunk.row.tokens) + len(chunk.draft) for chunk in chunks],
        adapters=[chunk.row.adapter for chunk in chunks],
        device=device,
    )


def _is_plain(chunk: Chunk, request: Request) -> bool:
    """Return whether a chunk is one token of which only the logits are wanted."""
    is_one = chunk.count == 1 and not chunk.draft and chunk.is_last
    return is_one and request.scored is None and request.pooling is None
