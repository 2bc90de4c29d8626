"""Ids and names from the files of a folder, beside the libraries that own the formats."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from hanok.checkpoint.tokenizer import Tokenizer, open_tokenizer
from hanok.errors import CheckpointError, RequestError

SENTENCES = (
    "A courtyard opens to the south, and the well is near the kitchen door.",
    "마당은 남쪽으로 열려 있고 우물은 부엌 옆에 있다.",
    "for beam in beams:\n    lift(beam)  # two spaces",
)
TEXTS = (
    "",
    " ",
    "the well",
    "  two  spaces ",
    "우물 옆\n\n마당 🙂",
    "<s>the<s> well</s>",
    "a</s> b <unk>",
    "<|call|> x <|call|>",
)


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def byte_level(folder: Path, *, adds: str = "") -> tokenizers.Tokenizer:
    """tokenizer.json of a tiny byte-level BPE; `adds` names what its post-processor adds."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES, trainer)
    single = {"": "$A", "bos": "<s> $A", "bos eos": "<s> $A </s>"}[adds]
    library.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.save(str(folder / "tokenizer.json"))
    return library


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("\n".join(SENTENCES * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|call|>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def sentencepiece_folder(folder: Path, model_file: Path, **config: object) -> Path:
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    write(folder, "tokenizer_config.json", config)
    return folder


# tokenizer.json


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
@pytest.mark.parametrize("special", [True, False])
def test_ids_of_the_library(tmp_path, adds, special):
    byte_level(tmp_path, adds=adds)
    write(tmp_path, "tokenizer_config.json", NAMES)
    ours = open_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        if text.startswith("<s>") and adds and special:
            continue
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    assert ours.vocab_size == len(theirs) == 330
    named = (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id)
    assert named == (1, 2, 0, None)
    assert ours.special_token_ids == set(theirs.all_special_ids)


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
@pytest.mark.parametrize("adds_bos", [None, True, False])
@pytest.mark.parametrize("adds_eos", [None, True, False])
@pytest.mark.parametrize("text", ["well", "<s>well", "<s><s>well</s>", ""])
def test_beginning_and_end_come_once(tmp_path, adds, adds_bos, adds_eos, text):
    byte_level(tmp_path, adds=adds)
    flags = {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
    write(tmp_path, "tokenizer_config.json", {**NAMES, **flags})
    tokenizer = open_tokenizer(tmp_path)
    ids = tokenizer.encode(text)
    wants_bos = "bos" in adds if adds_bos is None else adds_bos
    wants_eos = "eos" in adds if adds_eos is None else adds_eos
    inner = tokenizer.encode(text, add_special_tokens=False)
    if wants_bos:
        assert ids[0] == 1
        assert 1 not in ids[1:]
    else:
        assert ids[: len(inner)] == inner
    if wants_eos:
        assert ids[-1] == 2
    else:
        assert ids.count(2) == inner.count(2)


@pytest.mark.parametrize("adds_bos", [None, True, False])
def test_flags_of_two_tokens_leave_others_in_place(tmp_path, adds_bos):
    """A post-processor that puts more than the two around a text, as GLM-4's and Whisper's do."""
    library = byte_level(tmp_path)
    library.add_special_tokens(["[gMASK]", "<sop>"])
    ids = (library.token_to_id("[gMASK]"), library.token_to_id("<sop>"))
    library.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A </s>",
        special_tokens=[("[gMASK]", ids[0]), ("<sop>", ids[1]), ("</s>", 2)],
    )
    library.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {**NAMES, "add_bos_token": adds_bos})
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode("well") == library.encode("well").ids
    assert tokenizer.encode("well")[:2] == list(ids)


@pytest.mark.parametrize("text", ["well", "", "Instruct: find\nQuery: the roof", "well<|end|>"])
def test_an_embedders_end_token_is_added_as_transformers_adds_it(tmp_path, text):
    """As Qwen3-Embedding has it: not the token that ends an answer, and no flag says so."""
    library = byte_level(tmp_path)
    library.add_special_tokens(["<|end|>"])
    end = library.token_to_id("<|end|>")
    library.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="$A <|end|>",
                pair="$A <|end|> $B:1 <|end|>:1",
                special_tokens=[("<|end|>", end)],
            ),
        ]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<|end|>", "add_bos_token": False}
    write(
        tmp_path, "tokenizer_config.json", {**names, "tokenizer_class": "PreTrainedTokenizerFast"}
    )
    ids = open_tokenizer(tmp_path).encode(text)
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert ids[-1] == end


