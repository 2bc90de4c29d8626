"""Files of ranks, against the rule by which their own libraries merge: the lowest rank first."""

import base64
import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from hanok.checkpoint.byte_level import byte_alphabet
from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.errors import CheckpointError

SENTENCES = (
    "In 1999 and 2010, 12345 people didn't visit; they'd 300 wells!\r\n\r\n",
    "abababab aaaa aaaaaaa abaab baab abbaab",
    "for beam in beams:\n    lift(beam)  # two spaces\n\n\treturn x == 10\n",
    "우물은 부엌 옆에 있다. été ที่นี่ １２３ 😀",
)
NUMBERS_OF_THREE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = NUMBERS_OF_THREE.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = st.text(st.sampled_from("ab"), max_size=40) | st.lists(
    st.sampled_from([*SENTENCES, "12345", "  ", "\r\n", "é", "우물", "didn'T", "a\tb", "XyZ"])
    | st.text(max_size=4),
    max_size=8,
).map(lambda parts: "".join(parts).translate(dict.fromkeys(map(ord, "<["), "|")))
"""Without what special tokens begin with."""


def make_ranks() -> dict[bytes, int]:
    """Tokens by rank, those of BPE trained on SENTENCES; lines whole, so that tokens cross cuts."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES, trainer)
    alphabet = byte_alphabet()
    by_id = sorted(library.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(alphabet[character] for character in text) for text, _ in by_id]
    # One that nothing merges to, which is a token only where it is a whole stretch.
    return {token: rank for rank, token in enumerate([*tokens, b" whole"])}


RANKS = make_ranks()


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The ids of one stretch: of neighbours that make a token, the first of the lowest rank merges."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [
            (ranks[left + right], place)
            for place, (left, right) in enumerate(pairwise(parts))
            if left + right in ranks
        ]
        if not pairs:
            return [ranks[part] for part in parts]
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def expected(text: str, pattern: str, ranks: dict[bytes, int]) -> list[int]:
    stretches = regex.findall(pattern, text)
    assert "".join(stretches) == text
    return [token for stretch in stretches for token in merged(stretch.encode(), ranks)]


def write_ranks(path: Path, ranks: dict[bytes, int] = RANKS) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path.write_text("".join(lines), encoding="utf-8")
    return path.parent


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


# tiktoken


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Tokenizer:
    return open_tokenizer(write_ranks(tmp_path_factory.mktemp("qwen") / "qwen.tiktoken"))


GLM4_SPECIAL = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|user|>")


@pytest.fixture(scope="module")
def glm4(tmp_path_factory) -> Tokenizer:
    folder = write_ranks(tmp_path_factory.mktemp("glm") / "tokenizer.model")
    entries = {
        str(len(RANKS) + place): {"content": text, "special": True}
        for place, text in enumerate(GLM4_SPECIAL)
    }
    config = {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": entries}
    write(folder, "tokenizer_config.json", config)
    return open_tokenizer(folder)


@settings(max_examples=150)
@given(text=TEXTS)
def test_ids_of_tiktoken(qwen, glm4, text):
    composed = unicodedata.normalize("NFC", text)
    assert qwen.encode(text) == expected(composed, DIGITS, RANKS)
    assert qwen.decode(qwen.encode(text)) == composed
    ids = glm4.encode(text, add_special_tokens=False)
    assert ids == expected(text, NUMBERS_OF_THREE, RANKS)
    assert glm4.decode(ids) == text


def test_qwen(qwen):
    size = len(RANKS)
    assert qwen.encode("a<|im_start|>b") == [RANKS[b"a"], size + 1, RANKS[b"b"]]
    assert qwen.encode("e\u0301") == qwen.encode("é")
    assert qwen.encode(" whole") == [RANKS[b" whole"]]
    assert qwen.eos_token_id == size
    assert qwen.token_to_id("<|extra_204|>") == size + 207
    assert qwen.vocab_size == size + 208
    assert qwen.special_token_ids == set(range(size, size + 208))
    assert qwen.decode([RANKS[b"a"], size + 2]) == "a"
    assert [path.name for path in qwen.files] == ["qwen.tiktoken"]
    assert qwen.token_bytes(RANKS[b"\xec"]) == b"\xec"


def test_glm4_begins_with_two_tokens(glm4):
    size = len(RANKS)
    assert glm4.encode("a") == [size + 2, size + 4, RANKS[b"a"]]
    assert glm4.encode("<|user|>", add_special_tokens=False) == [size + 6]
    assert glm4.eos_token_id == size


def test_llama_3_as_meta_published_it(tmp_path):
    """Nothing but a tokenizer.model of 128,000 ranks."""
    ranks = dict(RANKS)
    for number in range(128_000 - len(ranks)):
        ranks[b"\xff" + number.to_bytes(3, "big")] = len(ranks)
    tokenizer = open_tokenizer(write_ranks(tmp_path / "tokenizer.model", ranks))
    for text in SENTENCES:
        assert tokenizer.encode(text) == [128_000, *expected(text, NUMBERS_OF_THREE, RANKS)]
    assert tokenizer.encode("a<|eot_id|>", add_special_tokens=False)[-1] == 128_009
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (128_000, 128_001)


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("tokenizer.model", {}, "no file says its tokenizer_class"),
        ("tokenizer.model", {"tokenizer_class": "ChatGLMTokenizer"}, "is ChatGLMTokenizer"),
        ("tiktoken.model", {"tokenizer_class": "TikTokenTokenizer"}, "is TikTokenTokenizer"),
        (
            "other.tiktoken",
            {"tokenizer_class": "GPT2Tokenizer"},
            "tiktoken file, and of GPT-2 none",
        ),
    ],
)
def test_other_files_of_ranks_are_refused(tmp_path, name, config, why):
    folder = write_ranks(tmp_path / name)
    write(folder, "tokenizer_config.json", config)
    with pytest.raises(CheckpointError, match=rf"{name}.*{why}.*tokenizer\.json"):
        open_tokenizer(folder)


def test_damaged_ranks(tmp_path):
    path = tmp_path / "qwen.tiktoken"
    for content, message in (
        ("IQ== 0\n?? 1\n", r"line 2 is b'\?\? 1\\n'"),
        ("IQ== 0\nIg==\n", "line 2 is"),
        ("IQ== 0\n", "no token for the byte 0"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            open_tokenizer(tmp_path)
    write_ranks(path)
    for added in ({"<|im_end|>": 7}, {"<new>": 7}, {"a": len(RANKS) + 300}):
        write(tmp_path, "added_tokens.json", added)
        with pytest.raises(CheckpointError, match="files of different models"):
            open_tokenizer(tmp_path)
    write(tmp_path, "added_tokens.json", {"<|im_end|>": len(RANKS) + 2, "<new>": len(RANKS) + 300})
    assert open_tokenizer(tmp_path).encode("<new>") == [len(RANKS) + 300]


# tekken.json


def tekken(num_special: int = 30, **changes: object) -> dict[str, object]:
    """As Mistral writes it; the last ranks are more than the model has rows for."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in RANKS.items()
    ]
    beyond = {"rank": len(vocab), "token_bytes": base64.b64encode(b"they'd 300").decode()}
    config = {
        "pattern": TEKKEN,
        "num_vocab_tokens": len(vocab) + 1,
        "default_vocab_size": len(vocab) + num_special,
        "default_num_special_tokens": num_special,
        "version": "v3",
    }
    return {"config": config, "vocab": [*vocab, beyond], **changes}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tekken")
    write(folder, "tekken.json", tekken())
    return open_tokenizer(folder)


