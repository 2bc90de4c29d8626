"""Front matter: read as the hub's client reads it, edited without touching anything else."""

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from hanok.checkpoint.front_matter import edited, front_matter, split
from hanok.errors import CheckpointError

CARD = """---
# Who may use it
license: mit   # as the base
language:
- en
- ko  # Korean

datasets: [first/one, 'two']
tags:
  - chat
extra_gated_prompt: |
  Read this:
  # not a comment
base_model: org/base
---

# A model

Text with --- in it.
---
More.
"""

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co")), max_size=12
)
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
VALUES = st.one_of(TEXTS, st.booleans(), st.integers(-9, 9), st.lists(TEXTS, max_size=3))


def lines_without(text: str, *keys: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(keys)]


def test_reads_what_the_client_of_the_hub_reads() -> None:
    card = ModelCard(CARD)
    assert front_matter(CARD) == yaml.safe_load(card.data.to_yaml())
    assert split(CARD).body == card.text


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_parts_are_the_text_again(start: str, line_break: str) -> None:
    text = start + CARD.replace("\n", line_break)
    parts = split(text)
    assert parts.opening + parts.yaml + parts.closing + parts.body == text
    assert front_matter(text)["language"] == ["en", "ko"]


def test_a_card_without_front_matter_has_no_values() -> None:
    assert front_matter("# A model\n\n---\n\nText\n---\n") == {}
    assert front_matter("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\nlicense: mit\n", "no second one ends it"),
        ("---\nlicense: [mit\n---\n", "not YAML"),
        ("---\n- mit\n---\n", "not a map"),
        ("---\nlicense: mit\nlicense: mit\n---\n", "gives license twice"),
        ("---\nno: mit\n---\n", "the key False, which is not text"),
        ("---\n!!python/object/apply:os.system [true]\n---\n", "not YAML"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        front_matter(text)


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_only_the_lines_of_a_change_change(line_break: str) -> None:
    card = CARD.replace("\n", line_break)
    changes: dict[str, Any] = {
        "license": "no",
        "language": ["en", "de"],
        "datasets": ["two", "new/three"],
        "tags": ["hanok"],
        "library_name": "transformers",
    }
    new = edited(card, changes)
    assert front_matter(new) == {
        **front_matter(card),
        "license": "no",
        "language": ["en", "ko", "de"],
        "datasets": ["first/one", "two", "new/three"],
        "tags": ["chat", "hanok"],
        "library_name": "transformers",
    }
    added = ["- de", "  - hanok", "library_name: transformers"]
    kept = [line for line in new.split(line_break) if line not in added]
    changed = ("license", "datasets")
    old = card.split(line_break)
    assert [x for x in kept if not x.startswith(changed)] == [
        x for x in old if not x.startswith(changed)
    ]
    assert "license: 'no'   # as the base" in kept
    assert split(new).body == split(card).body
    assert edited(new, changes) == new


def test_a_card_without_front_matter_gets_it() -> None:
    assert edited("# A model\n", {"license": "mit"}) == "---\nlicense: mit\n---\n\n# A model\n"
    assert edited("", {"license": "mit"}) == "---\nlicense: mit\n---\n"
    assert edited("# A model\r\n", {"a": "b"}) == "---\r\na: b\r\n---\r\n\r\n# A model\r\n"


@pytest.mark.parametrize(
    ("yaml_text", "changes"),
    [
        ("{license: mit}", {"language": "en"}),
        ("license: |\n  mit\n", {"license": "apache-2.0"}),
        ("license: {a: b}\n", {"license": "mit"}),
        ("tags: [a, # one\n  ]\n", {"tags": ["b"]}),
        ("license: &x mit\nlicense_name: *x\n", {"license": "apache-2.0"}),
        ("base_model:\n- a/b\n", {"base_model": "c/d"}),
    ],
)
def test_what_cannot_be_edited_safely_is_refused_by_name(
    yaml_text: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=f"'{next(iter(changes))}' cannot be changed"):
        edited(f"---\n{yaml_text}\n---\n", changes)


def test_an_edit_that_does_not_read_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanok.checkpoint.front_matter._inline", lambda value: "wrong")
    with pytest.raises(CheckpointError, match="'license' cannot be changed"):
        edited(CARD, {"license": "apache-2.0"})


def test_an_empty_value_is_filled() -> None:
    assert edited(
        "---\nlicense:\nlanguage: # none\n---\n", {"license": "mit", "language": "en"}
    ) == ("---\nlicense: mit\nlanguage: en # none\n---\n")


@given(
    old=st.dictionaries(NAMES, VALUES, max_size=4), new=st.dictionaries(NAMES, VALUES), body=TEXTS
)
def test_edits_read_back_as_asked_or_are_refused(
    old: dict[str, Any], new: dict[str, Any], body: str
) -> None:
    yaml_text = yaml.safe_dump(old, sort_keys=False, allow_unicode=True) if old else ""
    text = f"---\n{yaml_text}---\n{body}"
    try:
        result = edited(text, new)
    except CheckpointError:
        # Only values that are already there can be in the way.
        assert old.keys() & new.keys()
        return
    found = front_matter(result)
    assert found.keys() == {**old, **new}.keys()
    for key, value in found.items():
        if isinstance(new.get(key), list) and old.get(key):
            before = old[key] if isinstance(old[key], list) else [old[key]]
            assert set(map(str, value)) >= set(map(str, [*before, *new[key]])) or not new[key]
        else:
            assert value == (new if key in new else old)[key]
    assert split(result).body == body
    assert edited(result, new) == result
    assert re.match(r"---\n", result)
