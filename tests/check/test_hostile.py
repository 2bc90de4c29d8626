"""Whatever the small files of a folder say, the check gives a report and raises nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanok.check.finding import LEVELS
from hanok.check.folder import check_folder
from hanok.check.mend import plan_mends
from hanok.check.options import CheckOptions

INDEX = "model.safetensors.index.json"
KEYS = {
    "config.json": (
        *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"),
        *("tie_word_embeddings", "text_config", "quantization_config", "model_type", "hidden_size"),
        *("architectures", "num_hidden_layers", "rope_parameters"),
    ),
    "generation_config.json": (
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id", "pad_token_id"),
        *("num_beams", "num_return_sequences", "max_new_tokens", "min_new_tokens", "bos_token_id"),
        *("early_stopping", "repetition_penalty"),
    ),
    "tokenizer_config.json": (
        *("eos_token", "bos_token", "pad_token", "chat_template", "added_tokens_decoder"),
        *("extra_special_tokens", "additional_special_tokens", "tokenizer_class"),
    ),
    "special_tokens_map.json": ("eos_token", "bos_token"),
    INDEX: ("metadata", "weight_map"),
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3000),
    st.floats(),
    st.sampled_from(
        ["", "<s>", "</s>", "<|user|>", "float16", "model.norm.weight", "{{ 1 }}", "../x"]
    ),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["content", "0", "total_size", "vocab_size"]), SCALARS),
)
CHANGES = st.lists(
    st.sampled_from(sorted(KEYS)).flatmap(
        lambda file: st.tuples(st.just(file), st.sampled_from(KEYS[file]), VALUES)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_any_values_give_a_report(made: Path, tmp_path: Path, changes: list[Any]) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    for file, key, value in changes:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, key: value}))
    report = check_folder(folder, CheckOptions(threads=1, values=False))
    plan_mends(folder, report)
    assert all(item.level in LEVELS and item.what and item.advice for item in report.findings)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff\xfe", b'{"a": ', b"[" * 100_000])
@pytest.mark.parametrize("file", [*KEYS, "tokenizer.json", "chat_template.jinja"])
def test_any_bytes_give_a_report(sound: Path, file: str, data: bytes) -> None:
    (sound / file).write_bytes(data)
    report = check_folder(sound, CheckOptions(threads=1, values=False))
    plan_mends(sound, report)
    assert report.count("error") or file == "chat_template.jinja"
