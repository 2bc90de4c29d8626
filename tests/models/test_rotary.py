"""Rotary embeddings: the formulas against transformers, and what a rotation must do.

Frequencies are float32 on both sides; the order of two products may differ: relative 1e-6. Scores of
rotated heads are sums of 16 products of the order of 1 with angles up to a few hundred, whose float32
error is 2e-5.
"""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hanok.attention.base import ForwardBatch
from hanok.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)
from hanok.models.keys import Keys
from hanok.models.rotary import Rotary, inverse_frequencies

SCORE_TOLERANCE = 1e-3
FREQUENCY_TOLERANCE = {"rtol": 1e-6, "atol": 0.0}
HEAD_DIM, MAX_POSITIONS = 32, 64

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn whose ramp has no width": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 6,
    },
    "yarn with everything": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn with an attention factor": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.7,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 10 for i in range(HEAD_DIM // 2)],
        "long_factor": [2.0 + i for i in range(HEAD_DIM // 2)],
        "original_max_position_embeddings": 16,
    },
    "longrope with an attention factor": {
        "rope_type": "longrope",
        "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [3.0] * (HEAD_DIM // 2),
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
    },
}
LENGTH_MATTERS = {"dynamic", "longrope", "longrope with an attention factor"}


def rope_of(parameters: dict[str, Any], theta: float = 10000.0) -> Rope:
    config = {
        "model_type": "llama",
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_theta": theta, **parameters},
    }
    return Keys(config, "config.json").rope(HEAD_DIM)


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 65, 150])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factor_are_transformers(name: str, theta: float, num_tokens: int) -> None:
    parameters = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    oracle = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    expected, expected_factor = oracle(config, torch.device("cpu"), seq_len=num_tokens)
    frequencies, factor = inverse_frequencies(rope_of(parameters, theta), num_tokens)
    torch.testing.assert_close(frequencies, expected, **FREQUENCY_TOLERANCE)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_only_dynamic_and_longrope_frequencies_depend_on_the_length(name: str) -> None:
    short, _ = inverse_frequencies(rope_of(SCALINGS[name]), 8)
    long, _ = inverse_frequencies(rope_of(SCALINGS[name]), 200)
    assert torch.equal(short, long) is (name not in LENGTH_MATTERS)


@pytest.mark.parametrize("name", SCALINGS)
@settings(max_examples=50)
@given(first=st.integers(1, 300), second=st.integers(1, 300))
def test_lengths_with_the_same_answer_share_their_angles(
    name: str, first: int, second: int
) -> None:
    rope = rope_of(SCALINGS[name])
    one, other = rope.angles_for(first), rope.angles_for(second)
    angles = [inverse_frequencies(rope, length)[0] for length in (first, second)]
    assert torch.equal(*angles) is (one == other)
    # What stands for a length has that length's angles.
    assert torch.equal(inverse_frequencies(rope, one)[0], angles[0])


def test_the_length_that_angles_are_computed_for() -> None:
    dynamic = Rope(theta=1e4, rotary_dim=8, scaling=DynamicScaling(factor=2.0, max_positions=10))
    assert [dynamic.angles_for(n) for n in (1, 10, 11, 30)] == [10, 10, 11, 30]
    longrope = Rope(
        theta=1e4,
        rotary_dim=4,
        scaling=LongRopeScaling(
            short_factor=(1.0, 1.0),
            long_factor=(2.0, 2.0),
            original_max_positions=10,
            attention_factor=1.0,
        ),
    )
    assert [longrope.angles_for(n) for n in (1, 10, 11, 30)] == [10, 10, 11, 11]
    for scaling in (
        None,
        LinearScaling(factor=2.0, original_max_positions=64),
        Llama3Scaling(
            factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=10
        ),
        YarnScaling(factor=2.0, original_max_positions=10, attention_factor=1.0),
    ):
        assert Rope(theta=1e4, rotary_dim=8, scaling=scaling).angles_for(30) == 0


def rotated(rotary: Rotary, heads: Tensor, positions: list[int]) -> Tensor:
    """Each row of (tokens, heads, head_dim) at its own position."""
    batch = ForwardBatch.of([[0]] * len(positions), past=positions)
    return rotary.rotate(heads, rotary.cos_sin(batch, heads.dtype))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8])
