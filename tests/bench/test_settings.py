"""Axes: what a grid file may say, and what it means."""

import itertools

import pytest

from hanok.bench.settings import (
    Axes,
    Setting,
    Workload,
    default_axes,
    read_axes,
    read_setting,
)
from hanok.errors import OptionError
from hanok.memory.options import read_device_map


def test_a_grid_file_is_all_combinations() -> None:
    text = """
        attention = ["eager", "native"]
        cache = [false, true]
        prompt_tokens = [76, 2794]
        new_tokens = 64
    """
    axes = read_axes(text, "grid.toml")
    expected = [
        (
            Setting(attention=attention, cache=cache),
            Workload(prompt_tokens=prompt, new_tokens=64, batch=1),
        )
        for prompt, attention, cache in itertools.product(
            (76, 2794), ("eager", "native"), (False, True)
        )
    ]
    assert axes.combinations() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atention = 'sdpa'", r"grid: there is no axis 'atention'. Axes: attention,"),
        ("cache = 'yes'", "cache has 'yes'; it must be true or false"),
        ("prompt_tokens = [0]", "prompt_tokens has 0; it must be a number from 1 on"),
        ("prompt_tokens = true", "prompt_tokens has True; it must be a number from 1 on"),
        ("batch = []", "batch is an empty list"),
        ("dtype = 'bfloat61'", "dtype 'bfloat61' is unknown. Choose one of: bfloat16"),
        (
            "speculation = ['off', 'n-gram']",
            "speculation 'n-gram' is unknown. Choose one of: ngram",
        ),
        ("cache_dtype = 'int4'", "cache_dtype 'int4' is unknown"),
        ("attention = ", "grid is not TOML"),
    ],
)
def test_what_a_grid_file_may_not_say(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        read_axes(text, "grid")


def test_a_setting_on_one_line() -> None:
    assert read_setting("attention=sdpa,cache=false") == Setting(attention="sdpa", cache=False)
    assert read_setting("") == Setting()
    with pytest.raises(OptionError, match="'sdpa' is not AXIS=VALUE"):
        read_setting("sdpa")
    with pytest.raises(OptionError, match="there is no axis 'atention'"):
        read_setting("atention=sdpa")


def test_device_maps_are_names_or_modules() -> None:
    axes = read_axes('device_map = ["cpu", {"model.embed_tokens" = "cpu", "" = 0}]', "grid")
    by_name, by_hand = axes.device_map
    assert read_device_map(by_name) == "cpu"
    assert read_device_map(by_hand) == {"model.embed_tokens": "cpu", "": 0}


def test_labels_say_what_is_not_usual() -> None:
    assert Setting(attention="native", dtype="bfloat16").label("bfloat16") == "native"
    setting = Setting(
        attention="sdpa",
        dtype="float32",
        cache=False,
        quant="int8",
        cache_dtype="int8",
        speculation="ngram",
        device_map="cpu",
    )
    label = "sdpa, no cache, float32, int8, int8 cache, ngram speculation, on cpu"
    assert setting.label("bfloat16") == label
    assert Workload(prompt_tokens=2794, new_tokens=64, batch=1).label == "2,794 + 64 tokens"
    assert Workload(prompt_tokens=8, new_tokens=4, batch=3).label == "3 sequences of 8 + 4 tokens"


def test_rows_share_a_load_unless_weights_differ() -> None:
    base = Setting()
    assert base.load == Setting(attention="eager", cache=False, cache_dtype="int8").load
    others = [
        Setting(quant="int8"),
        Setting(dtype="float32"),
        Setting(device_map="cpu"),
        Setting(speculation="draft"),
    ]
    assert len({base.load, *(item.load for item in others)}) == 5
    assert Setting(speculation="ngram").load == base.load


def test_the_short_grid_touches_every_axis() -> None:
    combinations = [item for axes in default_axes() for item in axes.combinations()]
    for name in ("attention", "cache", "dtype", "quant", "cache_dtype", "speculation"):
        assert len({getattr(setting, name) for setting, _ in combinations}) > 1, name
    for name in ("prompt_tokens", "batch"):
        assert len({getattr(workload, name) for _, workload in combinations}) > 1, name
    assert Axes().combinations() == [
        (Setting(), Workload(prompt_tokens=128, new_tokens=32, batch=1))
    ]
