"""vocab.json with merges.txt, read as transformers reads the same folder, or refused by name."""

import itertools
import json
import shutil
import string
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen3_5 import Qwen3_5Tokenizer

from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.errors import CheckpointError

SENTENCES = (
    "In 1999 and 2010, 12345 people didn't visit; they'd 300 wells!\r\n\r\n",
    "for beam in beams:\n    lift(beam)  # two spaces\n\n\treturn x == 10\n",
    "우물은 부엌 옆에 있다. été e\u0301te\u0301 ที่นี่ １２３ 😀",
)
TEXTS = (
    "",
    "12345 and 2010",
    "e\u0301te\u0301 été",
    "   three   spaces ",
    "a\r\nb\r\n\r\n c",
    "def f(x):\n\treturn x+1  # ok\n\n",
    "우물은 부엌 옆에 있다.",
    "👩‍👩‍👧 é <|endoftext|> x",
    "didn't I'LL they'Ve",
    "ที่นี่ १२३ ①²",
)
SPECIAL = (
    *("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"),
    *("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>", "<PAD>"),
)
LETTERS = "aA12 \n\r\t'sl.,!;()é\u0301우汉🙂\u00a0\u2028ที่-#="
ANY_TEXT = st.sampled_from(TEXTS) | st.text(st.sampled_from(LETTERS), max_size=30) | st.text()


def trained(folder: Path, *, keeps_words: bool, num_tokens: int = 700) -> None:
    """vocab.json and merges.txt; unless `keeps_words`, tokens cross every place where texts are cut."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=keeps_words)
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES, trainer)
    library.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    for text in SPECIAL:
        vocab[text] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    trained(folder, keeps_words=True)
    return folder


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    trained(folder, keeps_words=False)
    return folder


def said(source: Path, folder: Path, config: dict[str, object], model: dict[str, object]) -> Path:
    """A copy of a vocabulary in a folder that says so much of itself."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, folder)
    for name, value in (("tokenizer_config.json", config), ("config.json", model)):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


CASES = {
    "GPT2Tokenizer": ("words", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "GPT2TokenizerFast": ("words", {"tokenizer_class": "GPT2TokenizerFast"}, {}),
    "GPT2Tokenizer, space before": (
        "words",
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {},
    ),
    "CodeGenTokenizer": ("words", {"tokenizer_class": "CodeGenTokenizer"}, {}),
    "WhisperTokenizer": ("lines", {"tokenizer_class": "WhisperTokenizer"}, {}),
    "Qwen2Tokenizer": ("lines", {"tokenizer_class": "Qwen2Tokenizer"}, {}),
    "Qwen2TokenizerFast": ("words", {"tokenizer_class": "Qwen2TokenizerFast"}, {}),
    "GPTNeoXTokenizer": ("lines", {"tokenizer_class": "GPTNeoXTokenizer"}, {}),
    "GPTNeoXTokenizerFast": ("words", {"tokenizer_class": "GPTNeoXTokenizerFast"}, {}),
    "CohereTokenizerFast": ("lines", {"tokenizer_class": "CohereTokenizerFast"}, {}),
    "gpt2": ("words", {}, {"model_type": "gpt2"}),
    "gptj": ("words", {}, {"model_type": "gptj"}),
    "qwen2": ("lines", {}, {"model_type": "qwen2"}),
    "gpt_neox": ("lines", {}, {"model_type": "gpt_neox"}),
    "class of config.json": (
        "lines",
        {},
        {"model_type": "qwen2", "tokenizer_class": "Qwen2Tokenizer"},
    ),
    "class before model_type": (
        "lines",
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"model_type": "llama"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_as_transformers_reads_the_folder(request, tmp_path, case):
    source, config, model = CASES[case]
    folder = said(request.getfixturevalue(source), tmp_path, config, model)
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)

    @settings(max_examples=60)
    @given(text=ANY_TEXT)
    def compare(text: str) -> None:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )

    compare()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_token_id == theirs.eos_token_id
    # Whisper's reference calls tokens between which nobody decodes special as well.
    assert ours.special_token_ids <= {*theirs.all_special_ids, *theirs.added_tokens_decoder}


def test_the_cases_are_told_apart(words, lines, tmp_path_factory):
    """What is compared above differs from class to class."""

    def ids(source: Path, name: str) -> tuple[int, ...]:
        folder = said(source, tmp_path_factory.mktemp("f"), {"tokenizer_class": name}, {})
        tokenizer = open_tokenizer(folder)
        return tuple(i for text in TEXTS for i in tokenizer.encode(text, add_special_tokens=False))

    names = ("WhisperTokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer", "GPTNeoXTokenizer")
    assert len({ids(lines, name) for name in (*names, "CohereTokenizer")}) == 5
    assert ids(words, "GPT2Tokenizer") != ids(words, "Qwen2Tokenizer")


@pytest.mark.parametrize(
    ("named", "model_type"),
    [("Qwen3_5Tokenizer", None), ("Qwen2Tokenizer", "qwen3_5"), (None, "qwen3_5_moe")],
)
def test_qwen_3_5(lines, tmp_path, named, model_type):
    """Its marks belong to words, also where the folder says Qwen2's class."""
    folder = said(lines, tmp_path, {"tokenizer_class": named}, {"model_type": model_type})
    vocab, merges = models.BPE.read_file(str(lines / "vocab.json"), str(lines / "merges.txt"))
    theirs = Qwen3_5Tokenizer(vocab=vocab, merges=merges)
    ours = open_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("model_type", ["starcoder2", "gpt_bigcode", "granite"])
@pytest.mark.parametrize("named", [None, "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_code_models_cut_digits(words, tmp_path, model_type, named):
    """Published with GPT2Tokenizer as a name, and with this tokenizer.json."""
    folder = said(words, tmp_path, {"tokenizer_class": named}, {"model_type": model_type})
    vocab, merges = models.BPE.read_file(str(words / "vocab.json"), str(words / "merges.txt"))
    library = tokenizers.Tokenizer(models.BPE(vocab, merges))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    library.decoder = decoders.ByteLevel()
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>")
    ours = open_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("named", [None, "PreTrainedTokenizerFast"])
def test_falcon(lines, tmp_path, named):
    """Punctuation apart, then GPT-2's pattern, then numbers in threes, as its tokenizer.json says."""
    folder = said(lines, tmp_path, {"tokenizer_class": named}, {"model_type": "falcon"})
    vocab, merges = models.BPE.read_file(str(lines / "vocab.json"), str(lines / "merges.txt"))
    library = tokenizers.Tokenizer(models.BPE(vocab, merges))
    steps = [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated"},
    ]
    parts = json.loads(library.to_str())
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            step | {"invert": False} if "pattern" in step else step for step in steps
        ],
    }
    theirs = tokenizers.Tokenizer.from_str(json.dumps(parts))
    ours = open_tokenizer(folder)
    for text in TEXTS:
        if "<|endoftext|>" not in text:
            assert ours.encode(text) == theirs.encode(text).ids


def test_llama_3(lines, tmp_path):
    """Known by its first special token; a word that is a token is that token."""
    vocab, merges = models.BPE.read_file(str(lines / "vocab.json"), str(lines / "merges.txt"))
    # A word that no merges lead to.
    vocab["kitchen"] = len(vocab)
    size = len(vocab)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "added_tokens_decoder": {str(size): {"content": "<|begin_of_text|>", "special": True}},
    }
    folder = said(lines, tmp_path, config, {"model_type": "llama"})
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    numbers_of_three = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(numbers_of_three), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.add_special_tokens(["<|begin_of_text|>"])
    ours = open_tokenizer(folder)
    for text in ("kitchen", *TEXTS[:-3]):
        assert ours.encode(text) == [size, *library.encode(text).ids]
    assert ours.bos_token_id == size


