"""Conflicts in generation_config.json: those that transformers refuses or warns of, and ranges."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from hanok.check.generation import generation_findings

CHOICES: dict[str, list[Any]] = {
    "do_sample": [None, True, False],
    "temperature": [None, 1.0, 0.7],
    "top_p": [None, 1.0, 0.9],
    "top_k": [None, 50, 10],
    "min_p": [None, 0.1],
    "typical_p": [None, 1.0, 0.5],
    "num_beams": [None, 1, 4],
    "num_return_sequences": [None, 1, 3, 9],
    "early_stopping": [None, False, True],
    "length_penalty": [None, 1.0, 2.0],
    "max_new_tokens": [None, 5, 0],
}


def objects(**values: Any) -> bool:
    try:
        GenerationConfig(**values).validate(strict=True)
    except ValueError:
        return True
    return False


@settings(max_examples=300)
@given(st.fixed_dictionaries({name: st.sampled_from(items) for name, items in CHOICES.items()}))
def test_conflicts_are_those_of_transformers(values: dict[str, Any]) -> None:
    given_values = {name: value for name, value in values.items() if value is not None}
    assert bool(list(generation_findings(given_values))) == objects(**given_values)


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [
        ({"do_sample": "yes"}, "error", "do_sample is 'yes'"),
        ({"do_sample": True, "top_p": 1.5}, "error", "top_p is 1.5; it must be between 0 and 1"),
        ({"do_sample": True, "top_k": -5}, "error", "top_k is -5"),
        ({"repetition_penalty": 0.0}, "error", "repetition_penalty is 0.0"),
        ({"do_sample": True, "temperature": 0}, "error", "do_sample is true with temperature 0"),
        ({"max_new_tokens": 4, "min_new_tokens": 9}, "error", "min_new_tokens is 9"),
        ({"temperature": 0.6}, "warning", "do_sample is not set, so temperature = 0.6 has no"),
        ({"do_sample": False, "top_k": 5}, "warning", "do_sample is false, so top_k = 5 has no"),
        ({"length_penalty": 0.5}, "warning", "without num_beams, length_penalty = 0.5 has no"),
    ],
)
def test_a_conflict_is_named_with_its_values(
    values: dict[str, Any], level: str, message: str
) -> None:
    found = [item for item in generation_findings(values) if message in item.what]
    assert [item.level for item in found] == [level]


def test_published_settings_have_no_conflict() -> None:
    llama = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
    qwen = {**llama, "top_k": 20, "repetition_penalty": 1.05, "pad_token_id": 3}
    for values in ({}, llama, qwen, {"max_length": 4096, "_from_model_config": True}):
        assert list(generation_findings(values)) == []
