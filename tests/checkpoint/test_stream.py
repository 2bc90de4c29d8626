"""The stream gives the text of the whole list, in pieces that never hold half a character."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from hanok.checkpoint.stream import HOLD_LIMIT, ByteStream, TokenTexts, WindowStream
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer

SENTENCES = (
    "The old house stands between two rivers, and its floor is warm in winter.",
    "Under the stone floor runs the smoke of the kitchen fire.",
    "한옥의 온돌은 겨울에 따뜻하다. 마루는 여름에 시원하다.",
    "Rain on the roof; nobody hears it from the inner room, 1234567890 times!",
    "🙂🏠 naïve café — “quoted” text",
)


def save_byte_level(folder: Path) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES * 4, trainer)
    library.add_tokens(["방구들", "é", "   "])
    library.save(str(folder / "tokenizer.json"))
    return library


def byte_fallback_library(*, strips: bool = True) -> tokenizers.Tokenizer:
    texts = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += ["▁", "▁▁", "▁a", "a", "b", "▁the", "안", ".", "\ufffd"]
    library = tokenizers.Tokenizer(
        models.BPE({text: i for i, text in enumerate(texts)}, [], byte_fallback=True)
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", left=1)] if strips else []),
        ]
    )
    library.add_special_tokens(["<s>"])
    return library


def train_sentencepiece(folder: Path) -> None:
    (folder / "sentences.txt").write_text("\n".join(SENTENCES * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "sentences.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


def with_library(folder: Path, library: tokenizers.Tokenizer) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return open_tokenizer(folder)


class Case:
    def __init__(self, tokenizer: Tokenizer, whole) -> None:
        self.tokenizer = tokenizer
        self.whole = whole
        """The library's own decode of the ids, without special tokens."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    byte_level = tmp_path_factory.mktemp("byte_level")
    library = save_byte_level(byte_level)
    fallback = byte_fallback_library()
    bare = byte_fallback_library(strips=False)
    piece = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece(piece)
    model = sentencepiece.SentencePieceProcessor(model_file=str(piece / "tokenizer.model"))
    special = {i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i)}
    folder = tmp_path_factory.mktemp("others")
    return {
        "byte_level": Case(open_tokenizer(byte_level), library.decode),
        "byte_fallback": Case(with_library(folder / "fallback", fallback), fallback.decode),
        "no_strip": Case(with_library(folder / "bare", bare), bare.decode),
        "sentencepiece": Case(
            open_tokenizer(piece),
            lambda ids: model.decode([i for i in ids if i not in special]),
        ),
    }


KINDS = ("byte_level", "byte_fallback", "no_strip", "sentencepiece")
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def pieces(tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(max_examples=150)
@given(text=TEXTS)
def test_text_survives(cases, kind, text):
    case = cases[kind]
    text = text.replace("\0", "")
    ids = case.tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(case.tokenizer, ids)) == case.tokenizer.decode(ids)
    assert case.tokenizer.decode(ids) == case.whole(ids)
    # "é" is an added token here: as bytes its spelling is the byte E9, in the library as well.
    if "é" not in text:
        assert case.tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_behind_other_ids_a_stream_is_what_follows_them(cases, kind, data):
    """Whether the ids before were pushed or the stream began behind them, the pieces are the same."""
    tokenizer = cases[kind].tokenizer
    any_ids = st.integers(0, tokenizer.vocab_size + 2)
    # Valid characters and plain tokens: what bytes without a character leave depends on all of them.
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in SENTENCES]
    before = data.draw(st.lists(any_ids, max_size=HOLD_LIMIT) | st.sampled_from(texts))
    before = before[: data.draw(st.integers(0, len(before)))]
    following = data.draw(st.lists(any_ids, max_size=8))
    whole = tokenizer.stream()
    for token_id in before:
        whole.push(token_id)
    expected = [*(whole.push(token_id) for token_id in following), whole.finish()]
    stream = tokenizer.stream(after=before)
    assert [*(stream.push(token_id) for token_id in following), stream.finish()] == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_prompt_and_pieces_are_the_text_of_both(cases, kind, data):
    """As the library that owns the vocabulary writes it, wherever a text is cut in two."""
    case = cases[kind]
    text = data.draw(st.sampled_from(SENTENCES)) * data.draw(st.integers(1, 2))
    ids = case.tokenizer.encode(text, add_special_tokens=False)
    cuts = [at for at in range(len(ids)) if "\ufffd" not in case.whole(ids[:at])]
    at = data.draw(st.sampled_from(cuts))
    stream = case.tokenizer.stream(after=ids[:at])
    pieces = [*(stream.push(token_id) for token_id in ids[at:]), stream.finish()]
    assert case.whole(ids[:at]) + "".join(pieces) == case.whole(ids)


