"""Plans of real checkpoints and of configs alone, described devices, remedies, and no torch."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import hanok
from hanok.checkpoint.adapter_files import AdapterFiles, open_adapter
from hanok.checkpoint.lora_config import LoraConfig
from hanok.cli.main import cli
from hanok.errors import BudgetError, CheckpointError, OptionError
from hanok.memory.adapters import attach_new, write_adapter
from hanok.memory.needs import DRAFTED_SEQUENCES
from hanok.memory.plan import LoadPlan
from hanok.memory.planning import plan_draft, plan_load
from hanok.models.family import family_of, usual_sources

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA_405B = LLAMA_70B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Known rates, so that nothing is measured."""
    from hanok.memory import places

    monkeypatch.setattr(places, "memory_bytes_per_s", lambda: 20e9)
    monkeypatch.setattr(places, "disk_bytes_per_s", lambda file: 1e9)
    return tmp_path / "cache" / "rates.json"


def folder_of(tmp_path: Path, config: dict[str, Any]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan(path: Path, rates: Path, **options: Any) -> LoadPlan:
    return plan_load(path, rates_file=rates, **options)


def test_the_bundled_model_fits_here(rates: Path) -> None:
    found = plan(hanok.BUNDLED, rates)
    assert found.fits
    assert not found.uses_disk
    assert found.remedies == ()
    assert set(found.hf_device_map.values()) == {"cpu"}
    assert found.needs.context == 1024
    assert json.loads(rates.read_text())


def test_the_users_70b_on_four_gpus_is_placed_as_accelerate_placed_it(
    tmp_path: Path, rates: Path
) -> None:
    """68,976,648,192 parameters, budgets of 70 GiB: what their `hf_device_map` showed."""
    found = plan(
        folder_of(tmp_path, LLAMA_70B),
        rates,
        devices=["name=a100"] * 4,
        max_memory=dict.fromkeys(range(4), "70GiB"),
        device_map="balanced",
        context=1,
    )
    layers: dict[Any, list[int]] = {}
    for module, device in found.hf_device_map.items():
        if ".layers." in module:
            layers.setdefault(device, []).append(int(module.rpartition(".")[2]))
    assert {device: (min(mine), max(mine)) for device, mine in layers.items()} == {
        0: (0, 19),
        1: (20, 40),
        2: (41, 61),
        3: (62, 79),
    }
    assert found.hf_device_map["model.embed_tokens"] == 0
    assert found.hf_device_map["model.norm"] == found.hf_device_map["lm_head"] == 3


def test_a_plan_that_needs_the_disk_says_what_would_not(tmp_path: Path, rates: Path) -> None:
    found = plan(
        folder_of(tmp_path, LLAMA_70B),
        rates,
        devices=["name=h100"],
        max_memory={0: "80GiB", "cpu": "20GiB"},
    )
    assert found.fits
    assert found.uses_disk
    assert [remedy.change for remedy in found.remedies] == ["--quant int8", "--quant int4"]
    best = found.remedies[-1]
    assert best.places == ("0",)
    assert best.tokens_per_s > 20 > 1 > found.prediction.tokens_per_s


def test_a_cache_that_is_too_large_is_made_smaller_first(tmp_path: Path, rates: Path) -> None:
    found = plan(
        folder_of(tmp_path, LLAMA_405B),
        rates,
        devices=["name=h100"] * 4,
        max_memory=dict.fromkeys(range(4), "80GiB") | {"cpu": "4GiB"},
        quant="int4",
        context=131072,
        batch=4,
    )
    assert found.uses_disk or not found.fits
    changes = [remedy.change for remedy in found.remedies]
    assert changes[:2] == ["--batch 1", "--context 32768"]
    assert changes == sorted(changes, key=lambda text: ("context" in text, -len(text)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": "disk=1GiB"}, "max_memory names disk, which has no budget"),
        ({"max_memory": "3=1GiB"}, "max_memory names 3, which is not there. Places: cpu, disk"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"context": -1}, "context is -1"),
        (
            {"context": 1025},
            "context is 1,025 tokens, and a sequence of this model has 1,024 at the most",
        ),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
        ({"quant": "int5"}, "'int5' is unknown"),
        ({"device_map": "balance"}, "to 'balance', which is not there"),
        ({"devices": ["name=h900"]}, "h900 is not known, so its memory and bandwidth are needed"),
        ({"devices": ["name=h100,speed=3"]}, "'speed=3' is none of name"),
    ],
)
def test_options_that_cannot_be(rates: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        plan(hanok.BUNDLED, rates, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("sizes", ["0=70GiB,2=60GiB", {0: "70GiB", 2: "60GiB"}])
def test_gpus_that_are_not_here_come_with_the_command_that_describes_them(
    tmp_path: Path, rates: Path, sizes: Any
) -> None:
    folder = folder_of(tmp_path, LLAMA_70B).rename(tmp_path / "a model")
    with pytest.raises(OptionError) as caught:
        plan(folder, rates, max_memory=sizes)
    found, _, command = str(caught.value).partition("hanok plan ")
    assert "max_memory names 0, 2, which is not there. Places: cpu, disk." in found
    words = shlex.split(command)
    assert words[:3] == [str(folder), "--max-memory", "0=70GiB,2=60GiB"]
    assert words[3:] == ["--device", "name=a100"] * 3
    # Pasted, it plans.
    devices = words[4::2]
    assert plan(folder, rates, max_memory=words[2], devices=devices).fits


def test_a_draft_model_reaches_as_far_as_its_own_context(tmp_path: Path) -> None:
    short = folder_of(tmp_path, LLAMA_70B | {"num_hidden_layers": 2})
    assert plan_draft(short, context=8192).needs.context == 4096


def test_a_folder_without_anything_to_plan_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither weights nor a config\.json"):
        plan_load(tmp_path)


def test_a_large_model_is_planned_without_torch(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, LLAMA_405B)
    code = (
        "import sys; from hanok.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    options = ["--device", "name=h100", "--quant", "int4", "--cache-folder", str(tmp_path / "c")]
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(folder), *options],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] in ("None False", "0 False")
    assert "disk" in done.stdout


def test_a_draft_models_bytes_are_not_there_for_the_other(rates: Path) -> None:
    options: dict[str, Any] = {"context": 256, "batch": 3, "quant": "int8"}
    alone = plan(hanok.BUNDLED, rates, **options)
    draft = plan_draft(hanok.BUNDLED, **options)
    both = plan(hanok.BUNDLED, rates, draft=draft, **options)
    host, mine, held = both.tiers[0], alone.tiers[0], draft.tiers[0]
    assert host.place.draft_bytes == held.weight_bytes + held.cache_bytes
    assert held.cache_bytes > 0
    assert host.steady_bytes - mine.steady_bytes == host.place.draft_bytes
    assert host.peak_bytes - mine.peak_bytes == host.place.draft_bytes
    limit = {"cpu": host.peak_bytes - 1}
    assert plan(hanok.BUNDLED, rates, max_memory=limit, **options).fits
    crowded = plan(hanok.BUNDLED, rates, max_memory=limit, draft=draft, **options)
    assert crowded.uses_disk or not crowded.fits
    enough = {"cpu": host.peak_bytes}
    assert plan(hanok.BUNDLED, rates, max_memory=enough, draft=draft, **options).units == both.units


def test_a_larger_draft_model_decides_what_computing_takes(tmp_path: Path, rates: Path) -> None:
    """The two compute in turn, so the larger activations count once."""
    large = folder_of(tmp_path, LLAMA_70B | {"num_hidden_layers": 2})
    draft = plan_draft(large, context=64)
    both = plan(hanok.BUNDLED, rates, context=64, draft=draft)
    assert both.tiers[0].place.activation_bytes == draft.tiers[0].place.activation_bytes


def test_a_draft_model_guesses_for_few_at_a_time(rates: Path) -> None:
    few, many = (plan_draft(hanok.BUNDLED, context=64, batch=size) for size in (8, 50))
    assert many.needs.batch == few.needs.batch == DRAFTED_SEQUENCES


def test_a_draft_model_has_to_be_in_memory(tmp_path: Path, rates: Path) -> None:
    with pytest.raises(BudgetError, match=r"model, the model that drafts, does not fit.*context"):
        plan_draft(folder_of(tmp_path, LLAMA_70B), max_memory="cpu=20GiB")


def written(folder: Path, rank: int) -> AdapterFiles:
    """An adapter of the bundled model on all products."""
    model = hanok.load(hanok.BUNDLED)
    table = usual_sources(family_of(model.checkpoint.config, "config.json"), model.config)
    config, generator = LoraConfig(r=rank, target_modules="all-linear"), torch.Generator()
    attach_new(model.decoder, table, config, index=0, generator=generator)
    write_adapter(folder, model.decoder, table, config, index=0)
    return open_adapter(folder)


def test_adapters_are_held_where_tokens_go_in(tmp_path: Path) -> None:
    """As many bytes as their numbers take in the dtype of activations."""
    files = written(tmp_path, 4)
    model = hanok.load(hanok.BUNDLED, dtype="bfloat16")
    model.adapters.load("one", tmp_path)
    held = sum(item.nbytes for name, item in model.decoder.named_parameters() if ".lora." in name)
    options: Any = {"dtype": "bfloat16", "max_memory": "cpu=1GiB"}
    without = plan_load(hanok.BUNDLED, may_measure=False, **options)
    plan = plan_load(hanok.BUNDLED, may_measure=False, adapters=[files, files], **options)
    assert plan.tiers[0].peak_bytes - without.tiers[0].peak_bytes == 2 * held
    assert [tier.place.adapter_bytes for tier in plan.tiers] == [2 * held, 0]
    arguments = ["plan", str(hanok.BUNDLED), "--adapter", str(tmp_path), "--dtype", "bfloat16"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    assert "Adapters hold " in shown.output


def test_an_adapter_beyond_the_plan_is_refused_while_serving(tmp_path: Path) -> None:
    files = written(tmp_path, 64)
    asked: Any = {"dtype": "bfloat16", "may_measure": False}
    most = plan_load(hanok.BUNDLED, adapters=[files], **asked).tiers[0].peak_bytes
    plan = plan_load(hanok.BUNDLED, adapters=[files], max_memory=f"cpu={most / 1e6:.6f}MB", **asked)
    model = hanok.load(plan=plan)
    with hanok.Engine(model) as engine:
        engine.load_adapter("one", tmp_path)
        with pytest.raises(BudgetError, match=r"the adapter takes [\d,]+ bytes, and 0 of cpu's"):
            engine.load_adapter("two", tmp_path)
        engine.unload_adapter("one")
        assert engine.drain(60)
    model.adapters.read("two", tmp_path, is_limited=True)
