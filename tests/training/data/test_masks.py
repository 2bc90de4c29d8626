"""Masks: of every shape of template, exactly the answers and the tokens that end them are learnt."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import hanok
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.errors import RequestError
from hanok.training.data.formats import Completion, Text, to_record
from hanok.training.data.masks import Encoded, Renderer
from hanok.training.data.templates import NAMED

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<|/head|>", "[INST]", "[/INST]"]
SPECIAL += ["[CALL]", "<turn>", "</turn>", "<|user|>", "<|bot|>", "<|end|>", "<|stop|>"]

CHATML = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MARKED = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}\
{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MARKED_END = MARKED.replace(
    "{% endgeneration %}{% else %}", "<|im_end|>\n{% endgeneration %}{% else %}"
).replace("{% endif %}<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")

HEADERS = """\
{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>

{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>

{% endif %}"""

INST = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]\
{% elif m.tool_calls %}[CALL]{{ m.tool_calls[0].function | tojson }}{{ eos_token }}\
{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""

TURNS = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}</turn>
{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}"""

STRIPS = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

THINKS = STRIPS.replace(
    "{% if m.role == 'assistant' and loop.last %}<think>", "{% if false %}"
).replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")

FRAMED = """\
{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|bot|>
{% else %}{{ eos_token }}{% endif %}"""

CHANNELS = """\
{% for m in messages %}<|head|>{{ m.role }}<|/head|>{{ m.content }}\
{{ '<|stop|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}\
{% if add_generation_prompt %}<|head|>assistant<|/head|>{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "marked with its end": MARKED_END,
    "headers": HEADERS,
    "inst": INST,
    "turns": TURNS,
    "framed": FRAMED,
    "channels": CHANNELS,
    "strips reasoning": STRIPS,
    "opens reasoning": THINKS,
    "vicuna": NAMED["vicuna_v1.1"],
}

TALK = [
    ("user", "What is a hanok?"),
    ("assistant", "A Korean house.\n"),
    ("user", "With a stove?"),
    ("assistant", "Under the floor: ondol 온돌 🔥"),
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALLS = [{"id": "a12345678", "function": {"name": "weather", "arguments": {"city": "Seoul"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled vocabulary with special tokens as published ones have them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    library = tokenizers.Tokenizer.from_file(str(hanok.BUNDLED / "tokenizer.json"))
    library.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in SPECIAL])
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return open_tokenizer(folder)


def messages(*talk: tuple[str, str], **more: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **more} for role, content in talk]


def encoded(
    tokenizer: Tokenizer, template: str, turns: list[dict[str, Any]], **row: Any
) -> Encoded:
    record = to_record({"messages": turns, **row}, "messages")
    (found,) = Renderer(tokenizer, template=template).encode([record])
    if not isinstance(found, Encoded):
        raise found
    return found


def learnt(tokenizer: Tokenizer, found: Encoded) -> list[str]:
    """The texts of the stretches of targets."""
    texts: list[list[int]] = []
    before = 0
    for token_id, is_target in zip(found.ids, found.targets, strict=True):
        if is_target and not before:
            texts.append([])
        if is_target:
            texts[-1].append(token_id)
        before = is_target
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in texts]


EXPECTED = {
    "chatml": ["A Korean house.\n<|im_end|>", "Under the floor: ondol 온돌 🔥<|im_end|>"],
    "marked": ["A Korean house.\n<|im_end|>", "Under the floor: ondol 온돌 🔥<|im_end|>"],
    "marked with its end": [
        "A Korean house.\n<|im_end|>",
        "Under the floor: ondol 온돌 🔥<|im_end|>",
    ],
    "headers": ["A Korean house.<|eot|>", "Under the floor: ondol 온돌 🔥<|eot|>"],
    "inst": [" A Korean house.\n</s>", " Under the floor: ondol 온돌 🔥</s>"],
    "turns": ["A Korean house.</turn>", "Under the floor: ondol 온돌 🔥</turn>"],
    "framed": ["A Korean house.\n<|end|>", "Under the floor: ondol 온돌 🔥<|end|>"],
    "channels": ["A Korean house.\n<|end|>", "Under the floor: ondol 온돌 🔥<|stop|>"],
    "strips reasoning": [
        "A Korean house.\n<|im_end|>",
        "<think>\nBecause.\n</think>\n\nUnder the floor: ondol 온돌 🔥<|im_end|>",
    ],
    "opens reasoning": ["A Korean house.\n<|im_end|>", "Under the floor: ondol 온돌 🔥<|im_end|>"],
    "vicuna": [" A Korean house.\n</s>", " Under the floor: ondol 온돌 🔥</s>"],
}
WAYS = {
    "marked": ["marks", "marks"],
    "marked with its end": ["marks", "marks"],
    "vicuna": ["marks", "marks"],
    "strips reasoning": ["offsets", "prefix"],
    "opens reasoning": ["offsets", "offsets"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_and_their_ends_are_learnt(tokenizer: Tokenizer, name: str) -> None:
    turns = messages(*TALK, reasoning_content="Because.")
    found = encoded(tokenizer, TEMPLATES[name], turns)
    assert learnt(tokenizer, found) == EXPECTED[name]
    assert found.ways == WAYS.get(name, ["prefix", "prefix"])
    assert found.has_end
    assert not found.dropped
    expected = tokenizer.encode_chat(turns, template=TEMPLATES[name], add_generation_prompt=False)
    assert found.ids == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "opens" not in name])
def test_what_comes_before_an_answer_is_what_is_served(tokenizer: Tokenizer, name: str) -> None:
    turns = messages(*TALK[:2], reasoning_content="Because.")
    found = encoded(tokenizer, TEMPLATES[name], turns)
    first = found.targets.index(1)
    assert found.ids[:first] == tokenizer.encode_chat(turns[:1], template=TEMPLATES[name])


@pytest.mark.parametrize("name", ["chatml", "inst"])
def test_tool_calls_are_learnt_and_results_are_not(tokenizer: Tokenizer, name: str) -> None:
    turns = [
        *messages(("user", "Rain?")),
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        *messages(("user" if name == "inst" else "tool", "sunny"), ("assistant", "No, sun.")),
    ]
    found = encoded(tokenizer, TEMPLATES[name], turns, tools=TOOLS)
    call, answer = learnt(tokenizer, found)
    assert '"name": "weather"' in call
    assert '"city": "Seoul"' in call
    assert call.endswith(("<|im_end|>", "</s>"))
    assert answer.lstrip() in ("No, sun.<|im_end|>", "No, sun.</s>")
    assert found.ways == ["prefix", "prefix"]


def test_a_template_that_refuses_is_a_reason(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no system"):
        encoded(tokenizer, TURNS, messages(("system", "Be brief."), *TALK))


def test_an_answer_that_is_not_found_is_dropped_and_counted(tokenizer: Tokenizer) -> None:
    # Every turn depends on the number of all turns.
    template = (
        "{% for m in messages %}{{ messages | length }}{{ m.role }} {{ m.content | upper }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}1assistant{% endif %}"
    )
    found = encoded(tokenizer, template, messages(*TALK))
    assert not any(found.targets)
    assert Counter(found.dropped).most_common() == [
        ("the template writes it differently in this conversation", 2)
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_turn_with_weight_zero_is_not_learnt(tokenizer: Tokenizer, template: str) -> None:
    turns = messages(*TALK)
    turns[1]["weight"] = 0
    assert learnt(tokenizer, encoded(tokenizer, template, turns)) == EXPECTED["chatml"][1:]


def test_marks_are_those_of_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    """But for the end token after a mark, and what follows an end token within one."""
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    # Of a character of several tokens transformers would mark the first alone.
    turns = messages(*TALK[:3], ("assistant", "Under the floor."))
    for template in (MARKED, MARKED_END, NAMED["vicuna_v1.1"]):
        found = encoded(tokenizer, template, turns)
        expected = oracle.apply_chat_template(
            turns, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        assert expected["input_ids"] == found.ids
        pairs = list(zip(found.targets, expected["assistant_masks"], strict=True))
        differing = [tokenizer.token_text(found.ids[i]) for i, (a, b) in enumerate(pairs) if a != b]
        allowed = {MARKED: ["<|im_end|>"] * 2, MARKED_END: ["\n"] * 2}
        assert differing == allowed.get(template, [])
        assert 1 in found.targets


def test_an_end_is_appended_where_it_is_asked_for(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    record = to_record({"messages": messages(*TALK)}, "messages")
    for appends, has_end in ((False, False), (True, True)):
        renderer = Renderer(tokenizer, template=template, appends_eos=appends)
        (found,) = renderer.encode([record])
        assert isinstance(found, Encoded)
        assert found.has_end is has_end
        assert learnt(tokenizer, found)[-1] == "Under the floor: ondol 온돌 🔥" + "</s>" * has_end
    # The next turn's header is the end where the model stops at it.
    user = tokenizer.token_to_id("<|user|>")
    assert user is not None
    (found,) = Renderer(tokenizer, template=template, end_ids=[user]).encode([record])
    assert isinstance(found, Encoded)
    assert learnt(tokenizer, found)[0] == "A Korean house.\n<|user|>"


def test_ends_at_which_serving_does_not_stop_are_known(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    assert Renderer(tokenizer, end_ids=[1]).unserved_ends == {end}
    assert Renderer(tokenizer, end_ids=[1, end]).unserved_ends == frozenset()


def test_a_prompt_goes_on_as_it_is_served(tokenizer: Tokenizer) -> None:
    (found,) = Renderer(tokenizer).encode([Completion(prompt="Once upon", completion=" a time")])
    assert isinstance(found, Encoded)
    prompt = tokenizer.encode("Once upon")
    assert found.ids[: len(prompt)] == prompt
    assert found.targets == bytes(len(prompt)) + b"\1" * (len(found.ids) - len(prompt))
    assert tokenizer.decode(found.ids, skip_special_tokens=False) == "<s>Once upon a time</s>"
    (found,) = Renderer(tokenizer).encode([Completion(prompt="On", completion="ce</s>")])
    assert isinstance(found, Encoded)
    assert learnt(tokenizer, found)[0].endswith("</s>")
    assert found.ids.count(tokenizer.eos_token_id or 0) == 1


def test_a_text_has_one_bos_and_one_eos(tokenizer: Tokenizer) -> None:
    for text in ("Once upon a time", "<s>Once upon a time</s>"):
        (found,) = Renderer(tokenizer).encode([Text(text=text)])
        assert isinstance(found, Encoded)
        assert found.ids == [*tokenizer.encode("Once upon a time"), tokenizer.eos_token_id]
        assert found.targets == b"\0" + b"\1" * (len(found.ids) - 1)
    parts = [Text(text="Once", ends=False), Text(text=" upon", begins=False)]
    first, second = Renderer(tokenizer).encode(parts)
    assert isinstance(first, Encoded)
    assert isinstance(second, Encoded)
    assert first.is_open
    assert tokenizer.decode(first.ids + second.ids, skip_special_tokens=False) == "<s>Once upon</s>"


def test_half_a_surrogate_pair_spoils_its_row_alone(tokenizer: Tokenizer) -> None:
    records = [Text(text="good"), Text(text="bad \ud800"), Text(text="good")]
    found = Renderer(tokenizer).encode(records)
    assert [isinstance(item, Encoded) for item in found] == [True, False, True]
    assert found[0] == found[2]


WORDS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufdd0\ufdd1"),
    min_size=1,
    max_size=30,
).filter(lambda text: text.strip() and not any(token in text for token in SPECIAL))


@given(st.lists(WORDS, min_size=2, max_size=6))
def test_any_answers_are_learnt_whole(tokenizer: Tokenizer, words: list[str]) -> None:
    """Every template of ChatML's shape writes an answer between two special tokens."""
    words = words[: len(words) // 2 * 2]
    turns = messages(*zip(["user", "assistant"] * (len(words) // 2), words, strict=True))
    plain = encoded(tokenizer, CHATML, turns)
    ids: list[int] = []
    targets: list[int] = []
    for turn in turns:
        head = tokenizer.encode(f"<|im_start|>{turn['role']}\n", add_special_tokens=False)
        is_answer = turn["role"] == "assistant"
        body = tokenizer.encode(
            f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>", add_special_tokens=False
        )
        newline = tokenizer.encode("<|im_end|>\n", add_special_tokens=False)[1:]
        ids += body + newline
        targets += [0] * len(head) + [int(is_answer)] * (len(body) - len(head)) + [0] * len(newline)
    assert plain.ids == ids
    if all(way == "prefix" for way in plain.ways):
        assert list(plain.targets) == targets
    marked = encoded(tokenizer, MARKED, turns)
    assert marked.ids == ids
    assert marked.ways == ["marks"] * (len(words) // 2)
    assert [a for a, b in zip(targets, marked.targets, strict=True) if a > b] == []


def test_vicuna_is_the_conversation_of_fastchat(tokenizer: Tokenizer) -> None:
    """Its rule: a space after system and user, the end token after the assistant."""
    given = messages(("system", "Be brief."), *TALK)
    expected = "<s>Be brief."
    marks = [(" ", ""), (" ", "</s>"), ("", ""), (" ", "</s>")]
    for (role, content), (before, after) in zip(TALK, marks, strict=True):
        expected += f"{before}{'USER' if role == 'user' else 'ASSISTANT'}: {content}{after}"
    template = NAMED["vicuna_v1.1"]
    assert tokenizer.render_chat(given, template=template, add_generation_prompt=False) == expected
    opened = tokenizer.render_chat(messages(TALK[0]), template=NAMED["vicuna_v1.1"])
    assert opened.startswith("<s>A chat between a curious user and an artificial intelligence")
    assert opened.endswith("user's questions. USER: What is a hanok? ASSISTANT:")
    with pytest.raises(RequestError, match=r"vicuna_v1\.1 knows no role tool"):
        tokenizer.render_chat(messages(("tool", "x")), template=NAMED["vicuna_v1.1"])


def test_the_first_token_is_never_a_target(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    found = encoded(tokenizer, template, messages(*TALK[:2]))
    assert list(found.targets) == [0] + [1] * (len(found.ids) - 1)


def test_a_token_across_the_beginning_of_an_answer_is_part_of_it(tokenizer: Tokenizer) -> None:
    """Served, the prompt would be other tokens there, so it is no prefix."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = encoded(tokenizer, template, messages(("user", "Who?"), ("assistant", "you")))
    assert found.ways == ["offsets"]
    assert learnt(tokenizer, found) == [" you<|end|>"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_text_that_changes_around_an_answer_is_no_place_for_it(
    tokenizer: Tokenizer, where: str
) -> None:
    turns = "{% for m in messages %}{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    size = "{{ messages[1].content | length }}"
    found = encoded(
        tokenizer, size + turns if where == "before" else turns + size, messages(*TALK[:2])
    )
    assert len(found.dropped) == 1
    assert not any(found.targets)
