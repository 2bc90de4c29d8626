"""The names of tensors in files, for every family and every prefix they may have."""

import json
from typing import Any

import pytest
import transformers
from tests.models.golden import goldens
from tests.models.test_published import PUBLISHED

from hanok.models.family import families, read_config, sources


@pytest.fixture(scope="module", params=sorted(families()))
def usual(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The names of a family's tensors as its files usually have them."""
    return names_in(request.param, ())


def written(model_type: str) -> dict[str, Any]:
    """A config.json of a family: a published one, a golden's, or transformers' defaults."""
    published = [config for config in PUBLISHED.values() if config["model_type"] == model_type]
    if published:
        return published[0]
    frozen = [item.config for item in goldens().values() if item.model_type == model_type]
    if frozen:
        return dict(frozen[0])
    # What HyperCLOVA X publishes as "vlm" is what transformers calls otherwise.
    known = {"vlm": "hyperclovax_vision_v2"}.get(model_type, model_type)
    dump = transformers.CONFIG_MAPPING[known]().to_json_string(use_diff=False)
    found: dict[str, Any] = json.loads(dump)
    return found


def names_in(model_type: str, present: tuple[str, ...]) -> tuple[str, ...]:
    family, config = read_config(written(model_type), "config.json")
    found = sources(family, config, present).values()
    return (model_type, *(name for source in found for name in source.names))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "language_model.", "a.b.", None])
def test_names_are_found_below_any_prefix(usual: tuple[str, ...], prefix: str | None) -> None:
    model_type, *names = usual
    base = names[0].partition(".")[0] + "."
    renamed = tuple(name.removeprefix(base) if prefix is None else prefix + name for name in names)
    assert names_in(model_type, renamed)[1:] == renamed


def test_names_that_are_usual_stay_so_beside_others(usual: tuple[str, ...]) -> None:
    model_type, *names = usual
    others = tuple(f"ema.{name}" for name in names)
    assert names_in(model_type, (*others, *names))[1:] == tuple(names)
    assert names_in(model_type, ("a.weight", "layers.0.b.weight"))[1:] == tuple(names)
