"""Texts with a gap: markers where models were trained with them, and nowhere else."""

from itertools import chain
from pathlib import Path

import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from hanok.checkpoint.infill import SPELLINGS, Infill, Spelling, find_infill
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer

CODE = [
    "def add(a, b):\n    return a + b\n",
    "for x in range(9):\n    print(x)\n",
    "안녕 <b> [x] |y|",
]
QWEN, STARCODER, LLAMA, _, CODESTRAL, SEED = SPELLINGS


def markers(spelling: Spelling) -> list[str]:
    named = [spelling.prefix, spelling.suffix, spelling.middle, spelling.file, *spelling.ends]
    return [text for text in named if text is not None]


def byte_level(folder: Path, spelling: Spelling | None, *, special: bool = False) -> Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    library.train_from_iterator(CODE, trainer)
    if spelling is not None:
        added = [tokenizers.AddedToken(text, special=special) for text in markers(spelling)]
        (library.add_special_tokens if special else library.add_tokens)(added)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return open_tokenizer(folder)


def found(tokenizer: Tokenizer) -> Infill:
    infill = find_infill(tokenizer)
    assert infill is not None
    return infill


def test_a_vocabulary_without_markers_has_none(tmp_path: Path) -> None:
    assert find_infill(byte_level(tmp_path, None)) is None


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda item: item.prefix)
def test_the_order_of_each_family(tmp_path: Path, spelling: Spelling, special: bool) -> None:
    tokenizer = byte_level(tmp_path, spelling, special=special)
    ids = found(tokenizer).encode("before\n", "\nbehind", middle="mid")
    prefix, suffix = f"{spelling.prefix}before\n", f"{spelling.suffix}\nbehind"
    order = suffix + prefix if spelling.is_suffix_first else prefix + suffix
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == f"<s>{order}{spelling.middle or ''}mid"
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_other_files_come_first(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, QWEN)
    ids = found(tokenizer).encode("a", "b", files=[("x.py", "one"), ("y.py", "two\n")])
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<s><|file_sep|>x.py\none\n<|file_sep|>y.py\ntwo\n<|file_sep|>"
        "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    )
    other = tmp_path / "other"
    other.mkdir()
    tokenizer = byte_level(other, SEED)  # which has no marker of files
    ids = found(tokenizer).encode("a", "b", files=[("x.py", "one")])
    assert tokenizer.decode(ids).startswith("x.py\none\n")


def test_a_prompt_of_ids_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, QWEN)
    assert found(tokenizer).encode([7, 300, 7], "")[2:5] == [7, 300, 7]


def test_every_marker_ends_the_gap(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, QWEN)
    infill = found(tokenizer)
    assert {tokenizer.spelling(token) for token in infill.end_ids} == {*markers(QWEN)}
    assert {*infill.end_texts()} == {*markers(QWEN)}
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    assert found(byte_level(hidden, QWEN, special=True)).end_texts() == []


SPELLED = st.sampled_from(
    [*markers(QWEN), "<s>", "</s>", "<|fim_", "prefix|>", "a", " ", "\n", "안"]
)
TEXTS = st.lists(SPELLED, max_size=12).map("".join)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_level(tmp_path_factory.mktemp("qwen"), QWEN)


@settings(max_examples=150)
@given(TEXTS, TEXTS, TEXTS)
@example("<|fim_middle|>", "<|fim_middle|><|fim_middle|>", "</s>")
def test_no_text_becomes_a_marker(qwen: Tokenizer, prefix: str, suffix: str, file: str) -> None:
    """What was cut out for the markers decodes to the texts, byte for byte."""
    ids = found(qwen).encode(prefix, suffix, files=[("n", file)])
    special = {qwen.token_to_id(text) for text in (*markers(QWEN), "<s>", "</s>")}
    places = [place for place, token in enumerate(ids) if token in special]
    names = [qwen.spelling(ids[place]) for place in places]
    order = [QWEN.file, QWEN.file, QWEN.prefix, QWEN.suffix, QWEN.middle]
    assert names == ["<s>", *order]
    parts = [
        qwen.decode(ids[start + 1 : end], skip_special_tokens=False)
        for start, end in zip(places, [*places[1:], None], strict=True)
    ]
    whole = f"n\n{file}" if file.endswith("\n") else f"n\n{file}\n"
    assert parts == ["", whole, "", prefix, suffix, ""]


@pytest.fixture(scope="module", params=[LLAMA, CODESTRAL], ids=["llama", "codestral"])
def piece(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Spelling, Tokenizer, sentencepiece.SentencePieceProcessor]:
    spelling, folder = request.param, tmp_path_factory.mktemp("piece")
    (folder / "text.txt").write_text("".join(CODE * 9), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=markers(spelling),
        minloglevel=2,
    )
    tokenizer = open_tokenizer(folder)
    return (
        spelling,
        tokenizer,
        sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")),
    )


@pytest.mark.parametrize("prefix", ["def add", " def", "", "    x\n", "안 <b>"])
@pytest.mark.parametrize("suffix", ["return a", " b", "", "\n    x", "<b> 안"])
def test_the_space_of_sentencepiece_stands_before_the_prefix_alone(
    piece: tuple[Spelling, Tokenizer, sentencepiece.SentencePieceProcessor],
    prefix: str,
    suffix: str,
) -> None:
    """`<PRE> def add <SUF>return <MID>`, and Codestral's `[SUFFIX]return[PREFIX] def add`."""
    spelling, tokenizer, model = piece
    bare = sentencepiece.SentencePieceProcessor(
        model_proto=model.serialized_model_proto() + b"\x1a\x02\x18\x00"  # without add_dummy_prefix
    )
    first = [model.piece_to_id(spelling.prefix), *model.encode(prefix)]
    second = [model.piece_to_id(spelling.suffix), *bare.encode(suffix)]
    parts = [second, first] if spelling.is_suffix_first else [first, second]
    end = [] if spelling.middle is None else [model.piece_to_id(spelling.middle)]
    assert found(tokenizer).encode(prefix, suffix) == [model.bos_id(), *chain(*parts), *end]