@pytest.mark.parametrize("adds", ["bos", "bos eos"])
def test_an_embedders_flag_adds_the_end_token_once(tmp_path, adds):
    """As e5-mistral has it: the flag, with the end token in tokenizer.json or without."""
    byte_level(tmp_path, adds=adds)
    flags = {"add_bos_token": True, "add_eos_token": True}
    write(tmp_path, "tokenizer_config.json", {**NAMES, **flags})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("well", "", "Instruct: find\nQuery: the roof"):
        inner = theirs.encode(text, add_special_tokens=False)
        ids = open_tokenizer(tmp_path).encode(text)
        assert ids == [1, *inner, 2]
        if "eos" in adds:
            assert ids == theirs.encode(text)
        # Clients that append it themselves, as the first such models asked them to, get no second one.
        assert open_tokenizer(tmp_path).encode(text + "</s>") == ids


def test_names_may_stand_in_either_file_and_new_ones_are_added(tmp_path):
    library = byte_level(tmp_path)
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "eos_token": "</s>",
            "pad_token": None,
            "extra_special_tokens": {"picture_token": "<picture>"},
            "added_tokens_decoder": {
                "330": {"content": "<|call|>", "special": True},
                "331": {"content": "beamlift", "special": False, "single_word": True},
            },
        },
    )
    write(
        tmp_path,
        "special_tokens_map.json",
        {
            "bos_token": {"content": "<s>"},
            "eos_token": "<unk>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<|call|>", {"content": "<|more|>"}],
        },
    )
    tokenizer = open_tokenizer(tmp_path)
    assert library.get_vocab_size() == 330
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.token_to_id("<|call|>") == 330
    assert tokenizer.encode("a <|call|>", add_special_tokens=False)[-1] == 330
    assert 331 in tokenizer.encode("a beamlift", add_special_tokens=False)
    assert 331 not in tokenizer.encode("beamlifts", add_special_tokens=False)
    added = {tokenizer.token_to_id(text) for text in ("<pad>", "<picture>", "<|more|>")}
    assert added == {332, 333, 334}
    assert tokenizer.special_token_ids == {0, 1, 2, 330, *added}
    assert tokenizer.vocab_size == 335
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.render_chat([{"role": "user"}], template="{{ picture_token }}") == "<picture>"
    assert tokenizer.render_chat(
        [{"role": "user"}], template="{{ additional_special_tokens|join }}"
    ) == ("<|call|><|more|>")


def test_token_text(tmp_path):
    byte_level(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("the well 🙂")]
    assert "".join(texts).startswith("the well ")
    assert "\ufffd" in texts[-1]
    assert tokenizer.token_text(1) == "<s>"
    with pytest.raises(RequestError, match=r"no token 330: ids go from 0 to 329"):
        tokenizer.token_text(330)


ADDED_WORDS = ("naïve", "đem", "čaj", "Ġthe", "é", "ß!", "마당", "<x>", "  ")


