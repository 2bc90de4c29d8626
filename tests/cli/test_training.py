"""`hanok train`: from rows to an adapter that generates, interrupted and gone on with."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import hanok
from hanok.checkpoint.card import steps_of
from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.cli import training
from hanok.cli.learnt import read_lora
from hanok.cli.main import cli
from hanok.errors import OptionError
from hanok.training.loop import Trainer

ROWS = [
    ("What did Lily see?", "Lily saw a small green frog."),
    ("Where did Tom go?", "Tom went to the big lake."),
    ("Who was sad?", "The little bear was sad."),
    ("What did Ben eat?", "Ben ate a red apple."),
] * 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in ROWS
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(data: Path, output: Path, *options: str) -> Result:
    command = [
        "train",
        str(hanok.BUNDLED),
        str(data),
        "--output",
        str(output),
        "--dtype",
        "float32",
    ]
    defaults = ["--pack-tokens", "64", "--packs-per-step", "2", "--lora", "r=4", "--epochs", "8"]
    cache = ["--cache-folder", str(output.parent / "cache"), "--learning-rate", "0.003"]
    return CliRunner().invoke(cli, [*command, *defaults, *cache, *options])


def test_a_new_users_path(data: Path, tmp_path: Path) -> None:
    cache = ["--cache-folder", str(tmp_path / "cache")]
    looked_at = ["train", "preview", str(data), "--model", str(hanok.BUNDLED), *cache]
    preview = CliRunner().invoke(cli, looked_at)
    assert preview.exit_code == 0, preview.output
    found = run(data, tmp_path / "run", "--held-out", "0.25", "--eval-steps", "5")
    assert found.exit_code == 0, found.output
    adapter = tmp_path / "run" / "adapter"
    assert f"Adapter: {adapter}" in found.stdout
    assert "trainable params: " in found.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert lines[-1]["loss"] < 0.5 * lines[1]["loss"]
    measured = [line["step"] for line in lines if line["held_out_loss"] is not None]
    last = lines[-1]["step"]
    assert measured == sorted({*range(0, last + 1, 5), last})
    (step,) = steps_of((adapter / "README.md").read_text())
    assert step.command.startswith("hanok train bundled rows.jsonl --lora r=4 --epochs 8.0 ")
    assert str(tmp_path) not in (adapter / "README.md").read_text()
    assert open_tokenizer(adapter).encode("a") == open_tokenizer(hanok.BUNDLED).encode("a")
    answer = CliRunner().invoke(
        cli, ["merge", str(hanok.BUNDLED), str(adapter), str(tmp_path / "merged")]
    )
    assert answer.exit_code == 0, answer.output
    model = hanok.load(tmp_path / "merged", dtype="float32")
    reply = model.generate(
        [{"role": "user", "content": ROWS[0][0]}], max_new_tokens=16, temperature=0.0
    )
    assert reply.text.strip() == ROWS[0][1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_it_saved_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    stepped: Callable[..., Any] = Trainer._step

    def step(self: Trainer, documents: Any, packs: Any, index: int, num_steps: int) -> Any:
        if index == 3:
            os.kill(os.getpid(), number)
        return stepped(self, documents, packs, index, num_steps)

    whole = run(data, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        first = run(data, tmp_path / "parts")
    assert first.exit_code == training.STOPPED
    assert "Stopped after step 4; the same command goes on from there." in first.stderr
    second = run(data, tmp_path / "parts")
    assert second.exit_code == 0, second.output
    assert "Going on after step 4." in second.stderr
    files = [
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapters_options_are_pefts() -> None:
    found = read_lora("r=8, lora_alpha=32, lora_dropout=0.1, target_modules=q_proj+v_proj")
    assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (8, 32.0, 0.1)
    assert found["target_modules"] == ("q_proj", "v_proj")
    assert read_lora("") == {}
    assert read_lora("target_modules=all-linear") == {"target_modules": "all-linear"}
    found = read_lora("use_rslora=true,layers_to_transform=1+3")
    assert found == {"use_rslora": True, "layers_to_transform": (1, 3)}
    with pytest.raises(OptionError, match=r"no option 'rank'\. The nearest: r"):
        read_lora("rank=8")
    with pytest.raises(OptionError, match="r is 'x', and must be a whole number"):
        read_lora("r=x")


def test_a_file_of_options_and_flags_over_it(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {hanok.BUNDLED}\ndata: {data}\noutput: {tmp_path / 'run'}\ndtype: float32\n"
        "lora: {r: 2, lora_alpha: 4}\npack_tokens: 64\nlearning_rate: 3e-3\nmax_steps: 3\n"
    )
    words = ["train", "--config", str(file), "--max-steps", "2", "--lora", "r=4"]
    cache = ["--cache-folder", str(tmp_path / "cache")]
    found = CliRunner().invoke(cli, [*words, *cache])
    assert found.exit_code == 0, found.output
    said = found.stderr.splitlines()
    assert (
        "Options by file: lora.lora_alpha=4.0, pack_tokens=64, learning_rate=0.003, dtype=float32"
        in said
    )
    assert "Options by flag: lora.r=4, max_steps=2" in said
    kept = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    assert kept["lora.r"] == {"value": 4, "origin": "flag"}
    assert kept["learning_rate"] == {"value": 0.003, "origin": "file"}
    assert kept["schedule"] == {"value": "cosine", "origin": "default"}
    state = tmp_path / "run/checkpoints/step-00000002/state.json"
    assert json.loads(state.read_text())["asked"]["options"] == kept
    file.write_text("lerning_rate: 1")
    refused = CliRunner().invoke(cli, words)
    assert isinstance(refused.exception, OptionError)
    assert "'lerning_rate'. The nearest: learning_rate" in str(refused.exception)
    nothing = CliRunner().invoke(cli, ["train"])
    assert "model and data and output must be named" in str(nothing.exception)


def test_a_file_of_axolotl_trains(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yaml"
    file.write_text(
        f"base_model: {hanok.BUNDLED}\ndatasets: [{{path: {data}, type: chat_template}}]\n"
        "adapter: lora\nlora_r: 4\nlora_target_linear: true\nsequence_len: 64\n"
        "learning_rate: 1e-3\nmax_steps: 1\noptimizer: adamw_bnb_8bit\nneftune_noise_alpha: 5\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    words = ["train", "--from", str(file), "--cache-folder", str(tmp_path / "cache")]
    refused = CliRunner().invoke(cli, words)
    assert "neftune_noise_alpha: 5 is nothing that hanok knows of" in str(refused.exception)
    found = CliRunner().invoke(cli, [*words, "--ignore", "neftune_noise_alpha"])
    assert found.exit_code == 0, found.output
    assert f"{file} is a file of axolotl:" in found.stderr
    assert "  sequence_len: pack_tokens = 64" in found.stderr
    assert "  optimizer: left out: adamw_bnb_8bit is AdamW, whose moments" in found.stderr
    assert "  neftune_noise_alpha: ignored: 5 is nothing" in found.stderr
    both = CliRunner().invoke(cli, [*words, "--config", str(file)])
    assert "--config and --from are both given" in str(both.exception)


def test_fastchats_rows_and_its_conversation_by_name(tmp_path: Path) -> None:
    file = tmp_path / "chats.json"
    rows = [
        {
            "id": f"tale_{number}",
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
                {"from": "human", "value": "And then?"},
                {"from": "gpt", "value": "Then it was night."},
            ],
        }
        for number, (question, answer) in enumerate(ROWS[:4])
    ]
    file.write_text(json.dumps(rows))
    vicuna = ["--chat-template", "vicuna_v1.1"]
    model = ["--model", str(hanok.BUNDLED), "--cache-folder", str(tmp_path / "cache")]
    shown = CliRunner().invoke(cli, ["train", "preview", str(file), *model, *vicuna])
    assert shown.exit_code == 0, shown.output
    assert f"{file}: sharegpt, 4 rows, 0 of them bad; 4 documents" in shown.stdout
    assert "answers found: 8 by marks" in shown.stdout
    question, answer = ROWS[0]
    assert (
        f"polite answers to the user's questions. USER: {question} ASSISTANT:« {answer}</s>»USER: And "
        "then? ASSISTANT:« Then it was night.</s>»"
    ) in shown.stdout
    found = run(file, tmp_path / "run", "--pack-tokens", "256", "--epochs", "25", *vicuna)
    assert found.exit_code == 0, found.output
    adapter = tmp_path / "run" / "adapter"
    prompt = open_tokenizer(adapter).encode_chat([{"role": "user", "content": question}])
    served = hanok.load(hanok.BUNDLED, dtype="float32")
    served.adapters.load("tale", adapter)
    served.use_adapter("tale")
    reply = served.generate(prompt, max_new_tokens=16, temperature=0.0)
    assert reply.text.strip() == answer
    assert reply.finish_reason == "eos_token"