@pytest.mark.parametrize(
    ("config", "model", "why"),
    [
        ({}, {}, "no file says its tokenizer_class, model_type is not given"),
        ({}, {"model_type": "llama"}, "no file says its tokenizer_class, model_type llama"),
        ({"tokenizer_class": "RobertaTokenizer"}, {}, "tokenizer_class is RobertaTokenizer"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {"model_type": "llama"}, "LlamaTokenizerFast"),
        ({"tokenizer_class": "ExaoneTokenizer"}, {"model_type": "gpt2"}, "ExaoneTokenizer"),
        (
            {"tokenizer_class": "PreTrainedTokenizerFast"},
            {"model_type": "llama"},
            "tokenizer_class is PreTrainedTokenizerFast, model_type llama",
        ),
    ],
)
def test_what_is_not_certain_is_refused(words, tmp_path, config, model, why):
    with pytest.raises(CheckpointError, match=rf"not certain: .*{why}.*tokenizer\.json"):
        open_tokenizer(said(words, tmp_path, config, model))


def test_gpt2_may_be_no_more_than_a_name(lines, tmp_path):
    folder = said(lines, tmp_path, {"tokenizer_class": "GPT2Tokenizer"}, {"model_type": "phi3"})
    assert isinstance(open_tokenizer(folder), Tokenizer)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    ends = {f"{letter};{'Ċ' * count}": 0 for letter in string.ascii_letters for count in (1, 2)}
    vocab |= {text: len(vocab) + place for place, text in enumerate(ends)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(CheckpointError, match="can never be made with the cuts of GPT-2"):
        open_tokenizer(folder)
    # Many words, and no number of two digits among them: digits were cut apart.
    words = ("".join(letters) for letters in itertools.product(string.ascii_letters, repeat=3))
    vocab = {word: place for place, word in enumerate(itertools.islice(words, 10_000))}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is a number of two digits, as GPT-2"):
        open_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps({**vocab, "10": 10_000}), encoding="utf-8")
    assert isinstance(open_tokenizer(folder), Tokenizer)


def test_a_tokenizer_json_decides_whatever_the_class(words, tmp_path):
    folder = said(words, tmp_path, {"tokenizer_class": "RobertaTokenizer"}, {})
    vocab, merges = models.BPE.read_file(str(words / "vocab.json"), str(words / "merges.txt"))
    library = tokenizers.Tokenizer(models.BPE(vocab, merges))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.save(str(folder / "tokenizer.json"))
    assert open_tokenizer(folder).encode("IN") == library.encode("in").ids
