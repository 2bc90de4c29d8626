"""Cross-entropy of the targets alone, a chunk of rows at a time: no (tokens, vocabulary) is ever held.

One formula of a log-probability serves generation, scoring and training: logit - log(sum(exp)), in
float32, by the same kernel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanok.engine.sequence import totals_and_likeliest
from hanok.memory.learning import LOGITS_BYTES
from hanok.models.decoder import Decoder


def log_probabilities(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probability of one token for each row; the way back overwrites the logits.

    logits: (rows, vocab) float32   token_ids: (rows,) int64   returns: (rows,) float32
    """
    found: Tensor = _LogProbability.apply(logits, token_ids)  # type: ignore[no-untyped-call]  # torch's
    return found


def loss_sum(decoder: Decoder, hidden: Tensor, token_ids: Tensor) -> float:
    """Return the sum of -log p over rows, without gradients.

    hidden: (rows, hidden), of the tokens before the targets   token_ids: (rows,)
    """
    with torch.no_grad():
        return sum(
            -float(log_probabilities(decoder.logits(part), ids).sum())
            for part, ids in _chunks(decoder, hidden, token_ids)
        )


def backward(decoder: Decoder, hidden: Tensor, token_ids: Tensor, weight: float) -> float:
    """Add the gradient of weight x the sum of -log p to what learns, and return that sum unweighted.

    hidden: (rows, hidden), with a graph behind it if anything below the head learns
    """
    total, gradients = 0.0, []
    for part, ids in _chunks(decoder, hidden.detach(), token_ids):
        leaf = part.requires_grad_(hidden.requires_grad)
        loss = -log_probabilities(decoder.logits(leaf), ids).sum()
        total += float(loss.detach())
        if loss.requires_grad:
            (loss * weight).backward()  # type: ignore[no-untyped-call]  # torch's
        if leaf.grad is not None:
            gradients.append(leaf.grad)
        del loss  # and with it the scores, before others are made
    if gradients:
        # As a sum: given a gradient, torch would import an algebra system, for 45 MB and half a second.
        (hidden * torch.cat(gradients)).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    return total


def _chunks(decoder: Decoder, hidden: Tensor, token_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, LOGITS_BYTES // (4 * decoder.config.vocab_size))
    return list(zip(hidden.split(rows), token_ids.split(rows), strict=True))  # type: ignore[no-untyped-call]  # torch's


class _LogProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        totals, _ = totals_and_likeliest(logits)
        ctx.save_for_backward(logits, token_ids, totals)
        return logits.gather(1, token_ids[:, None])[:, 0] - totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids, totals = ctx.saved_tensors
        # In place: they are as large as all else that is held then.
        found = logits.sub_(totals[:, None]).exp_().mul_(-gradient[:, None])
        found.scatter_add_(1, token_ids[:, None], gradient[:, None])
        return found, None
