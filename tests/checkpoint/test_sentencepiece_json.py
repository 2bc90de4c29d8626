"""A SentencePiece model as a tokenizer.json: the ids of its own library, by transformers' reader too."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hanok.checkpoint.sentencepiece_json import read_model, to_library

SENTENCES = (
    "A courtyard opens to the south, and the well is near the kitchen door.",
    "마당은 남쪽으로 열려 있고 우물은 부엌 옆에 있다.",
    "for beam in beams:\n    lift(beam)  # two spaces",
)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def proto(request: pytest.FixtureRequest) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        model_type=request.param,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@settings(max_examples=150)
@given(
    text=st.text(st.sampled_from(list("  \u2581\n\tathewl마당🙂")) | st.characters(codec="utf-8"))
)
@pytest.mark.parametrize("is_legacy", [True, False])
def test_every_text_has_the_ids_of_the_model(proto: bytes, is_legacy: bool, text: str) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    library = to_library(read_model(proto), [], is_legacy=is_legacy, frame=(None, None))
    assert library.encode(text, add_special_tokens=False).ids == model.encode(text)


def test_transformers_reads_the_file(proto: bytes, tmp_path: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for is_legacy in (True, False):
        library = to_library(read_model(proto), [], is_legacy=is_legacy, frame=(None, None))
        library.save(str(tmp_path / "tokenizer.json"))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        for text in (" the well", "  the", "the", " ", "\u2581the", ""):
            assert theirs.encode(text, add_special_tokens=False) == model.encode(text)
