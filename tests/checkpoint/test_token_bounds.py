"""No text has fewer tokens than the bound says, whatever its tokenizer does to it first."""

import json
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from hanok.checkpoint.token_bounds import COMPOSITION, sentencepiece_bound
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer

SENTENCES = (
    "The well stands near the kitchen door.",
    "우물은 부엌 옆에 있다.",
    "e\u0301te\u0301  \u1fbe\u0308\u0301",
)
PIECES = (
    "<s>",
    "</s>",
    "<pad>",
    " ",
    "     ",
    "\n\t",
    "The well stands near the kitchen door.",
    "우물은",
    "e\u0301",
    "\u1fbe\u0308\u0301",
    "\u1fbe\u0344",
    "\u212a",
    "\u1100\u1161\u11a8",
    "\uff21\ufb01",
    "🙂",
    "\u2581",
    "\u0000\u0007",
    "\U0002f868",
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=30).map(
    "".join
) | st.tuples(st.sampled_from(PIECES), st.integers(1, 40)).map(lambda pair: pair[0] * pair[1])


def is_unassigned(character: str) -> bool:
    return unicodedata.category(character) == "Cn"


def trained(normalizer=None, cut=None, **bpe) -> tokenizers.Tokenizer:
    """A tokenizer of the library over SENTENCES; in bytes unless it falls back to them."""
    library = tokenizers.Tokenizer(models.BPE(**bpe))
    if normalizer is not None:
        library.normalizer = normalizer
    is_plain = bool(bpe)
    library.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.Fuse() if is_plain else decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    if bpe.get("byte_fallback"):
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=[] if is_plain else pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES * 3, trainer)
    return library


def saved(folder: Path, library: tokenizers.Tokenizer, **config: object) -> Tokenizer:
    library.save(str(folder / "tokenizer.json"))
    text = json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return open_tokenizer(folder)


def stripping(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    library.add_tokens([AddedToken("<pad>", lstrip=True, rstrip=True)])
    return library


LLAMA2 = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
WHOLE = pre_tokenizers.Split("\u0001", "isolated")
BOUNDED = {
    "bytes": lambda: trained(),
    "bytes, cut": lambda: trained(
        cut=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Split(" ", "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            ]
        )
    ),
    "NFC": lambda: trained(normalizers.NFC()),
    "NFKC": lambda: trained(normalizers.NFKC()),
    "NFKC, replaced": lambda: trained(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("stands", "is")])
    ),
    "spaces taken": lambda: stripping(trained()),
    "pieces": lambda: trained(LLAMA2, WHOLE, unk_token="<unk>", byte_fallback=True, fuse_unk=True),
    "pieces, unknown": lambda: trained(LLAMA2, WHOLE, unk_token="<unk>"),
}
UNBOUNDED = {
    "unknown joined": lambda: trained(LLAMA2, WHOLE, unk_token="<unk>", fuse_unk=True),
    "unknown dropped": lambda: trained(LLAMA2, WHOLE, unk_token=None),
    "spaces removed": lambda: trained(cut=pre_tokenizers.WhitespaceSplit(), unk_token="<unk>"),
    "cuts removed": lambda: trained(
        cut=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
        )
    ),
    "accents removed": lambda: trained(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "runs replaced": lambda: trained(normalizers.Replace(tokenizers.Regex(" +"), " ")),
    "suffix": lambda: trained(end_of_word_suffix="</w>", unk_token="<unk>"),
}


@pytest.fixture(scope="module")
def bounded(tmp_path_factory) -> dict[str, Tokenizer]:
    return {name: saved(tmp_path_factory.mktemp("t"), make()) for name, make in BOUNDED.items()}


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=80)
@given(text=TEXTS)
def test_no_encoding_falls_below(bounded, name, text):
    tokenizer = bounded[name]
    fewest = tokenizer.fewest_tokens(text)
    assert len(tokenizer.encode(text)) >= fewest
    assert len(tokenizer.encode(text, add_special_tokens=False)) >= fewest


def test_the_bound_is_reached(bounded):
    tokenizer = bounded["bytes"]
    longest = max(tokenizer._vocabulary.ids, key=len)
    text = bytes(tokenizer._vocabulary._alphabet[c] for c in longest).decode()
    assert len(text.encode()) > 5
    for count in (1, 3, 50):
        assert tokenizer.fewest_tokens(text * count) >= count
    # Only a normalizer or spaces that are taken weaken it.
    assert bounded["NFC"].fewest_tokens("a" * 10_000) > 10
    assert bounded["spaces taken"].fewest_tokens("a" * 10_000) > 100
    assert bounded["spaces taken"].fewest_tokens(" " * 10_000) == 0
    assert bounded["pieces"].fewest_tokens("우" * 10_000) > 100
    assert bounded["bytes"].fewest_tokens("") == 0


