"""How the next token is chosen: the processors that change scores, and the draw.

Processors are pure functions of one row of logits, (vocab,) float32, in the order of `processed`. They
agree with transformers' where it has the same (temperature, top-k, top-p, min-p, typical-p,
repetition penalty) and with OpenAI's definition for presence and frequency penalties.

A sequence draws with its own generator, one number for each token, so its text depends on its
seed and nothing else that runs.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hanok.engine.params import SamplingParams

WATERMARK_KEY = 15485863  # that of the paper's and of text-generation-inference's watermarks


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let torch compute on this thread alone, on a CPU.

    A vocabulary's numbers are just enough for torch to share them out, in ten short steps a token. Each
    gains microseconds where nothing else runs, and waits for milliseconds where something does.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processed(
    logits: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    *,
    banned: Collection[int] = (),
) -> Tensor:
    """Return the scores that the next token is drawn from, (vocab,) float32; excluded ones are -inf.

    `banned` tokens are excluded.
    """
    scores = logits
    if banned:
        ids = torch.tensor([*banned], device=logits.device)
        scores = scores.index_fill(0, ids, float("-inf"))
    if params.logit_bias:
        scores = add_bias(scores, params.logit_bias)
    if params.repetition_penalty != 1.0:
        scores = penalise_repetition(
            scores, params.repetition_penalty, [*prompt_ids, *generated_ids]
        )
    if params.presence_penalty or params.frequency_penalty:
        scores = penalise_counts(
            scores, params.presence_penalty, params.frequency_penalty, generated_ids
        )
    if params.watermark_delta:
        last = generated_ids[-1] if generated_ids else prompt_ids[-1]
        scores = mark(scores, last, params.watermark_gamma, params.watermark_delta)
    if params.temperature == 0:
        return scores
    scores = scores / params.temperature
    if params.top_k > 0:
        scores = keep_top_k(scores, params.top_k)
    if params.top_p == 0:
        scores = keep_top_k(scores, 1)
    elif params.top_p < 1:
        scores = keep_top_p(scores, params.top_p)
    if params.min_p > 0:
        scores = keep_min_p(scores, params.min_p)
    if params.typical_p < 1:
        scores = keep_typical_p(scores, params.typical_p)
    return scores


def add_bias(scores: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Return the scores with a number added to some tokens'."""
    ids = torch.tensor(list(bias), device=scores.device)
    values = torch.tensor(list(bias.values()), dtype=scores.dtype, device=scores.device)
    return scores.index_add(0, ids, values)


def penalise_repetition(scores: Tensor, penalty: float, seen: Sequence[int]) -> Tensor:
    """Return the scores with seen tokens' made smaller (arXiv 1909.05858)."""
    ids = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=scores.device)
    old = scores[ids]
    return scores.index_copy(0, ids, torch.where(old < 0, old * penalty, old / penalty))


def penalise_counts(
    scores: Tensor, presence: float, frequency: float, generated: Sequence[int]
) -> Tensor:
    """Return scores - presence * [count > 0] - frequency * count, counting generated tokens."""
    ids = torch.tensor(generated, dtype=torch.int64, device=scores.device)
    counts = torch.bincount(ids, minlength=len(scores)).to(scores.dtype)
    return scores - presence * (counts > 0) - frequency * counts


def mark(scores: Tensor, last_token: int, gamma: float, delta: float) -> Tensor:
    """Return the scores with a share `gamma` of the vocabulary preferred (arXiv 2301.10226).

    Which tokens are depends on the last token alone, so that who knows the key can count them.
    """
    generator = torch.Generator().manual_seed(WATERMARK_KEY * last_token)
    preferred = torch.randperm(len(scores), generator=generator)[: int(gamma * len(scores))]
    return scores.index_add(
        0,
        preferred.to(scores.device),
        torch.full((len(preferred),), delta, dtype=scores.dtype, device=scores.device),
    )


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Return the scores with all below the `top_k`-th largest excluded."""
    smallest = scores.topk(min(top_k, len(scores))).values[-1]
    return scores.masked_fill(scores < smallest, float("-inf"))


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Return the scores with the least likely tokens excluded that sum to at most 1 - top_p."""
    ordered, ids = scores.sort()
    excluded = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    excluded[-1] = False
    return scores.masked_fill(excluded.scatter(0, ids, excluded), float("-inf"))


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Return the scores with tokens excluded that are less likely than min_p times the likeliest."""
    likelihoods = scores.softmax(-1)
    return scores.masked_fill(likelihoods < min_p * likelihoods.max(), float("-inf"))


def keep_typical_p(scores: Tensor, typical_p: float) -> Tensor:
    """Return the scores of the tokens whose surprise is nearest to the expected one."""
    logprobs = scores.log_softmax(-1)
    likelihoods = logprobs.exp()
    entropy = -(logprobs * likelihoods).nansum()
    distance, ids = (-logprobs - entropy).abs().sort()
    last = int((likelihoods[ids].cumsum(-1) < typical_p).sum().clamp(max=len(scores) - 1))
    return scores.masked_fill((-logprobs - entropy).abs() > distance[last], float("-inf"))


def draw(scores: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Return a token id: the likeliest at temperature 0, else one drawn by its probability.

    Draws by inverting the cumulative distribution in float64 with one number of the generator.
    """
    if params.temperature == 0:
        return int(scores.argmax())
    cumulative = scores.double().softmax(-1).cumsum(-1).cpu()
    number = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(torch.searchsorted(cumulative, number, right=True).clamp(max=len(scores) - 1))
