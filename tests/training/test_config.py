"""What a training is asked for: files of options, their kinds, which of several counts, and origins."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hanok.checkpoint.lora_config import LoraConfig
from hanok.errors import OptionError
from hanok.training.config import (
    LOAD,
    RECORDS,
    TrainConfig,
    from_text,
    option_hints,
    read_config,
    resolve,
)
from hanok.training.options import TrainOptions

WHOLE = """
model: stories
data: [rows.jsonl, "more.jsonl:times=0.5"]
output: run
lora: {r: 4, target_modules: [q_proj, v_proj], rank_pattern: {o_proj: 2}}
learning_rate: 2e-4
max_steps: null
schedule: linear
chat_template: vicuna_v1.1
allow: truncated
samples:
  - Once upon
quant: nf4
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def resolved(tmp_path: Path, text: str, **flags: Any) -> TrainConfig:
    return resolve([("file", read_config(written(tmp_path, text))), ("flag", flags)], None)


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    found = resolved(tmp_path, WHOLE)
    assert (found.model, found.output) == (Path("stories"), Path("run"))
    assert [(item.path, item.times) for item in found.data] == [
        (Path("rows.jsonl"), 1.0),
        (Path("more.jsonl"), 0.5),
    ]
    lora = found.options.lora
    assert isinstance(lora, LoraConfig)
    assert (lora.r, lora.target_modules, lora.rank_pattern) == (
        4,
        ("q_proj", "v_proj"),
        {"o_proj": 2},
    )
    assert lora.lora_alpha == TrainOptions().lora.lora_alpha
    assert found.options.learning_rate == 2e-4  # PyYAML alone reads a text
    assert found.options.schedule == "linear"
    assert found.data_options.chat_template == "vicuna_v1.1"
    assert found.data_options.allow == ("truncated",)
    assert found.report_options.samples == ("Once upon",)
    assert found.load_options.quant == "nf4"
    assert found.load_options.weights == "copied"


def test_flags_count_more_and_everything_says_where_it_comes_from(tmp_path: Path) -> None:
    found = resolved(tmp_path, WHOLE, lora={"r": 8}, learning_rate=1.0, data=("other.jsonl",))
    assert found.options.lora.r == 8
    assert found.options.lora.target_modules == ("q_proj", "v_proj")
    assert found.options.learning_rate == 1.0
    shown = found.resolved()
    origins = {name: item["origin"] for name, item in shown.items()}
    assert origins["lora.r"] == origins["learning_rate"] == origins["data"] == "flag"
    assert origins["lora.target_modules"] == origins["model"] == origins["quant"] == "file"
    assert origins["lora.lora_alpha"] == origins["epochs"] == "default"
    assert shown["data"]["value"] == [{"path": "other.jsonl", "times": 1.0}]
    names = {item.name for owner in RECORDS for item in fields(owner)}
    assert {name.partition(".")[0] for name in shown} <= names | {"model", "data", "output"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", r"no option 'learning_rat'\. The nearest: learning_rate, "),
        ("lora: {rank: 8}", r"no option 'lora\.rank'\. The nearest: lora\.\w+"),
        ("epochs: many", "epochs is 'many', and must be a number"),
        ("seed: 1.5", "seed is 1.5, and must be a whole number"),
        ("seed: true", "seed is True, and must be a whole number"),
        ("packing: 1", "packing is 1, and must be true or false"),
        ("max_steps: soon", "max_steps is 'soon', and must be a whole number or null"),
        ("schedule: cosin", "schedule is 'cosin', and must be one of cosine, linear, constant"),
        ("samples: {a: b}", "samples is {'a': 'b'}, and must be a list, each text"),
        ("samples: [1]", "samples is 1, and must be text"),
        ("quant: 4", "quant is 4, and must be text or null"),
        ("lora: {r: big}", r"lora\.r is 'big', and must be a whole number"),
        ("lora: 8", "lora is 8, and must be a mapping of an adapter's options"),
        ("epochs: 1\nepochs: 2", "has 'epochs' twice"),
        ("- epochs", "no mapping from names of options to values"),
        ("a: [", "is not YAML"),
        ("batch: 2", "no option 'batch'"),
    ],
)
def test_what_cannot_be_is_refused(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        read_config(written(tmp_path, line))


def test_model_data_and_output_must_come_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="model and output must be named"):
        resolved(tmp_path, "data: rows.jsonl")


def test_values_given_as_text() -> None:
    assert from_text("1+3", tuple[int, ...] | None, "layers") == (1, 3)
    assert from_text("none", tuple[int, ...] | None, "layers") is None
    assert from_text("q_proj", tuple[str, ...] | str, "names") == ("q_proj",)
    assert from_text("0.5", float, "share") == 0.5
    assert from_text("False", bool, "flag") is False
    with pytest.raises(OptionError, match="flag is 'maybe', and must be true or false"):
        from_text("maybe", bool, "flag")


def test_no_name_means_two_options() -> None:
    names = [item.name for owner in RECORDS for item in fields(owner)]
    kept = [name for name in names if name in option_hints()]
    assert len(kept) == len(set(kept))
    assert set(LOAD) <= set(kept)
