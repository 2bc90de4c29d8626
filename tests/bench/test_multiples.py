"""What is said about sizes, from times that are made up, and that everything named is measured."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hanok.bench import multiples
from hanok.bench.attention import AttentionCase, Conditions
from hanok.bench.multiples import around, group_of, measure_multiples
from hanok.bench.spread import Spread
from hanok.errors import OptionError

SHAPE = AttentionCase(num_heads=4, num_kv_heads=2, head_dim=40, keys=12, dtype="float32")


def quick() -> Conditions:
    return Conditions(device=torch.device("cpu"), rounds=2, ring_bytes=0, min_sample_s=0.0)


def test_sizes_are_around_the_base() -> None:
    assert around(2048) == [1984, 2040, 2047, 2048, 2049, 2056, 2112]
    assert around(64) == [56, 63, 64, 65, 72, 128]


def sentence(eight: list[float], other: list[float]) -> str:
    """The finding for FLOP of 1, so that times are costs; the base takes 1 second."""
    seconds = {64: [1.0, 1.0, 1.0], 72: eight, 63: other}
    return group_of("what", 64, seconds, dict.fromkeys(seconds, 1)).finding


def test_the_finding_follows_from_the_numbers() -> None:
    assert sentence([1.0, 0.9, 1.1], [1.5, 1.4, 1.6]) == (
        "what: next to 64, other multiples of 8 cost the same within the spread (0.90 to 1.10 times) "
        "and sizes that are no multiple of 8 take 50% (40% to 60%) longer per FLOP."
    )
    assert "other multiples of 8 take 20% (10% to 30%) less time" in sentence(
        [0.8, 0.9, 0.7], [1.0] * 3
    )


def test_costs_are_per_flop_and_relative_to_the_base() -> None:
    group = group_of("w", 64, {64: [2.0, 4.0, 2.0], 128: [4.0, 8.0, 8.0]}, {64: 10, 128: 40})
    assert [row.size for row in group.rows] == [64, 128]
    assert group.rows[1].per_flop == Spread(1.0, 0.5, 1.0)
    assert group.rows[0].per_flop == Spread(1.0, 1.0, 1.0)
    assert group.rows[1].seconds == Spread(8.0, 4.0, 8.0)


def test_a_kind_is_the_median_of_its_sizes_in_each_round() -> None:
    costs = {64: [1.0, 1.0], 63: [1.0, 2.0], 65: [3.0, 2.0], 67: [9.0, 2.0]}
    assert "no multiple of 8 take 150% (100% to 200%) longer" in multiples.finding("w", 64, costs)


def test_products_and_heads_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[Any] = []
    real = multiples.dense

    def spy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products.append((tuple(x.shape), tuple(weight.shape), weight.is_contiguous()))
        return real(x, weight)

    monkeypatch.setattr(multiples, "dense", spy)
    said: list[str] = []
    report = measure_multiples(64, (1, 3), SHAPE, quick(), progress=said.append)
    assert said == [group.what for group in report.groups]
    assert said[:2] == ["linear, 1 token", "linear, 3 tokens"]
    assert any(text.startswith("head_dim, sdpa, 3 queries over 12 keys") for text in said)
    assert {group.base for group in report.groups} == {64}
    assert [row.size for row in report.groups[0].rows] == around(64)
    assert {shapes for shapes in products} == {
        ((tokens, size), (size, size), True) for tokens in (1, 3) for size in around(64)
    }


def test_groups_without_time_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = replace(quick(), budget_s=1e-9)
    monkeypatch.setattr(multiples, "take_turns", None)  # nothing is measured
    report = measure_multiples(64, (1, 3), SHAPE, conditions)
    assert report.groups == ()
    assert len(report.left_out) >= 4
    assert report.left_out[0].startswith("linear, 1 token: no time for it within --budget (a call")
    assert measure_multiples(64, (), SHAPE, quick()).left_out == ()


@pytest.mark.parametrize("size", [0, 2047, 8, -64])
def test_a_base_that_is_no_multiple_is_refused(size: int) -> None:
    with pytest.raises(OptionError, match="must be a multiple of 64"):
        measure_multiples(size, (1,), SHAPE, quick())
