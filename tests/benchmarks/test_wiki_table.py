"""benchmarks/wiki_table.py and what it is made of: the grown model, recited texts, rows and demands."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hanok
from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.engine.generate import generate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = (
    "measure",
    "checkpoints",
    "engine_worker",
    "grown",
    "recital",
    "wiki_worker",
    "wiki_table",
)
# Logits of up to 20, sums of a few hundred float32 products in another order.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def programs() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in PROGRAMS})
    for name in PROGRAMS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def grown(programs: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, twice as wide, with more layers, heads, KV heads and rows."""
    shape = dataclasses.replace(
        programs.checkpoints.SHAPES["llama-1.1b"],
        name="twice",
        hidden_size=512,
        num_layers=7,
        num_heads=8,
        num_kv_heads=2,
        intermediate_size=800,
    )
    return Path(programs.grown.make_grown(shape, tmp_path_factory.mktemp("grown")))


def test_a_grown_model_says_what_the_bundled_one_says(grown: Path) -> None:
    small, large = hanok.load(hanok.BUNDLED, dtype="float32"), hanok.load(grown, dtype="float32")
    assert large.config.num_layers == 7
    assert large.config.num_parameters() > 3 * small.config.num_parameters()
    prompt = "Once upon a time there was a little girl who had a red ball and"
    assert large.encode(prompt) == small.encode(prompt)
    ours, expected = large.logits(prompt), small.logits(prompt)
    assert expected.std() > 1
    assert (ours - expected).abs().max() < TOLERANCE
    options = {"max_new_tokens": 40, "temperature": 0.0}
    assert (
        large.generate(prompt, **options).token_ids == small.generate(prompt, **options).token_ids
    )  # type: ignore[arg-type]


def test_growing_spreads_kv_heads_with_the_heads_they_serve(
    programs: SimpleNamespace, tmp_path: Path
) -> None:
    shape = dataclasses.replace(
        programs.checkpoints.SHAPES["llama-1.1b"],
        name="spread",
        hidden_size=768,
        num_layers=5,
        num_heads=12,
        num_kv_heads=3,
        intermediate_size=768,
    )
    large = hanok.load(programs.grown.make_grown(shape, tmp_path), dtype="float32")
    difference = large.logits("Tom had a dog.") - hanok.load(hanok.BUNDLED, dtype="float32").logits(
        "Tom had a dog."
    )
    assert difference.abs().max() < TOLERANCE


def test_a_grown_model_is_made_once(programs: SimpleNamespace, grown: Path) -> None:
    weights = grown / "model.safetensors"
    before = weights.stat().st_mtime_ns
    shape = dataclasses.replace(
        programs.checkpoints.SHAPES["llama-1.1b"],
        name="twice",
        hidden_size=512,
        num_layers=7,
        num_heads=8,
        num_kv_heads=2,
        intermediate_size=800,
    )
    assert programs.grown.make_grown(shape, grown.parent) == grown
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 320, "num_heads": 5}, {"num_layers": 4}, {"num_kv_heads": 1}]
)
def test_shapes_that_are_too_small_are_refused(
    programs: SimpleNamespace, changes: dict[str, int]
) -> None:
    shape = dataclasses.replace(programs.checkpoints.SHAPES["llama-1.1b"], **changes)
    with pytest.raises(ValueError, match="does not fit"):
        programs.grown.grown_shape(shape)


