"""text-generation-launcher's flags: each is accepted, and obeyed, ignored with a reason, or refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from hanok.checkpoint.files import open_checkpoint
from hanok.cli.verbs import tgi
from hanok.errors import OptionError
from hanok.memory.options import LoadOptions
from hanok.server.launcher import FLAGS, LaunchOptions, launch_options
from hanok.server.options import ServerOptions

VALUES = {"text": "x", "integer": "7", "number": "0.5", "numbers": "1,2,4"}
REFUSED = {
    "rope_scaling",
    "rope_factor",
    "tokenizer_config_path",
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[LaunchOptions]:
    found: list[LaunchOptions] = []

    def serve(launch: LaunchOptions) -> int:
        found.append(launch)
        return 0

    monkeypatch.setattr(tgi, "serve", serve)
    return found


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_parses(flag: Any, started: list[LaunchOptions]) -> None:
    value = flag.choices[0] if flag.choices else VALUES.get(flag.kind, "")
    words = [flag.option] if flag.kind == "switch" else [flag.option, value]
    if flag.name == "quantize":
        words[1] = "bitsandbytes"
    result = CliRunner().invoke(tgi.command, words)
    if flag.name in REFUSED:
        assert isinstance(result.exception, OptionError)
        return
    assert result.exit_code == 0, result.output
    assert len(started) == 1
    if flag.ignored:
        assert any(flag.option in note for note in started[0].notes)


def test_the_environment_counts_and_flags_come_first(started: list[LaunchOptions]) -> None:
    variables = {"MAX_BEST_OF": "5", "PORT": "1234", "JSON_OUTPUT": "true"}
    result = CliRunner().invoke(tgi.command, ["--port", "80"], env=variables)
    assert result.exit_code == 0, result.output
    assert (started[0].max_best_of, started[0].port, started[0].logs_json) == (5, 80, True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_input_tokens": 9, "max_total_tokens": 9}, "must be < `max_total_tokens`"),
        (
            {"max_total_tokens": 9, "max_batch_total_tokens": 5},
            "must be <= `max_batch_total_tokens`",
        ),
        ({"quantize": "awq"}, "quantized beforehand"),
        ({"quantize": "fp8", "dtype": "float16"}, "cannot be used with --quantize"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        launch_options(given)


def test_options_become_the_servers() -> None:
    launch = launch_options(
        {"quantize": "bitsandbytes", "api_key": "k", "max_input_tokens": 5, "max_total_tokens": 9}
    )
    server = tgi.server_options(launch, Path("m"))
    assert (server.api_key, server.max_input_tokens, server.max_total_tokens) == ("k", 5, 9)
    assert (server.port, server.has_prompt_logprobs) == (3000, False)
    assert tgi.load_options(launch) == LoadOptions(quant="int8", context=9)


def test_every_field_of_a_launch_reaches_the_server_or_the_load() -> None:
    known = {item.name for kind in (ServerOptions, LoadOptions) for item in fields(kind)}
    own = {
        "model",
        "revision",
        "hub_cache",
        "speculate",
        "max_batch_total_tokens",
        "max_batch_size",
    }
    assert {item.name for item in fields(LaunchOptions)} - known == own | {"notes"}


def test_pickles_become_safetensors_once(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    first = CliRunner().invoke(tgi.command, ["download-weights", str(tmp_path)])
    assert first.exit_code == 0, first.output
    assert "read back and equal" in first.output
    names = set(open_checkpoint(tmp_path).tensors)
    assert "model.embed_tokens.weight" in names
    second = CliRunner().invoke(tgi.command, ["download-weights", str(tmp_path)])
    assert "already present" in second.output
