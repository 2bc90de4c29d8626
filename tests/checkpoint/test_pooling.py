"""The files in which sentence-transformers says how a text becomes a vector."""

import json
from pathlib import Path
from typing import Any

import pytest

from hanok.checkpoint.pooling import choose_pooling, has_modules, pooling_files, read_pooling
from hanok.errors import CheckpointError, OptionError, UnsupportedError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {
        "idx": 2,
        "name": "2",
        "path": "2_Normalize",
        "type": "sentence_transformers.models.Normalize",
    },
]
NAMES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")


def mode(*names: str) -> dict[str, Any]:
    """As `Pooling.save` writes it."""
    flags = {f"pooling_mode_{name}": name in names for name in NAMES}
    return {"word_embedding_dimension": 8, **flags, "include_prompt": True}


def write(folder: Path, pooling: Any, modules: Any = MODULES, place: str = "1_Pooling") -> Path:
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / place).mkdir()
        (folder / place / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("values", "pooling"),
    [
        (mode("lasttoken"), "last"),
        (mode("mean_tokens"), "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
    ],
)
@pytest.mark.parametrize("modules", [MODULES, MODULES[:2], None])
def test_what_is_asked_for(tmp_path: Path, values: Any, pooling: str, modules: Any) -> None:
    assert read_pooling(write(tmp_path, values, modules)) == pooling


def test_the_pooling_is_where_the_modules_say(tmp_path: Path) -> None:
    modules = [MODULES[0], {**MODULES[1], "path": "7_Pooling"}]
    assert read_pooling(write(tmp_path, mode("mean_tokens"), modules, "7_Pooling")) == "mean"


def test_nothing_is_asked_for(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    assert read_pooling(write(tmp_path, None, MODULES[:1])) is None


@pytest.mark.parametrize(
    ("values", "modules", "words"),
    [
        (mode("cls_token"), MODULES, "asks for cls_token"),
        (mode("mean_tokens", "max_tokens"), MODULES, "mean_tokens and max_tokens"),
        (mode(), MODULES, "asks for nothing"),
        (mode("lasttoken"), [*MODULES, {"type": "sentence_transformers.models.Dense"}], "a Dense"),
    ],
)
def test_what_is_not_computed_is_an_error(
    tmp_path: Path, values: Any, modules: Any, words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        read_pooling(write(tmp_path, values, modules))


@pytest.mark.parametrize(("values", "modules"), [([], MODULES), (mode(), {}), (mode(), [1])])
def test_damaged_files_are_told(tmp_path: Path, values: Any, modules: Any) -> None:
    with pytest.raises(CheckpointError):
        read_pooling(write(tmp_path, values, modules))


def test_a_file_that_is_no_json_is_told(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_pooling(tmp_path)


def test_what_is_asked_for_comes_before_what_the_checkpoint_says(tmp_path: Path) -> None:
    assert choose_pooling(None, tmp_path, {}) == "last"
    write(tmp_path, mode("mean_tokens"))
    assert choose_pooling(None, tmp_path, {}) == "mean"
    assert choose_pooling("last", tmp_path, {}) == "last"
    with pytest.raises(OptionError, match="Choose last or mean"):
        choose_pooling("cls", tmp_path, {})


def test_hidden_states_of_code_that_is_not_run_are_an_error_unless_asked_for(
    tmp_path: Path,
) -> None:
    """gte-Qwen2 and its like: tokens attend to later ones in code that comes with the weights."""
    config = {"model_type": "qwen2", "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}
    write(tmp_path, mode("lasttoken"))
    with pytest.raises(UnsupportedError, match=r"modeling_qwen\.Qwen2Model.*not run here"):
        choose_pooling(None, tmp_path, config)
    assert choose_pooling("last", tmp_path, config) == "last"
    others = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    assert choose_pooling(None, tmp_path, {"auto_map": others}) == "last"


def test_the_files_are_those_of_the_modules_and_none_outside(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert pooling_files(folder) == []
    assert not has_modules(folder)
    outside = [
        {"path": "../other", "type": "x.Pooling"},
        {"path": str(tmp_path), "type": "x.Pooling"},
    ]
    write(tmp_path, mode("lasttoken"), [], "other")
    write(folder, mode("lasttoken"), [*MODULES, *outside])
    (folder / "config.json").write_text("{}")
    (folder / "sentence_bert_config.json").write_text("{}")
    found = [str(file.relative_to(folder)) for file in pooling_files(folder)]
    assert found == ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]
    assert has_modules(folder)
