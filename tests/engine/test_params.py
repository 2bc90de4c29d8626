"""The options of a generation: their ranges and types, and what a checkpoint recommends."""

import math
from dataclasses import fields
from typing import Any

import pytest

from hanok.engine.params import (
    GENERATION_CONFIG_FIELDS,
    NEUTRAL,
    SamplingOptions,
    SamplingParams,
    from_generation_config,
    seed_of_answer,
    unsupported_defaults,
)
from hanok.errors import OptionError

RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("max_new_tokens", [1, 10**9], [0, -1]),
    ("temperature", [0.0, 0.01, 100], [-0.1, math.inf, math.nan]),
    ("top_k", [-1, 0, 1, 10**9], [-2]),
    ("top_p", [0.0, 0.001, 1.0], [-0.001, 1.001, -1.0, math.nan]),
    ("min_p", [0.0, 1.0], [-0.001, 1.001, math.nan]),
    ("typical_p", [0.001, 1.0], [0.0, 1.001, math.nan]),
    ("repetition_penalty", [0.01, 10.0], [0.0, -1.0, math.nan]),
    ("presence_penalty", [-100.0, 100.0], [-100.1, 100.1, math.nan]),
    ("frequency_penalty", [-100.0, 100.0], [-100.1, 100.1, math.nan]),
    ("seed", [None, 0, -(2**63), 2**64 - 1], [2**64, -(2**63) - 1]),
    ("stop", [[], ["a", "b"]], [[""], ["a", ""]]),
    ("top_logprobs", [0, 1000], [-1, 1001]),
]
RIGHT = [(name, value) for name, values, _ in RANGES for value in values]
WRONG = [(name, value) for name, _, values in RANGES for value in values]

WRONG_TYPES = [
    ("max_new_tokens", 1.5),
    ("max_new_tokens", "8"),
    ("max_new_tokens", True),
    ("max_new_tokens", None),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", None),
    ("top_k", 2.0),
    ("top_p", [0.5]),
    ("logit_bias", [(1, 2.0)]),
    ("logit_bias", 3),
    ("logit_bias", {"1": 2.0}),
    ("logit_bias", {1: "much"}),
    ("seed", 1.0),
    ("seed", "1"),
    ("seed", False),
    ("stop", 5),
    ("stop", [5]),
    ("stop", None),
    ("stop", {"a": 1}),
    ("stop_token_ids", "abc"),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", 1.0),
    ("spelled_token_ids", ["a"]),
    ("ignore_eos", 1),
    ("ignore_eos", "yes"),
    ("top_logprobs", 2.0),
]


def test_the_options_are_exactly_the_fields() -> None:
    assert set(SamplingOptions.__annotations__) == {item.name for item in fields(SamplingParams)}
    assert not SamplingOptions.__required_keys__


def test_the_defaults_are_greedy_and_neutral() -> None:
    params = SamplingParams()
    assert params.temperature == 0
    assert params.updated({}) == params
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (
        1.0,
        0.0,
        0.0,
    )


