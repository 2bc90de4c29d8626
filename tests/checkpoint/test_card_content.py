"""What a card says of a folder: only what a file, an option, a report or the base's card shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from hanok.checkpoint.card import CARD, QUALITY, QUANTIZATION, TRAINING, USAGE, add_step, written
from hanok.checkpoint.card import Step as CardStep
from hanok.checkpoint.card_content import base_cards, card_content, report_table
from hanok.checkpoint.card_options import CardOptions
from hanok.checkpoint.front_matter import front_matter
from hanok.errors import OptionError

REPORT = {
    "checkpoint": "model",
    "date": "2026-11-28",
    "machine": {"cpu": "Some | CPU", "torch": "2.13"},
    "num_tokens": 2048,
    "rows": [
        {"name": "reference", "perplexity": 11.4531, "kl_mean": None},
        {"name": "int4", "perplexity": 11.9, "kl_mean": 0.00123456},
    ],
}


def folder_with(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def content_of(folder: Path, *bases: str, is_generator: bool = False, **options: Any) -> Any:
    return card_content(folder, CardOptions(**options), bases, is_generator=is_generator)


def test_an_empty_folder_says_nothing(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    assert (content.fields, content.inferred) == ({}, {})
    assert not any(content.sections.values())
    assert written(None, content) == ""


def test_a_causal_model_says_how_it_is_run(tmp_path: Path) -> None:
    folder_with(tmp_path, config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    plain = content_of(tmp_path)
    assert plain.inferred == {"library_name": "transformers"}
    assert "AutoModelForCausalLM.from_pretrained" in plain.sections[USAGE]
    assert "apply_chat_template" not in plain.sections[USAGE]
    assert "hanok" not in plain.sections[USAGE]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    chat = content_of(tmp_path, is_generator=True)
    assert "apply_chat_template" in chat.sections[USAGE]
    assert "hanok serve" in chat.sections[USAGE]
    for code in chat.sections[USAGE].split("```python\n")[1:]:
        compile(code.partition("```")[0], "card", "exec")
    folder_with(
        tmp_path, config={"architectures": ["XForCausalLM"], "auto_map": {"AutoConfig": "x"}}
    )
    assert "trust_remote_code=True" in content_of(tmp_path).sections[USAGE]
    folder_with(tmp_path, config={"architectures": ["BertModel"]})
    assert content_of(tmp_path).sections[USAGE] == ""


def test_the_relation_is_what_the_files_show(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    folder_with(tmp_path, config=config)
    assert "base_model_relation" not in content_of(tmp_path).inferred  # of what?
    content = content_of(tmp_path, base_model=("org/base",))
    assert content.fields["base_model"] == "org/base"
    assert content.inferred["base_model_relation"] == "quantized"
    assert content.sections[QUANTIZATION] == "The weights are quantized: 'gptq'."
    asked = content_of(tmp_path, base_model=("a/b", "c/d"), relation="merge")
    assert asked.fields == {"base_model": ["a/b", "c/d"], "base_model_relation": "merge"}
    assert "base_model_relation" not in asked.inferred


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    folder_with(tmp_path, adapter_config=config)
    content = content_of(tmp_path)
    assert content.inferred == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
    }
    assert "AutoPeftModelForCausalLM" in content.sections[USAGE]
    folder_with(tmp_path, adapter_config={**config, "base_model_name_or_path": "/home/me/base"})
    assert content_of(tmp_path).inferred == {"library_name": "peft"}


def test_the_licence_is_the_bases_unless_said(tmp_path: Path) -> None:
    base = "---\nlicense: gemma\n---\n"
    assert content_of(tmp_path, base).inferred == {"license": "gemma"}
    assert content_of(tmp_path, base, license="mit").inferred == {}
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n")
    assert content_of(tmp_path, base).inferred == {}


def test_cards_of_bases_come_from_folders_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    options = CardOptions(base_folder=(base,))
    with pytest.raises(OptionError, match=r"no README\.md in it"):
        base_cards(options, tmp_path)
    (base / CARD).write_text("---\nlicense: mit\n---\n")
    assert base_cards(options, tmp_path) == (["---\nlicense: mit\n---\n"], [])
    asked: list[str] = []

    def cached(name: str, file: str) -> str | None:
        asked.append(name)
        return str(base / file) if name == "org/known" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    options = CardOptions(base_model=("org/known", "org/other"))
    assert base_cards(options, tmp_path) == (["---\nlicense: mit\n---\n"], ["org/other"])
    (tmp_path / CARD).write_text("---\nbase_model: [org/known]\n---\n")
    assert base_cards(CardOptions(), tmp_path)[0] == ["---\nlicense: mit\n---\n"]
    assert asked == ["org/known", "org/other", "org/known"]


def test_a_report_is_a_table_with_machine_and_date(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(REPORT))
    add_step(tmp_path, CardStep(command="hanok x", version="1", date="2026-11-27", text="Did x"))
    content = content_of(tmp_path, quality=file, training=file)
    text = content.sections[QUALITY]
    assert text == content.sections[TRAINING]
    lines = text.splitlines()
    assert lines[0] == "Measured on 2026-11-28, after step 1. checkpoint model, num tokens 2,048."
    assert lines[2:6] == [
        "| name | perplexity | kl mean |",
        "| --- | ---: | ---: |",
        "| reference | 11.45 | – |",
        "| int4 | 11.9 | 0.001235 |",
    ]
    assert lines[-1] == "Machine: cpu: Some | CPU; torch: 2.13."
    assert report_table(REPORT, 0).startswith("Measured on 2026-11-28. ")


@pytest.mark.parametrize("lost", ["date", "machine", "rows"])
def test_a_report_without_evidence_is_refused(tmp_path: Path, lost: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({key: value for key, value in REPORT.items() if key != lost}))
    with pytest.raises(OptionError, match=f"has no {lost}"):
        content_of(tmp_path, quality=file)
    file.write_text("[]")
    with pytest.raises(OptionError, match="is no report"):
        content_of(tmp_path, quality=file)


def test_options_reach_the_front_matter(tmp_path: Path) -> None:
    content = content_of(
        tmp_path,
        license="other",
        license_name="mine",
        license_link="LICENSE",
        dataset=("imdb", "org/set"),
        language=("ko",),
    )
    assert front_matter(written(None, content)) == {
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
        "datasets": ["imdb", "org/set"],
        "language": ["ko"],
    }
