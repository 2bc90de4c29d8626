"""Datasets: files become documents in packs, once; what looks wrong is refused with its row."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import hanok
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.errors import DataError, OptionError
from hanok.training.data import tokenize
from hanok.training.data.dataset import Dataset
from hanok.training.data.options import DataOptions, Source, read_source

QUESTIONS = ["What is a hanok?", "Is it warm?", "Who lives there?", "How old is it?"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(hanok.BUNDLED)


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return file


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [chat(QUESTIONS[i % 4], f"Answer {i}. " * (1 + i % 7)) for i in range(40)]
    return write_lines(tmp_path / "chats.jsonl", rows)


def opened(tokenizer: Tokenizer, *sources: str | Path | Source, **options: Any) -> Dataset:
    kept = {
        name: options.pop(name) for name in ("seed", "cache_folder", "end_ids") if name in options
    }
    size = options.pop("pack_tokens", 256)
    return Dataset.open(sources, tokenizer, DataOptions(**options), pack_tokens=size, **kept)


def test_documents_are_what_serving_renders(tokenizer: Tokenizer, chats: Path) -> None:
    dataset = opened(tokenizer, chats)
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    assert len(dataset.lengths) == len(rows)
    for number, row in enumerate(rows):
        ids, targets = dataset.document(number)
        assert ids == tokenizer.encode_chat(row["messages"], add_generation_prompt=False)
        assert len(targets) == dataset.lengths[number]
        prompt = tokenizer.encode_chat(row["messages"][:1])
        assert targets == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    dataset.check()


def test_every_document_is_in_one_pack(tokenizer: Tokenizer, chats: Path) -> None:
    dataset = opened(tokenizer, chats)
    for epoch in (0, 1):
        packs = dataset.packs(epoch)
        assert sorted(i for found in packs for i in found) == list(range(len(dataset.lengths)))
        assert all(sum(dataset.lengths[i] for i in found) <= 256 for found in packs)
    assert dataset.packs(0) != dataset.packs(1)
    assert opened(tokenizer, chats).packs(1) == dataset.packs(1)
    single = opened(tokenizer, chats, packing=False).packs(0)
    assert sorted(single) == [[i] for i in range(40)]
    assert dataset.lengths[single[0][0]] == max(dataset.lengths)


def test_the_second_time_nothing_is_read(
    tokenizer: Tokenizer, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = opened(tokenizer, chats, cache_folder=cache)
    seen: list[Path] = []
    real = tokenize.read_rows

    def read_rows(file: Path) -> Any:
        seen.append(file)
        return real(file)

    monkeypatch.setattr(tokenize, "read_rows", read_rows)
    second = opened(tokenizer, chats, cache_folder=cache)
    assert seen == []
    assert [second.document(i) for i in range(40)] == [first.document(i) for i in range(40)]
    assert second.summary() == first.summary()
    # Another length is another cut of the same; another template or other contents are not the same.
    opened(tokenizer, chats, cache_folder=cache, max_length=64, allow=("truncated",))
    assert seen == []
    opened(tokenizer, chats, cache_folder=cache, chat_template="vicuna_v1.1")
    assert len(seen) == 1
    write_lines(chats, [chat("Another?", "Yes.")])
    assert len(opened(tokenizer, chats, cache_folder=cache).lengths) == 1
    assert len(seen) == 2


@pytest.mark.parametrize("damage", ["cut off", "absent", "empty"])
def test_a_damaged_copy_is_made_again(
    tokenizer: Tokenizer, chats: Path, tmp_path: Path, damage: str
) -> None:
    cache = tmp_path / "cache"
    first = opened(tokenizer, chats, cache_folder=cache)
    expected = [first.document(i) for i in range(40)]
    (ids,) = cache.glob("*/ids.bin")
    if damage == "absent":
        ids.with_name("targets.bin").unlink()
    elif damage == "empty":
        ids.with_name("summary.json").write_text("")
    else:
        ids.write_bytes(ids.read_bytes()[:-4])
    second = opened(tokenizer, chats, cache_folder=cache)
    assert [second.document(i) for i in range(40)] == expected


def test_a_folder_that_cannot_be_written_says_so(
    tokenizer: Tokenizer, chats: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be read, or its hash not be kept"):
        opened(tokenizer, chats, cache_folder=tmp_path / "cache")


def test_nothing_is_left_of_a_file_that_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match="no known format"):
        opened(tokenizer, file, cache_folder=tmp_path / "cache")
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["hashes.json"]


def test_bad_rows_are_counted_with_their_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows: list[Any] = [chat(QUESTIONS[0], "Yes.") for _ in range(8)]
    rows[2:2] = ["{not json", {"messages": [{"role": "user", "content": "no answer"}]}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as raised:
        opened(tokenizer, file)
    text = str(raised.value)
    assert "2 of 10 rows are bad (20.0%), more than max_bad_rows allows (1.0%)" in text
    assert f"{file}:3: not valid JSON" in text
    assert f"{file}:4: there is no answer of the assistant to learn" in text
    (found,) = opened(tokenizer, file, max_bad_rows=0.2).summary().files
    assert (found.num_rows, found.num_bad_rows, found.num_documents) == (10, 2, 8)
    assert [line for line, _ in found.bad_rows] == [3, 4]


def test_a_long_text_is_cut_into_pieces_that_miss_nothing(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "story.txt"
    file.write_text("Once upon a time there was a house. " * 60)
    dataset = opened(tokenizer, file, pack_tokens=100)
    learnt: list[int] = []
    for number in range(len(dataset.lengths)):
        ids, targets = dataset.document(number)
        assert 2 <= len(ids) <= 100
        assert targets == [False] + [True] * (len(ids) - 1)
        learnt += ids[1:]
    whole = tokenizer.encode(file.read_text())
    assert learnt == [*whole[1:], tokenizer.eos_token_id]
    dataset.check()


def test_a_cut_answer_has_no_end_and_is_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [chat("Short?", "Yes."), chat("Long?", "On and on. " * 60), chat("x " * 200, "No.")]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        DataError, match=r"(?s)truncated: .*; 2 documents.*rows\.jsonl:2:.*On and on"
    ):
        opened(tokenizer, file, max_length=64).check()
    dataset = opened(tokenizer, file, max_length=64, max_truncated=0.7)
    dataset.check()
    ids, targets = dataset.document(1)
    assert len(ids) == 64
    assert targets[-1]
    assert tokenizer.eos_token_id not in ids
    found = dataset.summary()
    assert (found.num_truncated, found.num_left_out, found.num_documents) == (2, 1, 2)


WRONG = {
    "all-masked": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    },
    "none-masked": {"prompt": "", "completion": "all of it"},
    "doubled-bos": {"text": "Twice <s><s> in it"},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_looks_wrong_is_refused_with_its_row(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [WRONG[name]])
    # It writes an answer that depends on the whole conversation, so that no way finds it.
    hidden = "{{ messages | length }}{{ messages[-1].content | upper }}"
    template = hidden if name == "all-masked" else None
    dataset = opened(tokenizer, file, chat_template=template, allow=("no-end-token",))
    with pytest.raises(DataError) as raised:
        dataset.check()
    assert f"{name}: " in str(raised.value)
    assert f"The first is {file}:1:\n" in str(raised.value)
    assert f"--allow {name}" in str(raised.value)
    allowed = opened(tokenizer, file, chat_template=template, allow=("no-end-token", name))
    if name != "all-masked":
        allowed.check()


def test_an_answer_without_an_end_is_refused(tokenizer: Tokenizer, chats: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="no-end-token: no token ends the answer"):
        opened(tokenizer, chats, chat_template=template).check()
    opened(tokenizer, chats, chat_template=template, allow=("no-end-token",)).check()


def test_a_mixture_reads_each_source_as_often_as_it_says(
    tokenizer: Tokenizer, chats: Path, tmp_path: Path
) -> None:
    few = write_lines(tmp_path / "few.jsonl", [{"text": f"Text {i} of a few."} for i in range(4)])
    dataset = opened(tokenizer, f"{chats}:times=0.25", f"{few}:times=2,cap=3")
    taken = Counter(i for epoch in range(4) for found in dataset.packs(epoch) for i in found)
    assert [taken[i] for i in range(40)] == [1] * 40
    assert [taken[i] for i in range(40, 43)] == [8] * 3
    assert len(dataset.lengths) == 43


def test_a_part_can_be_held_out(tokenizer: Tokenizer, chats: Path) -> None:
    whole = opened(tokenizer, chats)
    learnt, held = whole.split(0.2)
    assert (len(learnt.lengths), len(held.lengths)) == (32, 8)
    texts = [
        tuple(part.document(i)[0]) for part in (learnt, held) for i in range(len(part.lengths))
    ]
    assert Counter(texts) == Counter(tuple(whole.document(i)[0]) for i in range(40))
    with pytest.raises(OptionError, match="leaves one of the two parts empty"):
        whole.split(0.001)


def test_empty_data_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [])
    with pytest.raises(DataError, match=r"rows\.jsonl: there are no rows in this file"):
        opened(tokenizer, file)
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        DataError, match="no file of training data in this folder; there is nothing"
    ):
        opened(tokenizer, tmp_path / "folder")


def test_a_template_that_writes_no_answers_is_refused(tokenizer: Tokenizer, chats: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError) as raised:
        opened(tokenizer, chats, chat_template=template).check()
    assert "all-masked: nothing of it would be learnt; 40 documents" in str(raised.value)
    assert f"{chats}:1:" in str(raised.value)


def test_ends_at_which_serving_does_not_stop_are_noted(tokenizer: Tokenizer, chats: Path) -> None:
    (note,) = opened(tokenizer, chats, end_ids=[5]).notes
    assert "ends answers with '</s>', at which the model does not stop" in note
    assert opened(tokenizer, chats, end_ids=[1]).notes == ()


def test_conversations_need_a_template(tmp_path: Path, chats: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    settings = json.loads((hanok.BUNDLED / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_bytes((hanok.BUNDLED / "tokenizer.json").read_bytes())
    base = open_tokenizer(folder)
    with pytest.raises(
        DataError, match=r"no chat template. Name one as chat_template: vicuna_v1.1"
    ):
        opened(base, chats)
    opened(base, chats, chat_template="vicuna_v1.1").check()


def test_documents_longer_than_a_pack_are_refused(tokenizer: Tokenizer, chats: Path) -> None:
    with pytest.raises(OptionError, match="max_length is 512, more than the 256 tokens of a pack"):
        opened(tokenizer, chats, max_length=512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jsonl:tims=2", "'tims=2' is not understood. Known names: times"),
        ("a.jsonl:times=few", "times is 'few', which is not a number"),
        ("a.jsonl:times=0", "times is 0.0; it must be above 0"),
        ("a.jsonl:cap=0", "cap is 0; it must be at least 1"),
        ("a.jsonl:format=sharegtp", "format 'sharegtp' is unknown. Known: sharegpt"),
    ],
)
def test_a_source_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        read_source(text)
    assert message in str(raised.value)


def test_a_source_is_a_path_with_settings(tmp_path: Path) -> None:
    found = read_source("a:b/c.jsonl:times=2,cap=5,instruction=q")
    expected = Source(path=Path("a:b/c.jsonl"), times=2, cap=5, columns={"instruction": "q"})
    assert found == expected
    assert read_source("a.jsonl") == Source(path=Path("a.jsonl"))
    odd = tmp_path / "odd:times=2"
    odd.write_text("")
    assert read_source(str(odd)) == Source(path=odd)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match=r"allow: 'all-mask' is unknown. Known: all-masked"):
        DataOptions(allow=("all-mask",))
    with pytest.raises(OptionError, match=r"max_bad_rows is 2; it is a share"):
        DataOptions(max_bad_rows=2)
    with pytest.raises(OptionError, match="max_length is 1"):
        DataOptions(max_length=1)