def test_the_first_piece_keeps_its_space_behind_a_prompt(cases):
    for kind in ("byte_fallback", "sentencepiece"):
        tokenizer = cases[kind].tokenizer
        bos, the = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("▁the")
        assert tokenizer.stream(after=[bos, the]).push(the) == " the"
        # A special token does not take the space, but is no text that a space could follow.
        assert tokenizer.stream(after=[bos, the, bos]).push(the) == " the"
        assert tokenizer.stream(after=[bos]).push(the) == "the"
        assert tokenizer.stream(after=[the] * 100).push(the) == " the"


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_a_prompt_begins_is_completed(cases, kind):
    tokenizer = cases[kind].tokenizer
    ids = [byte_id(tokenizer, byte) for byte in "집".encode()]
    stream = tokenizer.stream(after=ids[:2])
    assert [stream.push(ids[2]), stream.finish()] == ["집", ""]


def test_a_special_token_is_passed_over_or_spelled(cases):
    for kind in KINDS:
        tokenizer = cases[kind].tokenizer
        special, other = min(tokenizer.special_token_ids), tokenizer.token_to_id("a")
        stream = tokenizer.stream()
        assert (stream.push(special), stream.passed_over(special)) == (
            "",
            tokenizer.token_text(special),
        )
        assert stream.passed_over(other) == ""
        assert stream.passed_over(tokenizer.vocab_size + 7) == ""
        spelling = tokenizer.stream(spelled=[special], after=[other])
        assert spelling.push(special) == tokenizer.token_text(special)
        assert spelling.passed_over(special) == ""


def test_a_space_that_a_byte_spells_is_kept(cases):
    """The space before the first word is the model's own and goes; this one is the text's."""
    case = cases["sentencepiece"]
    space = case.tokenizer.token_to_id("<0x20>")
    assert case.tokenizer.decode([space]) == case.whole([space]) == " "
    assert "".join(pieces(case.tokenizer, [space])) == " "


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(data=st.data())
def test_any_ids_join_to_decode(cases, kind, data):
    case = cases[kind]
    ids = data.draw(
        st.lists(st.integers(0, case.tokenizer.vocab_size - 1) | st.integers(2, 270), max_size=20)
    )
    text = case.tokenizer.decode(ids)
    assert "".join(pieces(case.tokenizer, ids)) == text
    whole = case.whole(ids)
    if "\ufffd" not in whole or kind == "byte_level":
        assert text == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(before=TEXTS, data=st.data())
def test_bytes_of_a_text_come_as_characters(cases, kind, before, data):
    # Whatever follows, each character is there as soon as its last byte is.
    tokenizer = cases[kind].tokenizer
    text = "집" + before.replace("\0", "").replace(" ", "") + "🏠"
    spelled = [byte_id(tokenizer, byte) for byte in text.encode()]
    stream = tokenizer.stream()
    seen = ""
    for count, token_id in enumerate(spelled, start=1):
        seen += stream.push(token_id)
        assert seen == text.encode()[:count].decode(errors="ignore")
    tail = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=5))
    for token_id in tail:
        seen += stream.push(token_id)
    assert (seen + stream.finish()).startswith(text)


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    found = tokenizer.token_to_id(f"<0x{byte:02X}>")
    if found is None:
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [value for value in range(256) if value not in visible]
        spelling = {value: chr(value) for value in visible}
        spelling |= {value: chr(0x100 + place) for place, value in enumerate(hidden)}
        # "é" was added as a text of its own; its byte is spelled by the same character.
        found = tokenizer.token_to_id(spelling[byte])
    assert found is not None
    return found


def test_a_bad_byte_spares_its_neighbours(cases):
    tokenizer = cases["byte_fallback"].tokenizer
    good = [byte_id(tokenizer, byte) for byte in "안녕".encode()]
    bad = byte_id(tokenizer, 0xFF)
    assert pieces(tokenizer, [*good[:3], bad, *good[3:]]) == [
        "",
        "",
        "안",
        "\ufffd",
        "",
        "",
        "녕",
        "",
    ]
    assert tokenizer.decode([*good, *good[:2]]) == "안녕\ufffd"
    assert tokenizer.decode([*good[:2], *good[3:]]) == "\ufffd녕"


