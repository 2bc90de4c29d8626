"""Adapters by name: chosen for all that follows, or for each request of a batch."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tests.memory.test_adapters import saved

import hanok
from hanok.checkpoint.lora_config import LoraConfig
from hanok.cli.main import cli
from hanok.engine.model import Model
from hanok.engine.passes import WeightVersion
from hanok.errors import ClosedError, OptionError
from hanok.memory.adapters import attach_new
from hanok.models.adapters import attached
from hanok.models.family import family_of, usual_sources

PROMPTS = ("Once upon a time", "Lily saw a", "Tom and his dog", "The sun was")


def written(folder: Path, seed: int, targets: tuple[str, ...]) -> Path:
    """An adapter that says something else than its base."""
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets)
    table = usual_sources(family_of(model.checkpoint.config, "config.json"), model.config)
    generator = torch.Generator().manual_seed(seed)
    attach_new(model.decoder, table, config, index=0, generator=generator)
    for part in attached(model.decoder, table, 0).parts.values():
        with torch.no_grad():
            part.b.copy_(0.3 * torch.randn(part.b.shape, generator=generator))
    return saved(folder, model.decoder, table, config, index=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": written(folder / "one", 1, ("q_proj", "v_proj")),
        "two": written(folder / "two", 2, ("o_proj", "down_proj", "up_proj")),
    }


def with_both(folders: dict[str, Path], quant: str | None) -> Model:
    model = hanok.load(hanok.BUNDLED, dtype="bfloat16", quant=quant)
    for name, folder in folders.items():
        model.adapters.load(name, folder)
    return model


@pytest.mark.parametrize("quant", [None, "int8"])
def test_requests_with_adapters_among_others_get_the_tokens_of_each_alone(
    folders: dict[str, Path], quant: str | None
) -> None:
    model = with_both(folders, quant)
    # Of few enough tokens in a pass: those that torch multiplies in bfloat16 depend on their number.
    asked = [(prompt, name) for prompt in PROMPTS for name in (None, "one", "two")]
    asked = asked if quant else asked[:6]
    options = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    with hanok.Engine(model, cache_tokens=4096) as engine:
        alone = [
            [event.token_id for event in engine.submit(prompt, adapter=name, **options)]
            for prompt, name in asked
        ]
        tickets = [engine.submit(prompt, adapter=name, **options) for prompt, name in asked]
        together = [[event.token_id for event in ticket] for ticket in tickets]
    assert together == alone
    for start in range(0, len(alone), 3):  # an adapter matters
        assert len({tuple(tokens) for tokens in alone[start : start + 3]}) == 3
    for (prompt, name), tokens in zip(asked, alone, strict=True):
        model.use_adapter(name)
        assert model.generate(prompt, **options).token_ids == tokens


def test_a_prompt_computed_with_one_adapter_is_not_found_with_another(
    folders: dict[str, Path],
) -> None:
    model = with_both(folders, None)
    prompt = [index % 900 + 3 for index in range(200)]
    with hanok.Engine(model, cache_tokens=4096) as engine:
        for name, expected in ((None, 0), ("one", 0), ("one", 192), ("two", 0), (None, 192)):
            ticket = engine.submit(prompt, adapter=name, max_new_tokens=2)
            list(ticket)
            assert ticket.num_cached_tokens == expected


def test_the_one_in_use_is_that_of_requests_that_name_none(folders: dict[str, Path]) -> None:
    model = with_both(folders, None)
    options = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    with hanok.Engine(model, cache_tokens=2048) as engine:
        named = [event.token_id for event in engine.submit(PROMPTS[0], adapter="two", **options)]
    model.use_adapter("two")
    with hanok.Engine(model, cache_tokens=2048) as engine:
        assert [event.token_id for event in engine.submit(PROMPTS[0], **options)] == named
        with pytest.raises(OptionError, match=r"there is no adapter 'tow'\. Known: two, one"):
            engine.submit(PROMPTS[0], adapter="tow")
    base = hanok.load(hanok.BUNDLED, dtype="bfloat16").logits([5, 9, 200])
    model.use_adapter(None)
    assert torch.equal(model.logits([5, 9, 200]), base)


def test_the_command_line_generates_with_an_adapter(folders: dict[str, Path]) -> None:
    model = with_both(folders, None)
    model.use_adapter("one")
    options = {"max_new_tokens": 8, "temperature": 0.0}
    expected = model.generate("Once upon a time", **options).text
    arguments = ["--max-new-tokens", "8", "--temperature", "0", "--dtype", "bfloat16"]
    command = ["generate", "Once upon a time", "--adapter", str(folders["one"]), *arguments]
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 0, found.output
    assert expected in found.stdout


def test_names_come_and_go(folders: dict[str, Path]) -> None:
    model = with_both(folders, None)
    assert model.adapters.names == ("one", "two")
    with pytest.raises(OptionError, match="there is an adapter 'one' already"):
        model.adapters.load("one", folders["one"])
    model.use_adapter("one")
    model.adapters.unload("one")
    assert (model.adapters.names, model.adapters.active) == (("two",), None)
    model.adapters.unload("two")
    assert not any(".lora" in name for name, _ in model.decoder.named_parameters())
    with pytest.raises(OptionError, match="none is loaded"):
        model.use_adapter("one")


def test_an_adapter_that_comes_or_goes_leaves_what_others_computed(
    folders: dict[str, Path],
) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    prompt = [index % 900 + 3 for index in range(200)]

    def cached(engine: hanok.Engine, name: str | None = None) -> int:
        ticket = engine.submit(prompt, adapter=name, max_new_tokens=2)
        list(ticket)
        return ticket.num_cached_tokens

    with hanok.Engine(model, cache_tokens=4096) as engine:
        assert cached(engine) == 0
        engine.load_adapter("one", folders["one"])
        assert [cached(engine), cached(engine, "one"), cached(engine, "one")] == [192, 0, 192]
        engine.unload_adapter("one")
        with pytest.raises(OptionError, match="there is no adapter 'one'"):
            engine.submit(prompt, adapter="one")
        engine.load_adapter("one", folders["two"])
        assert [cached(engine), cached(engine, "one")] == [192, 0]
        engine.unload_adapter("one")
        assert engine.drain(60)
    version = WeightVersion(model.decoder)
    before = version.number()
    with torch.no_grad():
        model.decoder.norm.weight.mul_(1.5)
    model.adapters.load("one", folders["one"])
    changed = version.number()
    assert changed > before
    model.adapters.unload("one")
    assert version.number() == changed
    model.adapters.load("two", folders["two"])
    model.use_adapter("two")  # of everything: what was computed is not its
    assert version.number() > changed
    with pytest.raises(ClosedError):
        engine.load_adapter("late", folders["one"])
