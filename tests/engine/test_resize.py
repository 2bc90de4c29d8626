"""More rows for a loaded model: what they begin as, what is refused, and that passes go on."""

from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hanok
from hanok.errors import OptionError, RequestError

VOCABULARY = 290
PROMPT = "the well is near the door"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("resize") / "model"
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    library.train_from_iterator(
        [PROMPT, "a courtyard opens to the south of the house"] * 3, trainer
    )
    PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).save_pretrained(path)
    return path


def rows(model: hanok.Model) -> torch.Tensor:
    return model.decoder.embed_tokens.weight


def test_a_piece_may_be_a_token_that_was_added_before(folder: Path) -> None:
    model = hanok.load(folder)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    tokenizer.add_tokens("<a>")
    tokenizer.add_tokens("<a>b")
    pieces = tokenizer.encode("<a>b<a>", add_special_tokens=False)
    assert pieces == [VOCABULARY + 1, VOCABULARY]
    model.resize_token_embeddings()
    b = tokenizer.encode("b", add_special_tokens=False)[0]
    expected = (rows(model)[VOCABULARY] + rows(model)[b]) / 2
    torch.testing.assert_close(rows(model)[VOCABULARY + 1], expected)


def test_a_refused_resize_leaves_what_rows_will_begin_as(folder: Path) -> None:
    models = [hanok.load(folder) for _ in range(2)]
    for model in models:
        assert model.tokenizer is not None
        model.tokenizer.add_tokens("<a>")
    with pytest.raises(OptionError, match="'nothing' is no token"):
        models[0].resize_token_embeddings(init="like=nothing")
    for model in models:
        model.resize_token_embeddings()
    assert torch.equal(rows(models[0]), rows(models[1]))
    mean = rows(models[0])[:VOCABULARY].mean(0)
    assert not torch.allclose(rows(models[0])[VOCABULARY], mean, atol=1e-3)


@pytest.mark.parametrize("asked", [-1, 3.5, "400", True])
def test_numbers_of_rows_that_cannot_be(folder: Path, asked: int) -> None:
    with pytest.raises(OptionError, match="must be a number of rows"):
        hanok.load(folder).resize_token_embeddings(asked)


def test_what_can_be_added(folder: Path) -> None:
    tokenizer = hanok.load(folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.add_tokens(tokenizers.AddedToken("<q>", rstrip=True, special=True)) == 1
    assert tokenizer.encode("<q>  b") == [VOCABULARY, *tokenizer.encode("b")]
    assert tokenizer.decode([VOCABULARY]) == ""
    for given in (None, 5, b"x", [5], {"additional_special_tokens": ["<x>"]}):
        with pytest.raises(OptionError, match="no tokens to add"):
            tokenizer.add_tokens(given)  # type: ignore[arg-type]
    assert tokenizer.vocab_size == VOCABULARY + 1


def test_an_engine_goes_on_with_more_rows(folder: Path) -> None:
    model = hanok.load(folder)
    assert model.tokenizer is not None
    with hanok.Engine(model) as engine:

        def text(prompt: str) -> str:
            ticket = engine.submit(prompt, max_new_tokens=8, temperature=0, min_new_tokens=8)
            return "".join(event.text for event in ticket)

        before = [text(PROMPT), text(PROMPT)]
        model.tokenizer.add_tokens("<a>")
        assert [text(PROMPT)] == before[:1]
        with pytest.raises(RequestError, match="resize_token_embeddings"):
            engine.submit("the <a> well", max_new_tokens=2)
        bias = {VOCABULARY: -100.0}
        model.resize_token_embeddings()
        ticket = engine.submit(PROMPT, max_new_tokens=8, temperature=0, logit_bias=bias)
        assert "".join(event.text for event in ticket) == before[0]
        assert list(engine.submit("the <a> well", max_new_tokens=2))