def test_first_space_goes_once(cases):
    tokenizer = cases["byte_fallback"].tokenizer
    the, space, two = (tokenizer.token_to_id(text) for text in ("▁the", "▁", "▁▁"))
    assert pieces(tokenizer, [the, the]) == ["the", " the", ""]
    assert pieces(tokenizer, [space, the, space, the]) == ["", " the", " ", " the", ""]
    assert tokenizer.decode([two, the]) == "  the"
    # After a byte that is no character the text has begun: its space stays.
    assert tokenizer.decode([byte_id(tokenizer, 0xFF), the]) == "\ufffd the"
    assert tokenizer.decode([byte_id(tokenizer, 0x20), the]) == " the"
    assert tokenizer.decode([the, *[space] * (2 * HOLD_LIMIT), the]) == (
        "the" + " " * 2 * HOLD_LIMIT + " the"
    )
    bare = cases["no_strip"].tokenizer
    assert pieces(bare, [the, the]) == [" the", " the", ""]


def test_special_and_unknown_ids_do_not_cut_a_character(cases):
    for kind in KINDS:
        tokenizer = cases[kind].tokenizer
        first, *rest = [byte_id(tokenizer, byte) for byte in "집".encode()]
        special = min(tokenizer.special_token_ids)
        assert tokenizer.decode([first, special, tokenizer.vocab_size + 7, *rest]) == "집"
        spelled = tokenizer.token_text(special)
        shown = tokenizer.decode([special], skip_special_tokens=False)
        assert shown == spelled != ""


def test_byte_level_tokens_added_as_text(cases):
    tokenizer = cases["byte_level"].tokenizer
    assert tokenizer.decode([tokenizer.token_to_id("방구들")]) == "방구들"
    assert tokenizer.decode(tokenizer.encode("   x")) == "   x"


def test_streams_of_each_kind(cases):
    assert isinstance(cases["byte_level"].tokenizer.stream(), ByteStream)
    for kind in KINDS[1:]:
        assert isinstance(cases[kind].tokenizer.stream(), WindowStream)


def test_decoder_that_mixes_bytes_with_rules_holds_back(tmp_path):
    library = save_byte_level(tmp_path)
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    tokenizer = with_library(tmp_path / "mixed", library)
    ids = [byte_id(tokenizer, byte) for byte in "집a".encode()]
    assert pieces(tokenizer, ids) == ["", "", "집", "a", ""]
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    # A character that never ends is let go, and so is a long row of U+FFFD.
    stream = tokenizer.stream()
    lost = [stream.push(byte_id(tokenizer, 0xFF)) for _ in range(HOLD_LIMIT)]
    assert lost == [""] * (HOLD_LIMIT - 1) + ["\ufffd" * HOLD_LIMIT]


def test_decoder_without_rules_joins_with_spaces(tmp_path):
    library = tokenizers.Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    tokenizer = with_library(tmp_path / "words", library)
    assert pieces(tokenizer, [0, 1, 1]) == ["one", " two", " two", ""]
    assert json.loads(library.to_str())["decoder"] is None


def test_decoder_that_rewrites_keeps_what_was_emitted():
    spelled = {0: "x", 1: "y"}

    def decode(ids: Sequence[int]) -> str:
        text = "".join(spelled[token_id] for token_id in ids)
        return text[::-1]

    texts = TokenTexts(
        decode=decode,
        token_bytes=lambda token_id: None,
        is_known=spelled.__contains__,
        is_bytes_only=False,
        can_split_characters=False,
        anchor=(0,),
    )
    stream = texts.stream(frozenset())
    assert [stream.push(0), stream.push(1), stream.finish()] == ["x", "y", ""]
    assert texts.token_text(1) == "y"


def test_tokens_without_text_do_not_hide_that_a_text_has_begun():
    spelled = {0: "x", 1: "", 2: " the"}
    texts = TokenTexts(
        decode=lambda ids: "".join(map(spelled.__getitem__, ids)).removeprefix(" "),
        token_bytes=lambda token_id: None,
        is_known=spelled.__contains__,
        is_bytes_only=False,
        can_split_characters=False,
        anchor=(0,),
    )
    assert texts.stream(frozenset(), after=[0, *[1] * 2 * HOLD_LIMIT]).push(2) == " the"
    assert texts.stream(frozenset(), after=[1, 1]).push(2) == "the"


def test_tokens_without_text_are_bounded():
    asked: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return "".join("" if token_id else "x" for token_id in ids)

    texts = TokenTexts(
        decode=decode,
        token_bytes=lambda token_id: None,
        is_known=lambda token_id: True,
        is_bytes_only=False,
        can_split_characters=False,
        anchor=(),
    )
    stream = texts.stream(frozenset())
    emitted = [stream.push(token_id) for token_id in [0, *[1] * 100, 0]]
    assert emitted == ["x", *[""] * 100, "x"]
    assert max(asked) <= HOLD_LIMIT + 1