@settings(max_examples=150)
@given(text=TEXTS)
def test_ids_of_tekken(mistral, text):
    ids = [token + 30 for token in expected(text, TEKKEN, RANKS)]
    assert mistral.encode(text) == [1, *ids]
    assert mistral.decode(ids) == text


def test_special_tokens_of_tekken(mistral, tmp_path):
    assert (mistral.bos_token_id, mistral.eos_token_id) == (1, 2)
    assert (mistral.unk_token_id, mistral.pad_token_id) == (0, 11)
    assert mistral.encode("[INST]a[/INST]") == [1, 3, RANKS[b"a"] + 30, 4]
    assert mistral.token_to_id("<SPECIAL_29>") == 29
    assert mistral.special_token_ids == set(range(30))
    assert mistral.vocab_size == len(RANKS) + 30
    assert mistral.decode([3, RANKS[b"a"] + 30], skip_special_tokens=False) == "[INST]a"
    assert [path.name for path in mistral.files] == ["tekken.json"]
    listed = [
        {"rank": rank, "token_str": text, "is_control": True}
        for rank, text in enumerate(["<unk>", "<s>", "</s>", "[THINK]"])
    ]
    write(tmp_path, "tekken.json", tekken(special_tokens=listed))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.token_to_id("[THINK]") == 3
    assert tokenizer.token_to_id("<SPECIAL_4>") == 4
    assert tokenizer.token_to_id("[INST]") is None
    assert tokenizer.pad_token_id is None


def test_a_token_with_the_text_of_a_special_token(tmp_path):
    """The text is the special token, and both ids have their text."""
    content = tekken(num_special=4)
    number = len(content["vocab"]) - 2
    content["vocab"][number]["token_bytes"] = base64.b64encode(b"<s>").decode()
    write(tmp_path, "tekken.json", content)
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode("a<s>b") == [1, RANKS[b"a"] + 4, 1, RANKS[b"b"] + 4]
    assert tokenizer.token_bytes(number + 4) == b"<s>"
    assert tokenizer.decode([number + 4, 1]) == "<s>"
    assert tokenizer.decode([number + 4, 1], skip_special_tokens=False) == "<s><s>"
    assert tokenizer.special_token_ids == {0, 1, 2, 3}


def test_a_tekken_file_of_nested_brackets_is_refused(tmp_path):
    (tmp_path / "tekken.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match="not as Mistral writes"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "not as Mistral writes"),
        ([], "not as Mistral writes"),
        (tekken(vocab=[{"rank": 0}]), "not as Mistral writes"),
        (tekken(config={**tekken()["config"], "pattern": "("}), "not as Mistral writes.*pattern"),
        (tekken(vocab=[]), f"has 0 different tokens of the {len(RANKS)}"),
    ],
)
def test_damaged_tekken(tmp_path, content, message):
    write(tmp_path, "tekken.json", content)
    with pytest.raises(CheckpointError, match=message):
        open_tokenizer(tmp_path)
