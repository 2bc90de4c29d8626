"""Cards: what is wrong with one, and writing ours into it without losing the user's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from hanok.checkpoint.card import (
    BEGIN,
    CARD,
    END,
    QUALITY,
    CardContent,
    Step,
    add_step,
    inherited_license,
    problems,
    read_card,
    steps_of,
    write_card,
    written,
)
from hanok.checkpoint.front_matter import front_matter
from hanok.errors import CheckpointError

GOOD = """---
license: apache-2.0
language: [en, 'no', code]
base_model: org/base
base_model_relation: quantized
datasets: [org/set, imdb]
library_name: transformers
tags: [chat]
metrics: [wer]
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {type: wikitext, name: WikiText}
    metrics: [{type: perplexity, value: 9.5}]
---
# Model
"""
STEP = Step(
    command="hanok tokens add model '<think>'",
    version="0.1.0",
    date="2026-11-28",
    text="Added 1 token: <think>",
)


def card(**values: Any) -> str:
    fields = {"license": "mit", **values}
    fields = {key: value for key, value in fields.items() if value is not None}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n# Model\n"


def test_a_good_card_has_no_problems() -> None:
    assert problems(GOOD) == []
    assert problems(GOOD, bases=[card(license="apache-2.0")]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Model\n", "there is no front matter"),
        ("---\nlicense: [\n---\n", "not YAML"),
        (card(license=None, language="en"), "license is missing"),
        (card(license=3), "license is 3 and must be text"),
        (
            card(license="apache2"),
            "'apache2' is not an identifier of the hub; the nearest are apache",
        ),
        (card(license="other"), "other without license_name and license_link"),
        (card(license="other", license_name="x"), "other without license_link"),
        (card(base_model="/home/me/model"), "'/home/me/model' is not the id of a model"),
        (card(base_model=[{"a": "b"}]), "is not the id of a model"),
        (card(base_model="a/b", base_model_relation="distilled"), "must be one of adapter, merge"),
        (card(base_model_relation="merge"), "but base_model is missing"),
        (card(datasets=[None]), "datasets has None, and must be text"),
        (card(datasets=["my data"]), "datasets has 'my data'"),
        (card(language=[False]), "write 'no' in quotes"),
        (card(language="English"), "language has 'English'"),
        (card(tags="chat"), "tags is 'chat' and must be a list"),
        (card(library_name=["peft"]), r"library_name is \['peft'\] and must be text"),
        (card(**{"model-index": {"name": "x"}}), "model-index must be a list"),
        (card(**{"model-index": [{"name": "x"}]}), r"model-index\[0\] has no results"),
        (
            card(**{"model-index": [{"name": "x", "results": [{"task": {"type": "t"}}]}]}),
            r"model-index\[0\].results\[0\] has no dataset.type",
        ),
        (
            card(
                **{
                    "model-index": [
                        {
                            "name": "x",
                            "results": [
                                {
                                    "task": {"type": "t"},
                                    "dataset": {"type": "d", "name": "D"},
                                    "metrics": [{"type": "m"}],
                                }
                            ],
                        }
                    ]
                }
            ),
            r"metrics\[0\] has no value",
        ),
    ],
)
def test_each_problem_is_named(text: str, message: str) -> None:
    assert any(re.search(message, problem) for problem in problems(text))


def test_another_licence_than_the_bases_is_named_and_not_changed() -> None:
    base = card(license="other", license_name="tongyi", license_link="LICENSE")
    found = problems(card(license="mit"), bases=[base])
    assert len(found) == 1
    assert "the licence is mit, and the base model's card says other tongyi LICENSE" in found[0]
    assert inherited_license([base]) == {
        "license": "other",
        "license_name": "tongyi",
        "license_link": "LICENSE",
    }
    assert inherited_license([base, card()]) == {}
    assert inherited_license([card(), card()]) == {"license": "mit"}
    assert "cannot be read" in problems(card(), bases=["---\na: [\n---\n"])[0]


@given(st.from_regex(r"[\w./ -]{1,24}", fullmatch=True))
def test_ids_that_the_hubs_client_refuses_are_problems(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert problems(card(base_model=name))


def test_the_card_is_read_by_the_hubs_client(tmp_path: Path) -> None:
    content = CardContent(
        fields={"license": "mit", "base_model": "org/base", "datasets": ["imdb"]},
        inferred={"library_name": "transformers"},
        sections={QUALITY: "| a |\n| --- |\n| 1 |"},
        steps=(STEP,),
    )
    write_card(tmp_path, content)
    found = ModelCard.load(tmp_path / CARD)
    assert found.data.to_dict() == {
        "license": "mit",
        "base_model": "org/base",
        "datasets": ["imdb"],
        "library_name": "transformers",
    }
    assert problems(found.content) == []


def test_what_files_show_does_not_replace_what_the_card_says() -> None:
    old = card(library_name="mlx")
    new = written(old, CardContent(inferred={"library_name": "transformers", "license": "gpl"}))
    assert new == old
    assert front_matter(written(old, CardContent(fields={"license": "gpl"})))["license"] == "gpl"


LINE = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30)
BODIES = st.lists(
    st.one_of(LINE, st.sampled_from(["", "## Quality", "---", "<!-- a comment -->", "1. A step"])),
    max_size=6,
).map("\n".join)
STEPS = st.builds(
    Step,
    command=st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20).map(
        lambda text: f"hanok {text}"
    ),
    version=st.sampled_from(["0.1.0", "0.2.0.dev0"]),
    date=st.dates().map(lambda day: f"{day.year:04}-{day.month:02}-{day.day:02}"),
    text=st.one_of(LINE, st.sampled_from(["a <b> & `c`", "--> end", "&lt;"])),
)


@given(body=BODIES, after=BODIES, steps=st.lists(STEPS, max_size=3))
def test_the_users_text_is_kept_and_writing_twice_is_writing_once(
    body: str, after: str, steps: list[Step]
) -> None:
    content = CardContent(sections={QUALITY: "| a |"}, steps=tuple(steps))
    try:
        once = written(body, content)
    except CheckpointError:
        assert body.lstrip().startswith("---")  # and no second line of it
        return
    assert once.startswith(body)
    assert written(once, content) == once
    moved = once + after
    twice = written(moved, CardContent(steps=(STEP,)))
    assert twice.startswith(body)
    assert twice.endswith(after)
    plain = [" ".join(step.command.split()) for step in steps]
    assert [step.command for step in steps_of(twice)] == [
        *dict.fromkeys(plain),
        STEP.command,
    ] or len(set(plain)) < len(steps)
    assert steps_of(twice)[-1] == STEP
    if steps:
        assert steps_of(twice)[0].text == " ".join(steps[0].text.split())


def test_steps_and_reports_survive_and_parts_are_replaced_alone(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("# Mine\n", encoding="utf-8")
    add_step(tmp_path, STEP)
    write_card(tmp_path, CardContent(sections={QUALITY: "first", "How to run it": "run"}))
    later = Step(command="hanok card model", version="0.2", date="2026-12-01", text="Wrote it")
    add_step(tmp_path, later)
    write_card(tmp_path, CardContent(sections={"How to run it": "walk"}))
    text = read_card(tmp_path) or ""
    assert text.startswith("# Mine\n\n" + BEGIN)
    assert text.endswith(END + "\n")
    assert steps_of(text) == (STEP, later)
    assert "## Quality\n\nfirst\n" in text
    assert "walk" in text
    assert "run\n" not in text
    assert "1. 2026-11-28, hanok 0.1.0: Added 1 token: &lt;think&gt;" in text
    write_card(tmp_path, CardContent(sections={QUALITY: ""}))
    assert "Quality" not in (read_card(tmp_path) or "")


def test_line_breaks_of_the_card_are_used(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# Mine\r\n")
    add_step(tmp_path, STEP)
    data = (tmp_path / CARD).read_bytes()
    assert data.startswith(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# Mine\r\n\r\n<!-- hanok")
    assert data.count(b"\n") == data.count(b"\r\n")
    assert steps_of(read_card(tmp_path)) == (STEP,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BEGIN}\n", "has 1 comments that begin hanok's section and 0 that end it"),
        (f"{END}\n{BEGIN}\n", "and must have one of each, in this order"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", "has 2 comments"),
        (f"{BEGIN}\n\n## What was done\n\n1. I did it\n{END}\n", "text that is not a step"),
        ("---\nlicense: mit\n", "no second one ends it"),
    ],
)
def test_a_card_that_cannot_be_written_is_left_alone(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / CARD).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as error:
        add_step(tmp_path, STEP)
    assert str(tmp_path / CARD) in str(error.value)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == text


def test_a_card_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"README\.md cannot be read as UTF-8"):
        read_card(tmp_path)


def test_json_of_a_step_is_not_needed_to_read_it_back() -> None:
    """Backticks, pipes and comment ends in a command are text, in the file and read back."""
    step = Step(
        command="hanok tokens add m '``` --> |' `x`", version="1", date="2026-01-02", text="x"
    )
    text = written("", CardContent(steps=(step,)))
    assert steps_of(text) == (step,)
    assert json.dumps(text)