@pytest.fixture(scope="module", params=["bytes alone", "bytes and more"])
def with_added_words(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("added")
    library = byte_level(folder)
    library.add_tokens(list(ADDED_WORDS))
    if request.param == "bytes and more":
        library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    library.save(str(folder / "tokenizer.json"))
    return open_tokenizer(folder)


@given(
    words=st.lists(
        st.sampled_from(
            ["naïve", "đem", "čaj", "ß!", "마당", "<x>", "  ", " the", "e", "\r", "\x11em"]
        )
    )
)
def test_added_tokens_keep_their_letters(with_added_words, words):
    """Each of their letters may be what a byte is spelled with elsewhere."""
    tokenizer = with_added_words
    text = "".join(words)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if tokenizer._vocabulary.texts.is_bytes_only:
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_what_the_model_makes_of_bytes_stays_bytes(with_added_words):
    """Also where it is listed as added: ` the`, and the byte of é, come from other texts too."""
    tokenizer = with_added_words
    assert tokenizer.token_text(tokenizer.token_to_id("Ġthe")) == " the"
    assert tokenizer.decode(tokenizer.encode("in the")) == "in the"
    assert tokenizer.token_text(tokenizer.token_to_id("é")) == "\ufffd"
    for word in ("naïve", "đem", "čaj", "ß!", "마당"):
        assert tokenizer.token_text(tokenizer.token_to_id(word)) == word


def test_half_a_surrogate_pair_is_refused(tmp_path, model_file):
    byte_level(tmp_path)
    with pytest.raises(RequestError, match="character 2 of the text"):
        open_tokenizer(tmp_path).encode("ab\ud800")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match="character 2 of the text"):
        open_tokenizer(sentencepiece_folder(tmp_path, model_file)).encode("ab\ud800")


def test_other_threads_run_while_a_text_is_encoded(tmp_path, model_file):
    """A thread that waits to run does so during the encoding: nothing else hands it the lock."""

    def runs_beside(encode: Callable[[str], object]) -> bool:
        wanted, ran = threading.Event(), threading.Event()

        def run() -> None:
            wanted.wait()
            ran.set()

        thread = threading.Thread(target=run)
        thread.start()
        wanted.set()
        encode(SENTENCES[0] * 2000)
        found = ran.is_set()
        thread.join()
        return found

    byte_level(tmp_path)
    ours = open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    pieces = open_tokenizer(sentencepiece_folder(tmp_path, model_file))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        assert not runs_beside(lambda text: sum(map(ord, text)))
        for encode in (ours.encode, pieces.encode):
            assert any(runs_beside(encode) for _ in range(50))
    finally:
        sys.setswitchinterval(interval)


# vocab.json and merges.txt


def test_vocab_and_merges(tmp_path):
    library = byte_level(tmp_path)
    library.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path, "config.json", {"model_type": "gpt2"})
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert open_tokenizer(tmp_path).bos_token_id is None
    write(tmp_path, "vocab.json", {**vocab, "<|endoftext|>": 330})
    ours = open_tokenizer(tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "a<|endoftext|>b"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), True)
    assert ours.bos_token_id == ours.eos_token_id == 330
    assert [path.name for path in ours.files] == ["vocab.json", "merges.txt"]


# tokenizer.model


@pytest.mark.parametrize("legacy", [None, True, False])
@settings(max_examples=60)
@given(
    text=st.sampled_from(TEXTS)
    | st.lists(
        st.sampled_from(["<s>", "</s>", " ", "the", "우물", "<|call|>", "🙂", "\n"]), max_size=8
    ).map("".join)
)
def test_sentencepiece_ids(tmp_path_factory, model_file, legacy, text):
    folder = tmp_path_factory.mktemp("folder")
    sentencepiece_folder(folder, model_file, legacy=legacy)
    ours = open_tokenizer(folder)
    ids = ours.encode(text, add_special_tokens=False)
    if legacy is not False:
        theirs = SentencePieceBackend(
            vocab_file=str(model_file),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<|call|>"],
        )
        assert ids == [theirs.convert_tokens_to_ids(piece) for piece in theirs.tokenize(text)]
    assert ours.decode(ids, skip_special_tokens=False).replace(" ", "") == text.replace(" ", "")
    again = text.replace("<s>", "")
    assert ours.encode(text)[:1] == [ours.bos_token_id]
    assert ours.encode("<s>" + again).count(1) == 1


