"""`hanok plan` as a user runs it: what is printed, what the JSON holds, how it ends."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hanok
from hanok.cli.plan_table import holds
from hanok.cli.units import rate, size
from hanok.cli.verbs.plan import plan_object

DOCS = Path(__file__).parents[2] / "docs" / "plan.md"
LLAMA_405B = {
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def run(*arguments: str, cache: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "hanok", "plan", *arguments, "--cache-folder", str(cache)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """Rates that nobody measures here: how fast this machine is must not matter."""
    plan = hanok.plan_load(hanok.BUNDLED, rates_file=tmp_path / "rates.json")
    assert plan.fits
    return tmp_path


def test_the_table_says_what_is_where_and_how_fast(rates: Path) -> None:
    found = run(cache=rates)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert "KV cache" in lines[0]
    assert re.match(r" *cpu +embed_tokens, lm_head, layers 0–\d+, norm .* available on", lines[1])
    assert "Reading the files takes" in found.stdout
    assert "tokens/s, limited by reading the memory of the CPU" in found.stdout
    line = r"^CPU: \d+ threads?, (one|limited) .*; memory is read at [\d.]+ GB/s measured\.$"
    assert len(re.findall(line, found.stdout, re.M)) == 1


def test_a_base_models_plan_speaks_of_no_tokens_to_come(tmp_path: Path, rates: Path) -> None:
    config = {**LLAMA_405B, "num_hidden_layers": 2, "architectures": ["LlamaModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    gpu = ["--device", "name=h100,memory=80GiB,bandwidth=3.3TB/s", "--context", "256"]
    found = run(str(tmp_path), *gpu, cache=rates)
    assert found.returncode == 0, found.stderr
    assert "texts that fill the context" in found.stdout
    assert "Note: no head: config.json names the base model LlamaModel" in found.stdout
    assert "lm_head" not in found.stdout.replace("no lm_head", "")
    small = [
        "--device",
        "name=h100,memory=10GiB,bandwidth=3.3TB/s",
        "--max-memory",
        "0=10GiB,cpu=1GiB",
    ]
    for options in (gpu, [*small, "--context", "256"]):
        printed = run(str(tmp_path), *options, cache=rates).stdout
        assert "tokens/s" not in printed
        plan = json.loads(run(str(tmp_path), *options, "--json", cache=rates).stdout)
        assert (plan["tokens_per_s"], plan["limited_by"]) == (None, None)
        assert {remedy["tokens_per_s"] for remedy in plan["remedies"]} <= {None}
    assert plan["remedies"]


def test_a_plan_for_a_cluster_from_a_config_alone(tmp_path: Path, rates: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_405B))
    gpus = ["--device", "name=h100,memory=80GiB,bandwidth=3.3TB/s"] * 8
    found = run(str(tmp_path), *gpus, "--max-memory", "cpu=1GiB", cache=rates)
    assert found.returncode == 0, found.stderr
    assert "What lies on disk is read again for every token." in found.stdout
    assert re.search(r"--quant int8 .*fits in GPUs 0–\d: [\d.,]+ tokens/s", found.stdout)


def test_what_does_not_fit_says_by_how_much_and_ends_with_6(rates: Path) -> None:
    found = run("--max-memory", "cpu=4MiB", cache=rates)
    assert found.returncode == 6
    assert re.search(r"It does not fit: cpu lacks [\d.]+ MiB\.", found.stdout)


def test_a_draft_model_is_planned_too(rates: Path) -> None:
    alone = json.loads(run("--json", cache=rates).stdout)["places"][0]
    found = run("--draft", str(hanok.BUNDLED), cache=rates)
    assert re.search(r"The model that drafts holds [\d.]+ MiB of cpu's peak\.", found.stdout)
    both = json.loads(run("--draft", str(hanok.BUNDLED), "--json", cache=rates).stdout)["places"][0]
    assert both["peak_bytes"] - alone["peak_bytes"] == both["draft_bytes"] > 0


def test_the_json_is_what_the_documentation_says(rates: Path) -> None:
    found = run("--max-memory", "cpu=2GiB", "--json", cache=rates)
    assert found.returncode == 0, found.stderr
    values = json.loads(found.stdout)
    section = DOCS.read_text().partition("## `--json`")[2]
    documented = set(re.findall(r"`(\w+)`", section))
    assert keys_of(values) <= documented
    assert set(values) <= set(re.findall(r"`(\w+)`", section.replace("places", "places")))
    assert values["places"][0]["budget_bytes"] <= 2 * 2**30
    assert [place["threads"] is None for place in values["places"]] == [False, True]
    modules = [module for place in values["places"] for module in place["modules"]]
    assert sorted(modules) == sorted(values["hf_device_map"])


def keys_of(values: Any) -> set[str]:
    """Return the keys of nested objects, but not those that are names of modules."""
    if isinstance(values, list):
        return set().union(*map(keys_of, values)) if values else set()
    if not isinstance(values, dict):
        return set()
    inner = [keys_of(value) for key, value in values.items() if "." not in key]
    return {key for key in values if "." not in key and key != "lm_head"}.union(*inner)


def test_by_hand(rates: Path) -> None:
    found = run("--device-map", '{"model": "cpu", "lm_head": "disk"}', cache=rates)
    assert found.returncode == 2
    assert "they share a weight" in found.stderr
    found = run("--device-map", '{"": "cpu"}', "--json", cache=rates)
    assert set(json.loads(found.stdout)["reasons"].values()) == {"device_map names it"}


def test_runs_of_layers_are_told_as_one() -> None:
    names = ("model.embed_tokens", *(f"model.layers.{n}" for n in (0, 1, 2, 5, 7, 8)), "lm_head")
    assert holds(names) == "embed_tokens, layers 0–2, layer 5, layers 7–8, lm_head"
    assert holds(()) == "nothing"
    assert size(3 * 2**30) == "3.00 GiB"
    assert size(-(2**20)) == "-1.00 MiB"
    assert size(12) == "12 B"
    assert (rate(12345.6), rate(1.2345)) == ("12,346", "1.23")


def test_every_tier_is_in_the_object() -> None:
    plan = hanok.plan_load(hanok.BUNDLED, may_measure=False)
    assert [item["name"] for item in plan_object(plan)["places"]] == ["cpu", "disk"]