@pytest.mark.parametrize("name", UNBOUNDED)
def test_no_bound_where_text_may_vanish(tmp_path, name):
    assert saved(tmp_path, UNBOUNDED[name]()).fewest_tokens("a" * 10_000) == 0


def test_a_special_token_with_other_spellings_has_no_bound(tmp_path):
    library = trained(normalizers.NFKC())
    library.add_special_tokens([AddedToken("<b>", special=True, normalized=True)])
    tokenizer = saved(tmp_path, library, bos_token="<b>", add_bos_token=True)
    text = "\uff1cb\uff1e" * 500
    assert len(tokenizer.encode(text)) == 1
    assert tokenizer.fewest_tokens(text) == 0


def test_characters_that_are_composed(tmp_path):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: number for number, character in enumerate(sorted(alphabet))}
    library = tokenizers.Tokenizer(
        models.BPE({**vocabulary, "\u00ce\u0132": 256}, [("\u00ce", "\u0132")])
    )
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = saved(tmp_path, library)
    text = "\u1fbe\u0308\u0301" * 100
    assert len(tokenizer.encode(text)) == 100
    assert len(text.encode()) == 700
    assert 0 < tokenizer.fewest_tokens(text) <= 100
    # What is composed already stays as it is, but for characters of which nothing is known yet.
    composed = "\u0390우"
    assert tokenizer.fewest_tokens(composed * 100) == len((composed * 100).encode()) // len("</s>")
    unassigned = next(chr(code) for code in range(0x800, 0x10FFFF) if is_unassigned(chr(code)))
    assert 0 < tokenizer.fewest_tokens(composed * 100 + unassigned) < 100


def test_beginnings_that_become_one_are_not_counted(bounded, tmp_path):
    tokenizer = saved(tmp_path, trained(), add_bos_token=True)
    assert len(tokenizer.encode("<s>" * 500)) == 1
    assert tokenizer.fewest_tokens("<s>" * 500) <= 1


def test_composition_shrinks_no_more():
    """Over all characters: the most that a decomposition may have taken for what it becomes."""
    worst = 0.0
    for code in range(0x110000):
        character = chr(code)
        if 0xD800 <= code < 0xE000:
            continue
        decomposed = unicodedata.normalize("NFD", character)
        if unicodedata.normalize("NFC", decomposed) == character:
            worst = max(worst, 4 * len(decomposed) / len(character.encode()))
        assert unicodedata.normalize("NFKD", character)
    assert worst <= COMPOSITION


# tokenizer.model


def model(folder: Path, **options: object) -> Path:
    (folder / "text.txt").write_text("\n".join(SENTENCES * 8), encoding="utf-8")
    values = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **values,
    )
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Tokenizer:
    return open_tokenizer(model(tmp_path_factory.mktemp("model")))


@settings(max_examples=80)
@given(text=TEXTS)
def test_no_encoding_of_sentencepiece_falls_below(pieces, text):
    fewest = pieces.fewest_tokens(text)
    assert len(pieces.encode(text, add_special_tokens=False)) >= fewest
    assert len(pieces.encode(text)) >= fewest


def test_sentencepiece_counts(pieces, tmp_path):
    assert pieces.fewest_tokens("a" * 10_000) > 300
    token = {"340": {"content": "<|user|>", "rstrip": True}}
    folder = model(tmp_path)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": token}), encoding="utf-8"
    )
    taking = open_tokenizer(folder)
    assert len(taking.encode("<|user|>" + " " * 10_000)) == 2
    assert taking.fewest_tokens("<|user|>" + " " * 10_000) <= 2
    assert taking.fewest_tokens("a" * 10_000) > 300


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": False, "vocab_size": 60},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
    ],
)
def test_sentencepiece_without_bound(tmp_path, options):
    assert open_tokenizer(model(tmp_path, **options)).fewest_tokens("a" * 10_000) == 0


def test_a_model_that_does_not_say_removes_spaces():
    assert sentencepiece_bound(b"", ["a"], (), has_bytes=True) is None
    assert sentencepiece_bound(b"\x1a\x02\x20\x00", ["a"], (), has_bytes=True) is not None