def test_sentencepiece_space_before_text_after_a_special_token(tmp_path, model_file):
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    with_space, call = model.encode("the"), model.piece_to_id("<|call|>")
    legacy = open_tokenizer(sentencepiece_folder(tmp_path, model_file))
    text = "the<|call|>the"
    assert legacy.encode(text, add_special_tokens=False) == [*with_space, call, *with_space]
    newer = open_tokenizer(sentencepiece_folder(tmp_path, model_file, legacy=False))
    ids = newer.encode(text, add_special_tokens=False)
    assert ids[: len(with_space) + 1] == [*with_space, call]
    assert newer.decode(ids, skip_special_tokens=False) == "the<|call|>the"
    assert ids != legacy.encode(text, add_special_tokens=False)
    never = open_tokenizer(sentencepiece_folder(tmp_path, model_file, add_prefix_space=False))
    assert never.encode(text, add_special_tokens=False)[0] != with_space[0]
    assert never.decode(never.encode(" the")) == " the"
    # Without special tokens the text is the model's own affair.
    for each in (legacy, newer):
        assert each.encode(SENTENCES[1])[1:] == model.encode(SENTENCES[1])


def test_sentencepiece_added_tokens(tmp_path, model_file):
    decoder = {
        "340": {"content": "<|user|>", "special": True, "rstrip": True},
        "341": {"content": "<|user|>!", "special": False, "lstrip": True},
        "342": {"content": "roof", "special": False, "single_word": True},
    }
    folder = sentencepiece_folder(
        tmp_path, model_file, added_tokens_decoder=decoder, mask_token="<mask>", add_eos_token=True
    )
    write(folder, "added_tokens.json", {"[PAD]": 343})
    write(folder, "special_tokens_map.json", {"pad_token": "[PAD]"})
    tokenizer = open_tokenizer(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert tokenizer.encode("a<|user|> \n b") == [1, *model.encode("a"), 340, *model.encode("b"), 2]
    assert tokenizer.encode("a  <|user|>!")[1:-1] == [*model.encode("a"), 341]
    assert 342 in tokenizer.encode("a roof.")
    assert 342 not in tokenizer.encode("a roofs")
    assert tokenizer.pad_token_id == 343
    assert tokenizer.token_to_id("<mask>") == 344
    assert tokenizer.vocab_size == 345
    assert tokenizer.special_token_ids == {0, 1, 2, 3, 340, 343, 344}
    assert tokenizer.decode([340, 341, 342]) == "<|user|>!roof"
    byte, piece = tokenizer.token_to_id("<0xEA>"), model.encode("the")[0]
    assert tokenizer.token_text(byte) == "\ufffd"
    assert tokenizer.token_text(piece) == model.id_to_piece(piece).replace("\u2581", " ")


@pytest.mark.parametrize(
    "named", ["ChatGLMTokenizer", "BaichuanTokenizer", "InternLM2Tokenizer", "T5TokenizerFast"]
)
def test_sentencepiece_under_rules_of_its_own_is_refused(tmp_path, model_file, named):
    folder = sentencepiece_folder(tmp_path, model_file, tokenizer_class=named)
    with pytest.raises(CheckpointError, match=rf"read by {named}.*tokenizer\.json.*LlamaTokenizer"):
        open_tokenizer(folder)
    write(folder, "tokenizer_config.json", {})
    write(folder, "config.json", {"tokenizer_class": named})
    with pytest.raises(CheckpointError, match=f"read by {named}"):
        open_tokenizer(folder)


@pytest.mark.parametrize(
    "named",
    [
        *(None, "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizerFast"),
        *("PreTrainedTokenizerFast", "TokenizersBackend", "MistralCommonBackend"),
    ],
)
def test_sentencepiece_alone(tmp_path, model_file, named):
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = open_tokenizer(sentencepiece_folder(tmp_path, model_file, tokenizer_class=named))
    assert tokenizer.encode(SENTENCES[1], add_special_tokens=False) == model.encode(SENTENCES[1])


# Files


def test_files_are_those_that_exist(tmp_path):
    byte_level(tmp_path)
    write(tmp_path, "tokenizer_config.json", {})
    write(tmp_path, "config.json", {})
    (tmp_path / "chat_template.jinja").write_text("x", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("y", encoding="utf-8")
    names = [str(path.relative_to(tmp_path)) for path in open_tokenizer(tmp_path).files]
    assert names == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ]


def test_a_folder_without_tokenizer_says_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a folder; looked in it for tokenizer\.json"):
        open_tokenizer(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.model.*tekken\.json.*there is nothing\. Copy"
    ):
        open_tokenizer(tmp_path)
    for number in range(22):
        write(tmp_path, f"part{number:02}.json", {})
    with pytest.raises(CheckpointError, match=r"part00\.json, .* and 2 more"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "cannot be read by tokenizers"),
        ("tokenizer_config.json", b"{,}", "is not valid JSON"),
        ("tokenizer_config.json", b"[1]", "holds list, not an object"),
        ("tokenizer_config.json", b"\xff\xfe", "is not UTF-8 text"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder is"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": "y"}}',
            r"decoder\['x'\] is 'y'",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"900": "<new>"}}',
            "is 900 in tokenizer_config.json.*would give it 330",
        ),
        ("added_tokens.json", b'{"<new>": "1"}', "'<new>' is '1'"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is 3"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "chat_template is"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    byte_level(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"],
)
def test_pointers_of_git_lfs_are_no_tokenizer_and_no_template(tmp_path, name):
    byte_level(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        open_tokenizer(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    byte_level(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = path.read_bytes() if path.exists() else b"{}"
    path.write_bytes(b"\xef\xbb\xbf" + settings)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    found = open_tokenizer(tmp_path)
    assert found.render_chat([{"role": "user", "content": "a"}]) == "a"


def test_damaged_models(tmp_path):
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    write(tmp_path, "config.json", {"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read as byte-level BPE"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="cannot be read as a SentencePiece model"):
        open_tokenizer(tmp_path)


def test_nothing_heavy_is_imported():
    heavy = "'torch', 'numpy', 'transformers', 'sentencepiece'"
    code = (
        f"import sys, hanok.checkpoint.tokenizer; print([m for m in [{heavy}] if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Where tokens lie


def covered(tokenizer: Tokenizer, text: str) -> None:
    """Ids are those of `encode`; places are in order, and outside spaces they cover the text."""
    (found,) = tokenizer.encode_rendered([text])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert found.ids == ids or ids[:2] == [tokenizer.bos_token_id] * 2
    assert len(found.spans) == len(found.ids)
    assert found.spans == sorted(found.spans)
    seen = {place for start, end in found.spans for place in range(start, end)}
    bos = "<s>" * (len(ids) - len(found.ids))
    missing = [text[place] for place in range(len(bos), len(text)) if place not in seen]
    assert not "".join(missing).strip()
    for token_id, (start, end) in zip(found.ids, found.spans, strict=True):
        piece = tokenizer.token_text(token_id)
        # A part of a character lies at the whole of it.
        assert piece.strip() in text[start:end] or "\ufffd" in piece


@pytest.mark.parametrize("trims", [True, False])
def test_places_of_the_library(tmp_path, trims):
    library = byte_level(tmp_path)
    library.post_processor = processors.ByteLevel(trim_offsets=trims)
    library.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", NAMES)
    tokenizer = open_tokenizer(tmp_path)
    for text in (*TEXTS, *SENTENCES, "\n\n two  </s>\n"):
        covered(tokenizer, text)
    (found,) = tokenizer.encode_rendered(["a  b"])
    assert {place for start, end in found.spans for place in range(start, end)} == {0, 1, 2, 3}


def test_places_of_sentencepiece(tmp_path, model_file):
    ours = open_tokenizer(sentencepiece_folder(tmp_path, model_file, legacy=False))
    for text in (*TEXTS, *SENTENCES, "마당🙂</s>🙂 x"):
        covered(ours, text)
    (found,) = ours.encode_rendered(["a🙂"])
    assert found.spans[-4:] == [(1, 2)] * 4


def test_a_repeated_bos_at_the_front_has_one_place(tmp_path):
    byte_level(tmp_path)
    write(tmp_path, "tokenizer_config.json", NAMES)
    tokenizer = open_tokenizer(tmp_path)
    one, three = tokenizer.encode_rendered(["<s>well", "<s><s><s>well"])
    assert one.ids == three.ids
    assert one.spans[0] == (0, 3)
    assert three.spans[0] == (6, 9)
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        tokenizer.encode_rendered(["well", "\ud800"])