class Guesses:
    """Guesses the next three tokens of a text, the third of them wrong."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.right: list[int] = []

    def drafts(self, sequences: dict[int, Any]) -> dict[int, list[int]]:
        place = len(sequences[0].generated_ids)
        return {0: [*self.answer[place : place + 2], 1999]} if place + 3 < len(self.answer) else {}

    def learn(self, key: int, sequence: Any, num_drafted: int, num_new: int) -> None:
        if num_drafted:
            assert num_drafted == 3
            self.right.append(num_new - 1)

    def timed(self, num_tokens: int, seconds: float) -> None:
        pass


def test_recited_texts_are_said_and_wrong_guesses_are_computed(programs: SimpleNamespace) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32")
    answer = [7, 8, 9, 10, 7, 8, 9, 11, 7, 8, 9, 11, 5]
    for guesses in (None, Guesses(answer)):
        options: Any = {"max_new_tokens": len(answer), "ignore_eos": True, "temperature": 0.0}
        sequence = model.sequence([3, 7, 8, 9, 10, 4], options)
        sequence.grammar = programs.recital.Recital(answer)
        list(generate(model.decoder, [sequence], speculator=guesses))  # type: ignore[arg-type]
        assert sequence.generated_ids == answer
        # The first token comes from the prompt's pass; each guess then brings three.
        assert guesses is None or guesses.right == [2, 2, 2]


def test_a_recital_lets_one_token_follow(programs: SimpleNamespace) -> None:
    recital = programs.recital.Recital([2, 0])
    scores = torch.tensor([0.5, 3.0, -1.0])
    assert recital.mask(scores).tolist() == [float("-inf"), float("-inf"), -1.0]
    assert recital.allowed_prefix([1, 1, 1]) == 3
    recital.accept(2)
    assert recital.mask(scores).argmax() == 0
    recital.accept(0)
    assert torch.equal(recital.mask(scores), scores)
    assert scores.tolist() == [0.5, 3.0, -1.0]


def test_the_corpus_is_what_it_is_said_to_be(programs: SimpleNamespace) -> None:
    """Repeating answers share long runs of tokens with their prompts, new ones next to none."""

    def shared(piece: Any, length: int = 8) -> float:
        runs = {tuple(piece.prompt[i : i + length]) for i in range(len(piece.prompt))}
        starts = range(len(piece.answer) - length + 1)
        return sum(tuple(piece.answer[i : i + length]) in runs for i in starts) / len(starts)

    repeating = programs.recital.pieces("repeating", hanok.BUNDLED)
    new = programs.recital.pieces("new", hanok.BUNDLED)
    assert (len(repeating), len(new)) == (12, 6)
    assert len({piece.name for piece in repeating + new}) == 18
    assert all(250 <= len(piece.prompt) <= 600 for piece in repeating)
    assert all(100 <= len(piece.answer) <= 250 for piece in repeating + new)
    assert all(shared(piece) > 0.3 for piece in repeating)
    assert all(shared(piece) < 0.02 for piece in new)


def result(first: float, whole: float, ids: list[list[int]], **more: Any) -> dict[str, Any]:
    row = {"first_s": [first], "whole_s": [whole], "token_ids": ids, "free_ids": [1, 2]}
    return {**row, "proposed": 0, "accepted": 0, "peak_gib": 1.0, "is_disturbed": False, **more}


def test_demands_are_computed_from_the_rows(programs: SimpleNamespace) -> None:
    table, five = programs.wiki_table, [[1, 2, 3, 4, 5]]
    results = {
        "hanok, eager, cache, 2794 tokens": [result(20.0, 30.0, five)],
        # 10 s to the first token, 1 s for each after it: 73 s for 64.
        "hanok, sdpa, cache, 2794 tokens": [result(10.0, 14.0, five)],
        # Each token takes 20 s: 1,280 for 64.
        "hanok, sdpa, no cache, 2794 tokens": [result(20.0, 40.0, [[1, 2]])],
        "hanok int8, repeating text, off": [result(1.0, 9.0, five)],
        "hanok int8, repeating text, ngram": [result(1.0, 5.0, five)],
        "hanok int8, new text, off": [result(1.0, 9.0, five)],
        "hanok int8, new text, ngram": [result(1.0, 10.0, five)],
        "hanok int8, stories, off": [result(1.0, 9.0, five)],
        "hanok int8, stories, draft in int8": [
            result(1.0, 4.5, [[1, 2, 3, 4, 6]], proposed=10, accepted=9)
        ],
        "hanok int8, stories, draft in int4": [result(1.0, 4.5, five, proposed=10, accepted=5)],
    }
    lines = [(line[2], line[3]) for line in table.demands(results, table.FULL)]
    assert lines == [
        ("0.500", "yes"),
        ("17.5", "yes"),
        ("1.80, identical", "yes"),
        ("0.900, identical", "no"),
        ("2.00, accepted 0.900, differs at token 4", "no"),
        ("2.00, accepted 0.500, identical", "no"),
    ]
    del results["hanok, eager, cache, 2794 tokens"]
    assert table.demands(results, table.FULL)[0][2:] == ("not measured", "–")


def test_free_tokens_decide_where_texts_are_recited(programs: SimpleNamespace) -> None:
    same = programs.wiki_table.same_text
    first, second = result(1.0, 2.0, [[5, 6]]), result(1.0, 2.0, [[5, 6]])
    assert same([first], [second]) == "identical"
    second["free_ids"] = [1, 3]
    assert same([first], [second]) == "differs at token 1"


def test_sequences_that_run_together_share_their_seconds(programs: SimpleNamespace) -> None:
    together = result(1.0, 3.0, [[1, 2, 3], [1, 2, 3]])
    # Four tokens come in the two seconds after the first two.
    assert programs.wiki_table.next_seconds(together) == pytest.approx(0.5)
    assert programs.wiki_table.num_tokens(together) == 6


def materials(programs: SimpleNamespace, folder: Path) -> Any:
    return programs.wiki_table.materials_of(programs.wiki_table.QUICK, folder, hanok.BUNDLED, 1)


@pytest.fixture(scope="module")
def quick(programs: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return materials(programs, tmp_path_factory.mktemp("quick"))


def test_rows_refer_to_rows_that_are_there(programs: SimpleNamespace, quick: Any) -> None:
    rows = [row for make in programs.wiki_table.PARTS.values() for row in make(quick)]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert {row.against for row in rows} <= set(names)
    peers = {row.peer for row in rows if row.peer is not None}
    assert peers <= {row.name for row in rows if row.job.engine == "transformers"}
    full = dataclasses.replace(quick, scale=programs.wiki_table.FULL)
    asked = [row.name for make in programs.wiki_table.PARTS.values() for row in make(full)]
    done = {name: [result(1.0, 2.0, [[1, 2]])] for name in asked}
    lines = programs.wiki_table.demands(done, programs.wiki_table.FULL)
    assert "not measured" not in {line[2] for line in lines}


def test_the_rows_of_hanok_do_what_they_say(programs: SimpleNamespace, quick: Any) -> None:
    """In this process, all parts: what is recited, guessed, computed together and again."""
    table, threads = programs.wiki_table, torch.get_num_threads()
    rows = {row.name: row for make in table.PARTS.values() for row in make(quick)}
    rows = {name: row for name, row in rows.items() if row.job.engine == "hanok"}
    try:
        done = {name: programs.wiki_worker.run(row.job) for name, row in rows.items()}
    finally:
        torch.set_num_threads(threads)
    for name, row in rows.items():
        found = done[name]
        lengths = [len(ids) for ids in found["token_ids"]]
        assert lengths == row.job.new_tokens or row.job.schema is not None, name
        assert all(
            0 < first <= whole
            for first, whole in zip(found["first_s"], found["whole_s"], strict=True)
        )
        assert row.job.recited is None or found["token_ids"] == row.job.recited
        # How much is guessed depends on measured times; what may be, does not.
        assert row.job.speculation is not None or found["proposed"] == 0
    for bits in ("int8", "int4"):
        draft = done[f"hanok int8, stories, draft in {bits}"]
        assert draft["token_ids"] == done["hanok int8, stories, off"]["token_ids"]
    plain = done["hanok int8, JSON, off"]
    written = open_tokenizer(hanok.BUNDLED).decode(plain["token_ids"][0])
    assert re.match(r' *\{ ?"first_name" ?: ?"', written)
    for how in ("ngram", "draft in int8"):
        assert done[f"hanok int8, JSON, {how}"]["token_ids"] == plain["token_ids"]
    text = table.part_table(
        list(rows.values()), {name: [row] for name, row in done.items()}, quick.scale
    )
    assert len(text.splitlines()) == 2 + len(rows)


def test_only_calls_that_both_made_are_compared(programs: SimpleNamespace, quick: Any) -> None:
    table = programs.wiki_table
    ours, theirs = (
        next(row for row in table.ngram_rows(quick) if row.name == name)
        for name in ("hanok int8, new text, off", "transformers bf16, new text, off")
    )
    assert ours.peer == theirs.name
    two = result(0.5, 1.0, [[1, 2]]) | {"first_s": [0.5, 1.0], "whole_s": [1.0, 9.0]}
    done = {ours.name: [two], theirs.name: [result(0.5, 3.0, [[1, 2]])]}
    header, _, mine, other = table.part_table([ours, theirs], done, quick.scale).splitlines()
    place = [cell.strip() for cell in header.split("|")].index("over transformers")
    assert [line.split("|")[place].strip() for line in (mine, other)] == ["3.00", "–"]


def test_the_program_writes_its_report(quick: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, str(BENCHMARKS / "wiki_table.py"), "--quick", "--threads", "1"]
    command += ["--parts", "loop", "draft", "--engines", "hanok", "--output", str(report)]
    command += ["--folder", str(Path(quick.model).parent)]
    subprocess.run(command, check=True, capture_output=True)
    text = report.read_text()
    assert "| hanok int8, stories, draft in int4" in text
    assert "| sdpa / eager, prefill of 60 tokens" in text
    assert "not measured" in text
    lines = [json.loads(line) for line in report.with_suffix(".jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == [
        "hanok",
        "hanok int8, stories, draft in int4",
        "hanok int8, stories, draft in int8",
        "hanok int8, stories, off",
    ]
    more = [*command, "--resume", "--runs", "2"]
    more[more.index("draft")] = "schema"
    subprocess.run(more, check=True, capture_output=True)
    rounds = [json.loads(line) for line in report.with_suffix(".jsonl").read_text().splitlines()]
    counted = Counter((line["name"], line["round"]) for line in rounds)
    assert set(counted.values()) == {1}
    assert Counter(name for name, _ in counted) == {
        "hanok": 2,
        **dict.fromkeys((line["name"] for line in lines if "stories" in line["name"]), 1),
        **{f"hanok int8, JSON, {how}": 2 for how in ("off", "ngram", "draft in int8")},
    }
    text = report.read_text()
    again = [*command, "--resume", "--runs", "0"]
    subprocess.run(again, check=True, capture_output=True)
    tables = [part[part.index("\n## ") :] for part in (text, report.read_text())]
    assert tables[0] == tables[1]


def test_transformers_recites_too(programs: SimpleNamespace, quick: Any) -> None:
    table, threads = programs.wiki_table, torch.get_num_threads()
    rows = {row.name: row.job for row in [*table.ngram_rows(quick), *table.loop_rows(quick)]}
    try:
        for name in ("off", "ngram"):
            job = rows[f"transformers bf16, repeating text, {name}"]
            found = programs.wiki_worker.run(job)
            assert found["token_ids"] == job.recited
        whole = programs.wiki_worker.run(rows["transformers, generate()"])
        by_hand = programs.wiki_worker.run(rows["transformers, a loop by hand"])
    finally:
        torch.set_num_threads(threads)
    assert whole["token_ids"] == by_hand["token_ids"]
    assert 0 < whole["first_s"][0] < whole["whole_s"][0]