@pytest.mark.parametrize(("name", "value"), RIGHT)
def test_a_value_in_range_is_taken(name: str, value: Any) -> None:
    found = getattr(SamplingParams(temperature=1.0).updated({name: value}), name)
    assert found == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_out_of_range_is_refused_with_the_range(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(temperature=1.0).updated({name: value})
    message = str(caught.value)
    shown = tuple(value) if isinstance(value, list) else value
    assert message.startswith(f"{name} is {shown!r}; it must be ")
    with pytest.raises(OptionError):
        SamplingParams(**{name: tuple(value) if isinstance(value, list) else value})


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams().updated({name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}, which is not of the right type")


@pytest.mark.parametrize(
    ("name", "guess"),
    [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("topk", "top_k")],
)
def test_an_unknown_option_is_refused_with_a_guess(name: str, guess: str) -> None:
    with pytest.raises(OptionError, match=f"no option '{name}'; did you mean '{guess}'"):
        SamplingParams().updated({name: 1})


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p"])
def test_an_option_that_needs_draws_is_refused_at_temperature_0(name: str) -> None:
    value = 5 if name == "top_k" else 0.5
    with pytest.raises(OptionError, match=f"^{name} given, but the temperature is 0"):
        SamplingParams().updated({name: value})
    with pytest.raises(OptionError, match=f"^{name} given"):
        SamplingParams(temperature=1.0).updated({name: value, "temperature": 0})
    found = SamplingParams().updated({name: value, "temperature": 0.5})
    assert getattr(found, name) == value


def test_inherited_options_for_draws_do_not_stop_a_greedy_run() -> None:
    sampling = from_generation_config({"do_sample": True, "top_p": 0.9})
    assert sampling.updated({"temperature": 0}).temperature == 0


def test_one_stop_may_stand_without_a_list() -> None:
    found = SamplingParams().updated({"stop": "END", "stop_token_ids": 7})
    assert found.stop == ("END",)
    assert found.stop_token_ids == (7,)


def test_updating_leaves_the_original_as_it_is() -> None:
    params = SamplingParams(seed=3)
    assert params.updated({"seed": 4, "max_new_tokens": 2}).seed == 4
    assert params == SamplingParams(seed=3)
    assert params.updated({"max_new_tokens": 2}).seed == 3


def test_each_answer_of_a_seed_has_a_seed_of_its_own() -> None:
    seeds = [seed_of_answer(seed, index) for seed in (0, 1, -1, 2**64 - 1) for index in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert [seed_of_answer(seed, 0) for seed in (7, None)] == [7, None]
    assert seed_of_answer(None, 3) is None
    for seed in seeds:
        assert SamplingParams(seed=seed).seed == seed


RECOMMENDED = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.1,
    "typical_p": 0.8,
    "repetition_penalty": 1.05,
    "presence_penalty": 1.5,
    "frequency_penalty": 0.2,
    "max_new_tokens": 99,
}


def test_recommendations_hold_where_the_file_samples() -> None:
    found = from_generation_config({**RECOMMENDED, "do_sample": True})
    assert found == SamplingParams(**RECOMMENDED)  # type: ignore[arg-type]
    assert set(RECOMMENDED) == set(GENERATION_CONFIG_FIELDS)


@pytest.mark.parametrize("do_sample", [{}, {"do_sample": False}, {"do_sample": None}])
def test_without_do_sample_the_defaults_are_greedy(do_sample: dict[str, Any]) -> None:
    found = from_generation_config(RECOMMENDED | do_sample)
    assert found == SamplingParams(
        repetition_penalty=1.05, presence_penalty=1.5, frequency_penalty=0.2, max_new_tokens=99
    )


def test_sampling_without_a_temperature_is_at_1_and_null_is_no_recommendation() -> None:
    assert from_generation_config({"do_sample": True}) == SamplingParams(temperature=1.0)
    nulls: dict[str, Any] = {**dict.fromkeys(GENERATION_CONFIG_FIELDS), "do_sample": True}
    assert from_generation_config(nulls) == SamplingParams(temperature=1.0)


def test_other_keys_of_the_file_are_none_of_the_options() -> None:
    values = {"bos_token_id": 1, "eos_token_id": [2, 3], "transformers_version": "5.0"}
    assert from_generation_config(values) == SamplingParams()


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_followed_is_noted_and_what_asks_for_nothing_is_not(name: str) -> None:
    (note,) = unsupported_defaults({name: 7}, 100)
    assert f"{name} = 7" in note
    assert unsupported_defaults({name: NEUTRAL[name]}, 100) == ()
    assert unsupported_defaults({name: None}, 100) == ()


def test_what_is_followed_needs_no_note() -> None:
    values = {**RECOMMENDED, "do_sample": True, "eos_token_id": 2, "stop_strings": ["x"]}
    assert unsupported_defaults(values, 100) == ()
    assert unsupported_defaults({"max_length": 4096}, 4096) == ()
    assert len(unsupported_defaults({"max_length": 4096}, 4097)) == 1


@pytest.mark.parametrize("stops", ["###", ["###", "END"]])
def test_stop_strings_are_stop_texts(stops: str | list[str]) -> None:
    found = from_generation_config({"stop_strings": stops})
    assert found.stop == ((stops,) if isinstance(stops, str) else tuple(stops))
    assert found.updated({"stop": ["else"]}).stop == ("else",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -5),
        ("top_k", "40"),
        ("top_p", 1.5),
        ("temperature", "hot"),
        ("temperature", -1.0),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0),
        ("stop_strings", [5]),
    ],
)
def test_a_recommendation_that_cannot_be_is_left_out_and_noted(name: str, value: Any) -> None:
    right: dict[str, Any] = {"do_sample": True, "min_p": 0.1}
    found = from_generation_config(right | {name: value})
    assert found == from_generation_config(right)
    (note,) = unsupported_defaults(right | {name: value}, 100)
    assert repr(value) in note
    assert name in note


@pytest.mark.parametrize("value", ["true", "false", 2, [True]])
def test_a_do_sample_that_is_neither_true_nor_false_is_noted(value: Any) -> None:
    assert from_generation_config({"do_sample": value, "top_p": 0.5}) == SamplingParams()
    (note,) = unsupported_defaults({"do_sample": value}, 100)
    assert f"do_sample is {value!r}; it must be true or false" in note


def test_a_recommended_temperature_of_zero_is_greedy() -> None:
    values = {"do_sample": True, "temperature": 0.0, "top_p": 0.9}
    assert from_generation_config(values) == SamplingParams()
