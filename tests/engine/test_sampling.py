"""Processors against transformers', penalties against their formulas, draws against the distribution."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hanok.engine.params import SamplingParams
from hanok.engine.sampling import (
    add_bias,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical_p,
    mark,
    penalise_counts,
    penalise_repetition,
    processed,
)

VOCAB = 12
quick = settings(max_examples=60)
# Distinct scores: which of two equal tokens is kept is nobody's rule.
LOGITS = st.lists(st.integers(-80, 80), min_size=VOCAB, max_size=VOCAB, unique=True).map(
    lambda values: torch.tensor(values, dtype=torch.float32) / 8
)
FRACTIONS = st.floats(0.05, 0.95)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=8)
NO_IDS = torch.zeros(1, 0, dtype=torch.int64)


def theirs(processor: Any, scores: Tensor, ids: list[int] | None = None) -> Tensor:
    row = torch.tensor([ids]) if ids else NO_IDS
    found: Tensor = processor(row, scores[None].clone())[0]
    return found


def drawing(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **options})


@quick
@given(logits=LOGITS, temperature=st.floats(0.1, 5))
def test_temperature_is_transformers(logits: Tensor, temperature: float) -> None:
    found = processed(logits, drawing(temperature=temperature), [], [])
    torch.testing.assert_close(found, theirs(TemperatureLogitsWarper(temperature), logits))


@quick
@given(logits=LOGITS, top_k=st.integers(1, VOCAB + 3))
def test_top_k_is_transformers(logits: Tensor, top_k: int) -> None:
    found = keep_top_k(logits, top_k)
    assert torch.equal(found, theirs(TopKLogitsWarper(top_k), logits))
    assert found.isfinite().sum() == min(top_k, VOCAB)


@quick
@given(logits=LOGITS, top_p=FRACTIONS)
def test_top_p_is_transformers(logits: Tensor, top_p: float) -> None:
    assert torch.equal(keep_top_p(logits, top_p), theirs(TopPLogitsWarper(top_p), logits))


@quick
@given(logits=LOGITS)
def test_top_p_of_0_keeps_the_likeliest_and_top_k_of_minus_1_all(logits: Tensor) -> None:
    found = processed(logits, drawing(top_p=0.0), [], [])
    assert found.isfinite().nonzero().flatten().tolist() == [int(logits.argmax())]
    assert torch.equal(found, theirs(TopPLogitsWarper(0.0), logits))
    assert torch.equal(processed(logits, drawing(top_k=-1), [], []), logits)


@quick
@given(logits=LOGITS, min_p=FRACTIONS)
def test_min_p_is_transformers(logits: Tensor, min_p: float) -> None:
    assert torch.equal(keep_min_p(logits, min_p), theirs(MinPLogitsWarper(min_p), logits))


@quick
@given(logits=LOGITS, typical_p=FRACTIONS)
def test_typical_p_is_transformers(logits: Tensor, typical_p: float) -> None:
    surprise = -logits.log_softmax(-1)
    distances = (surprise - (surprise * logits.softmax(-1)).sum()).abs().sort().values
    assume(float(distances.diff().min()) > 1e-4)  # no token is as typical as another
    found = keep_typical_p(logits, typical_p)
    assert torch.equal(found, theirs(TypicalLogitsWarper(typical_p), logits))


@quick
@given(logits=LOGITS, penalty=st.floats(0.3, 3), ids=IDS)
def test_repetition_penalty_is_transformers(logits: Tensor, penalty: float, ids: list[int]) -> None:
    found = penalise_repetition(logits, penalty, ids)
    if ids:
        expected = theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, ids)
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, logits)


@quick
@given(logits=LOGITS, prompt=IDS, generated=IDS.filter(bool), top_k=st.integers(2, VOCAB))
def test_all_together_are_transformers_in_its_order(
    logits: Tensor, prompt: list[int], generated: list[int], top_k: int
) -> None:
    params = drawing(repetition_penalty=1.3, temperature=0.7, top_k=top_k, top_p=0.9, min_p=0.05)
    expected = theirs(RepetitionPenaltyLogitsProcessor(1.3), logits, prompt + generated)
    for processor in (
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
    ):
        expected = theirs(processor, expected)
    torch.testing.assert_close(processed(logits, params, prompt, generated), expected)


SPREAD = torch.tensor([2.0, 1.9, 1.5, 1.0, 0.9, 0.3, 0.1, -0.4, -1.0, -1.3, -2.0, -6.0])
ALONE: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "temperature": ({"temperature": 0.5}, lambda scores: scores / 0.5),
    "top_k": ({"top_k": 4}, partial(keep_top_k, top_k=4)),
    "top_p": ({"top_p": 0.6}, partial(keep_top_p, top_p=0.6)),
    "min_p": ({"min_p": 0.3}, partial(keep_min_p, min_p=0.3)),
    "typical_p": ({"typical_p": 0.4}, partial(keep_typical_p, typical_p=0.4)),
    "repetition_penalty": (
        {"repetition_penalty": 1.7},
        partial(penalise_repetition, penalty=1.7, seen=[3, 5, 5]),
    ),
    "presence_penalty": (
        {"presence_penalty": 0.5},
        partial(penalise_counts, presence=0.5, frequency=0.0, generated=[5, 5]),
    ),
    "frequency_penalty": (
        {"frequency_penalty": 0.5},
        partial(penalise_counts, presence=0.0, frequency=0.5, generated=[5, 5]),
    ),
    "logit_bias": ({"logit_bias": {7: 2.5}}, partial(add_bias, bias={7: 2.5})),
    "watermark": (
        {"watermark_gamma": 0.25, "watermark_delta": 3.0},
        partial(mark, last_token=5, gamma=0.25, delta=3.0),
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_option_alone_applies_its_function(name: str) -> None:
    """Of a prompt [3] and an answer [5, 5]; the scores are such that each option changes them."""
    options, function = ALONE[name]
    found = processed(SPREAD, drawing(**options), [3], [5, 5])
    assert torch.equal(found, function(SPREAD))
    assert not torch.equal(found, SPREAD)


def test_typical_p_comes_last_as_in_transformers() -> None:
    params = drawing(temperature=0.7, top_k=8, top_p=0.9, min_p=0.05, typical_p=0.5)
    expected = SPREAD
    for processor in (
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(8),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
        TypicalLogitsWarper(0.5),
    ):
        expected = theirs(processor, expected)
    torch.testing.assert_close(processed(SPREAD, params, [], []), expected)


def test_a_watermark_follows_the_prompt_until_something_is_generated() -> None:
    params = drawing(watermark_gamma=0.25, watermark_delta=3.0)
    expected = mark(SPREAD, last_token=4, gamma=0.25, delta=3.0)
    assert torch.equal(processed(SPREAD, params, [3, 4], []), expected)
    assert int((expected != SPREAD).sum()) == VOCAB // 4


@quick
@given(logits=LOGITS, generated=IDS, presence=st.floats(-3, 3), frequency=st.floats(-3, 3))
def test_presence_and_frequency_follow_their_formula(
    logits: Tensor, generated: list[int], presence: float, frequency: float
) -> None:
    counts = Counter(generated)
    expected = [
        score - presence * (counts[token] > 0) - frequency * counts[token]
        for token, score in enumerate(logits.tolist())
    ]
    found = penalise_counts(logits, presence, frequency, generated)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_prompt_counts_for_repetition_and_not_for_presence() -> None:
    logits = torch.ones(VOCAB)
    repeated = processed(logits, drawing(repetition_penalty=2.0), [3], [5])
    assert (repeated != 1).nonzero().flatten().tolist() == [3, 5]
    present = processed(logits, drawing(presence_penalty=0.5), [3], [5])
    assert (present != 1).nonzero().flatten().tolist() == [5]
    frequent = processed(logits, drawing(frequency_penalty=0.5), [3, 3], [5, 5])
    assert frequent.tolist() == [0.0 if token == 5 else 1.0 for token in range(VOCAB)]


@quick
@given(logits=LOGITS)
def test_the_defaults_change_nothing_and_nothing_changes_the_logits(logits: Tensor) -> None:
    kept = logits.clone()
    assert torch.equal(processed(logits, SamplingParams(), [1], [2]), kept)
    options = {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "presence_penalty": 1.0}
    options |= {"frequency_penalty": 1.0, "repetition_penalty": 2.0, "logit_bias": {1: 3.0}}
    processed(logits, drawing(**options), [1], [2])
    assert torch.equal(logits, kept)


def test_penalties_and_biases_apply_at_temperature_0() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    for options in ({"presence_penalty": 1.5}, {"repetition_penalty": 2.0}):
        params = SamplingParams(**options)  # type: ignore[arg-type]
        assert draw(processed(logits, params, [], [0]), params, generator) == 1
    params = SamplingParams(logit_bias={2: 5.0})
    assert draw(processed(logits, params, [], []), params, generator) == 2


def test_a_bias_is_added_to_its_tokens_alone() -> None:
    logits = torch.arange(4.0)
    assert add_bias(logits, {0: 2.5, 3: -100.0}).tolist() == [2.5, 1.0, 2.0, -97.0]
    assert logits.tolist() == [0.0, 1.0, 2.0, 3.0]


def draws(scores: Tensor, params: SamplingParams, seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [draw(scores, params, generator) for _ in range(count)]


def test_draws_follow_the_distribution() -> None:
    """4,000 draws of 8 tokens: the expected total variation is near 0.015, so 0.04 is far out."""
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5, 1.5, -3.0, 0.1])
    for temperature in (0.5, 1.0, 2.0):
        params = drawing(temperature=temperature)
        found = draws(processed(logits, params, [], []), params, 0, 4000)
        frequencies = torch.bincount(torch.tensor(found), minlength=8) / 4000
        distance = (frequencies - (logits / temperature).softmax(-1)).abs().sum() / 2
        assert distance < 0.04


def test_the_same_seed_draws_the_same_and_another_one_differs() -> None:
    scores, params = torch.zeros(50), drawing()
    first = draws(scores, params, 7, 40)
    assert draws(scores, params, 7, 40) == first
    assert draws(scores, params, 8, 40) != first


def test_a_draw_takes_one_number_whatever_the_scores() -> None:
    states = []
    for scores in (torch.zeros(5), torch.arange(900.0)):
        generator = torch.Generator().manual_seed(1)
        draw(scores, drawing(), generator)
        states.append(generator.get_state())
    expected = torch.Generator().manual_seed(1)
    torch.rand((), generator=expected, dtype=torch.float64)
    assert all(torch.equal(state, expected.get_state()) for state in states)


@quick
@given(logits=LOGITS, kept=st.sets(st.integers(0, VOCAB - 1), min_size=1), seed=st.integers(0, 99))
def test_excluded_tokens_are_never_drawn(logits: Tensor, kept: set[int], seed: int) -> None:
    mask = torch.ones(VOCAB, dtype=torch.bool)
    mask[list(kept)] = False
    scores = logits.masked_fill(mask, float("-inf"))
    assert set(draws(scores, drawing(), seed, 20)) <= kept


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_kept_tokens(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inf = float("-inf")
    scores = torch.tensor([inf, inf, 0.3, inf, 1.7, inf, inf])
    fixed = torch.tensor(number, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *args, **options: fixed)
    found = draw(scores, drawing(), torch.Generator())
    assert found == (2 if number == 0 else 4)


@quick
@given(logits=LOGITS)
def test_temperature_0_takes_the_likeliest(logits: Tensor) -> None:
    params = SamplingParams()
    found = draw(processed(logits, params, [], []), params, torch.Generator())
    assert found == max(range(VOCAB), key=lambda token: float(logits[token]))


@pytest.mark.parametrize(
    "keep", [keep_top_p, keep_min_p, keep_typical_p], ids=["top_p", "min_p", "typical_p"]
)
@pytest.mark.parametrize("strictness", [1e-6, 0.5, 1 - 1e-6])
def test_at_least_one_token_is_kept(keep: Any, strictness: float) -> None:
    for scores in (torch.zeros(VOCAB), torch.arange(float(VOCAB)) * 100):
        assert keep(scores, strictness).isfinite().any()
