"""Files of axolotl and LLaMA-Factory: what is translated, left out, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from hanok.errors import OptionError
from hanok.training.config import TrainConfig, resolve
from hanok.training.foreign import Translation, translate

AXOLOTL = """
base_model: stories
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: turns
  - path: json
    data_files: [more.json]
    type: sharegpt
    conversation: vicuna_v1.1
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: "<|pad|>"}
"""
LLAMA_FACTORY = """
model_name_or_path: stories
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
dataset: identity,chats
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/lora
logging_steps: 10
save_steps: 250
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
quantization_bit: 4
"""
INFO: dict[str, Any] = {
    "identity": {"file_name": "identity.json"},
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user"},
        "num_samples": 50,
    },
    "hub": {"hf_hub_url": "org/data"},
}


def translated(tmp_path: Path, text: str, *ignored: str, **info: Any) -> Translation:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO | info))
    return translate(path, ignored)


def config_of(found: Translation) -> TrainConfig:
    return resolve([("file", found.values)], None)


def ends_of(found: Translation) -> dict[str, str]:
    return dict(note.split(": ", 1) for note in found.notes)


def test_axolotls_files(tmp_path: Path) -> None:
    found = translated(tmp_path, AXOLOTL)
    config = config_of(found)
    options, lora = config.options, config.options.lora
    assert found.trainer == "axolotl"
    assert (config.model, config.output) == (Path("stories"), Path("outputs/qlora"))
    first, second = config.data
    assert (first.path, first.columns) == (Path("rows.jsonl"), {"messages": "turns"})
    assert (second.path, second.format) == (Path("more.json"), "sharegpt")
    assert config.data_options.chat_template == "vicuna_v1.1"
    assert config.load_options.quant == "nf4"
    assert lora is not None
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (32, 16, 0.05)
    assert lora.target_modules == "all-linear"
    assert (options.pack_tokens, options.packs_per_step, options.epochs) == (4096, 8, 3.0)
    assert (options.learning_rate, options.schedule, options.warmup_ratio) == (2e-4, "cosine", 0.1)
    assert (options.held_out, options.seed) == (0.05, 42)  # axolotl's default seed
    assert options.gradient_checkpointing
    assert config.data_options.packing
    ends = ends_of(found)
    assert ends["flash_attention"].startswith("left out: ")
    assert ends["sequence_len"] == "pack_tokens = 4096"
    assert ends["(seed)"] == "seed = 42, axolotl's default"
    # Every key that has a value is accounted for, once.
    asked = {
        line.split(":")[0] for line in AXOLOTL.splitlines() if ":" in line and line[0] not in " -"
    }
    assert asked - {"wandb_project"} <= ends.keys()  # which has no value


def test_llama_factorys_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = translated(tmp_path, LLAMA_FACTORY)
    config = config_of(found)
    options, lora = config.options, config.options.lora
    assert found.trainer == "LLaMA-Factory"
    identity, chats = config.data
    assert (identity.path, identity.format, identity.cap) == (
        Path("data/identity.json"),
        "alpaca",
        1000,
    )
    assert (chats.path, chats.format, chats.cap) == (Path("data/chats.jsonl"), "messages", 50)
    assert chats.columns == {"messages": "turns"}
    assert lora is not None
    assert (lora.r, lora.lora_alpha) == (16, 32)  # twice the rank
    assert lora.target_modules == ("q_proj", "v_proj")
    assert (options.pack_tokens, options.packs_per_step, options.epochs) == (1024, 8, 2.0)
    assert (options.save_steps, options.eval_steps, options.held_out) == (250, 500, 0.1)
    assert not config.data_options.packing
    assert config.load_options.dtype == "bfloat16"
    assert config.load_options.quant == "nf4"
    assert ends_of(found)["template"].startswith(
        "left out: llama3 is taken for the checkpoint's own"
    )


def test_all_weights_learn_where_they_do_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "base_model: s\ndatasets: [{path: rows.jsonl, type: chat_template}]\n"
    assert config_of(translated(tmp_path, text)).options.lora is None
    text = LLAMA_FACTORY.replace("finetuning_type: lora", "finetuning_type: full")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("lora_"))
    assert config_of(translated(tmp_path, text)).options.lora is None


def test_their_defaults_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "model_name_or_path: stories\ndataset: identity\noutput_dir: out\n"
    options = config_of(translated(tmp_path, text)).options
    assert (options.epochs, options.learning_rate, options.schedule) == (3.0, 5e-5, "linear")
    assert (options.packs_per_step, options.warmup_ratio, options.seed) == (8, 0.0, 42)


@pytest.mark.parametrize(
    ("line", "key", "message"),
    [
        ("neftune_noise_alpha: 5", "neftune_noise_alpha", "5 is nothing that hanok knows of"),
        ("optimizer: lion", "optimizer", "another optimizer than AdamW"),
        ("lr_scheduler: rex", "lr_scheduler", "no schedule 'rex'"),
        ("train_on_inputs: true", "train_on_inputs", "only answers are learnt"),
        ("chat_template: chatml", "chat_template", "the checkpoint's own is used"),
        ("warmup_steps: 10", "warmup_steps", "a share of all steps"),
        ("val_set_size: 100", "val_set_size", "100 is a number of documents"),
        ("special_tokens: {eos_token: x}", "special_tokens", "change the tokenizer"),
        ("fp16: true", "fp16", "no scaling of losses"),
        ("adapter: llama-adapter", "adapter", "no adapter 'llama-adapter'"),
    ],
)
def test_what_would_be_another_training_is_refused_unless_it_is_ignored(
    line: str, key: str, message: str, tmp_path: Path
) -> None:
    text = "base_model: stories\nadapter: lora\nlearning_rate: 1e-4\n"
    text += "datasets: [{path: rows.jsonl, type: chat_template}]\n"
    if key == "adapter":
        text = text.replace("adapter: lora\n", "")
    with pytest.raises(OptionError, match=message) as caught:
        translated(tmp_path, text + line)
    assert str(caught.value).endswith(f"--ignore {key}.")
    found = translated(tmp_path, text + line, key)
    assert ends_of(found)[key].startswith("ignored: ")
    with pytest.raises(
        OptionError, match=rf"--ignore: there is no option 'x'\. The nearest: {key}"
    ):
        translated(tmp_path, text + line, key, "x")


def test_rows_that_are_written_otherwise_there(tmp_path: Path) -> None:
    text = "base_model: s\nadapter: lora\ndatasets: [{path: rows.jsonl, type: alpaca}]"
    with pytest.raises(
        OptionError, match=r"datasets\.type: alpaca is written with headings of its own"
    ):
        translated(tmp_path, text)
    found = translated(tmp_path, text, "datasets.type")
    assert found.values["data"] == ("rows.jsonl:format=alpaca",)
    own = "base_model: s\nadapter: lora\ndatasets:\n  - path: r.jsonl\n    type: "
    columns = own + "{field_instruction: q, field_output: a}"
    assert translated(tmp_path, columns).values["data"] == (
        "r.jsonl:format=alpaca,instruction=q,output=a",
    )
    with pytest.raises(OptionError, match="write rows in a way of their own"):
        translated(tmp_path, own + "{field_instruction: q, format: 'Q: {instruction}'}")
    text = own + "completion\n    field: body"
    assert translated(tmp_path, text).values["data"] == ("r.jsonl:format=text,text=body",)


def test_warmup_steps_are_a_share_of_the_steps_where_these_are_known(tmp_path: Path) -> None:
    import math

    text = "base_model: s\nadapter: lora\ndatasets: []\nmax_steps: 300\nwarmup_steps: "
    for steps in (1, 7, 10, 299):
        ratio = translated(tmp_path, text + str(steps)).values["warmup_ratio"]
        assert math.ceil(ratio * 300) == steps


def test_what_no_file_of_theirs_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"is no file of axolotl .* or of LLaMA-Factory"):
        translated(tmp_path, "epochs: 3")
    base = "model_name_or_path: s\noutput_dir: o\ndataset: "
    with pytest.raises(
        OptionError, match="a dataset is hf_hub_url org/data: only files on this disk"
    ):
        translated(tmp_path, base + "hub")
    with pytest.raises(OptionError, match=r"'other' is not in data/dataset_info\.json"):
        translated(tmp_path, base + "other")
    pairs = {"file_name": "p.json", "ranking": True}
    with pytest.raises(OptionError, match=r"dataset\.ranking: p\.json has pairs of answers"):
        translated(tmp_path, base + "pairs", pairs=pairs)