@settings(max_examples=30)
@given(first=st.integers(0, 200), second=st.integers(0, 200), shift=st.integers(0, 300))
def test_a_score_depends_on_the_distance_alone(
    rotary_dim: int, is_interleaved: bool, first: int, second: int, shift: int
) -> None:
    rotary = Rotary(Rope(theta=1e4, rotary_dim=rotary_dim, is_interleaved=is_interleaved))
    q, k = random(1, 3, 16, seed=1), random(1, 3, 16, seed=2)

    def scores(query: int, key: int) -> Tensor:
        return (rotated(rotary, q, [query]) * rotated(rotary, k, [key])).sum(-1)

    torch.testing.assert_close(
        scores(first, second), scores(first + shift, second + shift), atol=SCORE_TOLERANCE, rtol=0
    )
    if first != second:  # and it does depend on it
        assert (scores(first, second) - scores(first, first)).abs().max() > SCORE_TOLERANCE


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_each_pair_is_rotated_as_a_complex_number(is_interleaved: bool) -> None:
    rope = Rope(theta=100.0, rotary_dim=8, is_interleaved=is_interleaved)
    heads, positions = random(5, 2, 12, seed=1), [0, 1, 2, 17, 90]
    pairs = [(2 * i, 2 * i + 1) if is_interleaved else (i, i + 4) for i in range(4)]
    expected = heads.clone()
    for index, (real, imaginary) in enumerate(pairs):
        for row, position in enumerate(positions):
            angle = torch.tensor(position * 100.0 ** (-2 * index / 8), dtype=torch.float64)
            number = torch.complex(heads[row, :, real].double(), heads[row, :, imaginary].double())
            number = number * torch.polar(torch.tensor(1.0, dtype=torch.float64), angle)
            expected[row, :, real] = number.real.float()
            expected[row, :, imaginary] = number.imag.float()
    answer = rotated(Rotary(rope), heads, positions)
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0)
    assert torch.equal(answer[0], heads[0])  # position 0 rotates nothing
    assert torch.equal(answer[..., 8:], heads[..., 8:])  # nor is the rest of a head touched


def test_interleaved_and_halves_are_permutations_of_each_other() -> None:
    heads, positions = random(4, 2, 16, seed=3), [0, 3, 40, 41]
    order = torch.tensor(
        [place for pair in zip(range(8), range(8, 16), strict=True) for place in pair]
    )
    halves = rotated(Rotary(Rope(theta=1e4, rotary_dim=16)), heads, positions)
    neighbours = rotated(
        Rotary(Rope(theta=1e4, rotary_dim=16, is_interleaved=True)), heads[..., order], positions
    )
    # The two are compiled apart, and a product may be fused into its sum in one of them.
    torch.testing.assert_close(neighbours, halves[..., order], rtol=0, atol=5e-7)
    assert not torch.equal(neighbours, halves)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_a_grown_table_keeps_what_it_had(name: str) -> None:
    rotary = Rotary(rope_of(SCALINGS[name]))
    short = ForwardBatch.of([[0] * 20])
    before = rotary.cos_sin(short, torch.float32).clone()
    grown = rotary.cos_sin(ForwardBatch.of([[0] * 500]), torch.float32)
    assert torch.equal(grown[:, :20], before)
    assert torch.equal(rotary.cos_sin(short, torch.float32), before)
    assert torch.equal(
        grown, Rotary(rotary.rope).cos_sin(ForwardBatch.of([[0] * 500]), torch.float32)
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_each_packed_sequence_has_the_angles_of_its_own_length(name: str) -> None:
    rope = rope_of(SCALINGS[name])
    lengths = [10, 70, 15, 90]
    packed = Rotary(rope).cos_sin(ForwardBatch.of([[0] * n for n in lengths]), torch.float32)
    alone = [Rotary(rope).cos_sin(ForwardBatch.of([[0] * n]), torch.float32) for n in lengths]
    assert torch.equal(packed, torch.cat(alone, dim=1))


def test_the_length_still_to_come_decides_the_angles_of_the_first_tokens() -> None:
    rope = rope_of(SCALINGS["longrope"])
    early = ForwardBatch.of([[0] * 10], sequence_lengths=[50])
    whole = Rotary(rope).cos_sin(ForwardBatch.of([[0] * 50]), torch.float32)
    assert torch.equal(Rotary(rope).cos_sin(early, torch.float32), whole[:, :10])


def test_tables_are_kept_apart_by_dtype() -> None:
    rotary, batch = Rotary(Rope(theta=1e4, rotary_dim=8)), ForwardBatch.of([[0] * 9])
    exact = rotary.cos_sin(batch, torch.float32)
    rounded = rotary.cos_sin(batch, torch.bfloat16)
    assert rounded.dtype is torch.bfloat16
    # Angles are float32 and only their cosines and sines are rounded.
    assert torch.equal(rounded, exact.to(torch.bfloat16))
    assert torch.equal(rotary.cos_sin(batch, torch.float32), exact)


def test_a_table_is_as_long_as_the_positions_seen() -> None:
    """Whatever the model's context: no table is made of positions that nobody has reached."""
    rotary = Rotary(Rope(theta=1e4, rotary_dim=8))
    for tokens, positions in ((9, 64), (65, 128), (9, 128), (1000, 1024)):
        rotary.cos_sin(ForwardBatch.of([[0] * tokens]), torch.float32)
        (table,) = [table for _, table in rotary._tables.values()]
        assert table.shape == (2, positions, 1, 8)
