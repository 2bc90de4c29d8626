"""The public model: prompts in every form, scores, saving, and errors that say what to do."""

import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models

import hanok
from hanok.engine import model as model_module
from hanok.engine.generate import PrefixCache
from hanok.engine.model import Model
from hanok.errors import OptionError

TALK = [{"role": "user", "content": "Tell me a story about Lily."}]


@pytest.fixture(scope="module")
def model() -> Model:
    return hanok.load(hanok.BUNDLED, dtype="float32")


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(hanok.BUNDLED, dtype=torch.float32)


def test_prompts_may_be_text_ids_or_messages(model: Model) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("The dog")
    as_text, as_ids = (model.generate(p, max_new_tokens=6) for p in ("The dog", ids))
    assert as_text == as_ids
    rendered = "<s><|user|>\nTell me a story about Lily.\n<|assistant|>\n"
    assert model.encode(TALK) == model.tokenizer.encode(rendered, add_special_tokens=False)
    assert model.encode(TALK).count(model.tokenizer.bos_token_id) == 1  # type: ignore[arg-type]
    several = model.generate([TALK, TALK], max_new_tokens=4)
    assert [out.token_ids for out in several] == [
        model.generate(TALK, max_new_tokens=4).token_ids
    ] * 2
    assert len(model.generate([ids, ids[:2]], max_new_tokens=2)) == 2
    assert len(model.generate(["The dog"], max_new_tokens=2)) == 1


def test_the_stream_is_the_generation(model: Model) -> None:
    out = model.generate("The dog", max_new_tokens=12, top_logprobs=1)
    events = list(model.stream("The dog", max_new_tokens=12, top_logprobs=1))
    assert [event.token_id for event in events] == out.token_ids
    assert "".join(event.text for event in events) == out.text
    assert [event.logprob for event in events] == out.logprobs
    assert [event.top_logprobs for event in events] == out.top_logprobs
    assert [event.finish_reason for event in events] == [None] * 11 + [out.finish_reason]


def test_logits_are_transformers(model: Model, oracle: transformers.PreTrainedModel) -> None:
    ids = model.encode("One day, Lily saw a cat.")
    found = model.logits(ids)
    assert found.dtype is torch.float32
    assert found.shape == (len(ids), model.config.vocab_size)
    with torch.inference_mode():
        torch.testing.assert_close(found, oracle(torch.tensor([ids])).logits[0], atol=1e-4, rtol=0)


def test_bfloat16_logits_are_as_near_to_float32_as_transformers(model: Model) -> None:
    """Rounding differs, its size must not: both bfloat16 models are compared with float32."""
    ids = model.encode("One day, Lily saw a cat in the park. It was big and")
    exact = model.logits(ids)
    other = transformers.AutoModelForCausalLM.from_pretrained(hanok.BUNDLED, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs = (other(torch.tensor([ids])).logits[0].float() - exact).square().mean().sqrt()
    ours = (hanok.load(hanok.BUNDLED).logits(ids) - exact).square().mean().sqrt()
    assert 0 < ours < 1.5 * theirs


def test_score_is_the_log_probability_of_each_token(
    model: Model, oracle: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Once upon a time, there was a little girl named Lily."
    score = model.score(text)
    ids = torch.tensor([score.token_ids])
    with torch.inference_mode():
        expected = oracle(ids, labels=ids).loss
    assert score.logprobs[0] is None
    assert score.nll == pytest.approx(float(expected), abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(score.nll))
    monkeypatch.setattr(model_module, "LOGIT_ROWS", 4)
    assert model.score(text).logprobs[1:] == pytest.approx(score.logprobs[1:], abs=1e-5)
    assert model.score([5]).logprobs == [None]
    assert math.isnan(model.score([5]).nll)


def test_a_held_out_story_is_as_likely_as_the_model_card_says(model: Model) -> None:
    """The card's 2.44 nats are a mean over many stories; one of our own is near them."""
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play in the park with "
        "her friends. One day, she saw a big red ball. She wanted to play with it, but it was too "
        'high in the tree. Her friend Tom said, "I can help you." They were very happy.'
    )
    assert 0.5 < model.score(story).nll < 2.6


def test_a_conversation_that_keeps_its_cache_says_the_same(model: Model) -> None:
    cache, messages, plain = PrefixCache(), list(TALK), list(TALK)
    for turn in ("And then?", "Who was it?", "Tell me about Tom."):
        events = list(model.stream(messages, cache=cache, max_new_tokens=10))
        expected = model.generate(plain, max_new_tokens=10)
        assert [event.token_id for event in events] == expected.token_ids
        for talk in (messages, plain):
            talk.append({"role": "assistant", "content": expected.text})
            talk.append({"role": "user", "content": turn})
    # A turn taken back: what follows it in the cache is forgotten.
    again = [event.token_id for event in model.stream(TALK, cache=cache, max_new_tokens=10)]
    assert again == model.generate(TALK, max_new_tokens=10).token_ids


def test_a_shared_prefix_is_not_computed_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    forward = type(model.decoder).forward

    def counting(self, batch, cache=None):  # type: ignore[no-untyped-def]
        counts.append(len(batch.token_ids))
        return forward(self, batch, cache)

    monkeypatch.setattr(type(model.decoder), "forward", counting)
    cache, ids = PrefixCache(), model.encode("Once upon a time, there was a little dog.")
    first = [event.token_id for event in model.stream(ids, cache=cache, max_new_tokens=4)]
    longer = [*ids, *first, 9, 10]
    counts.clear()
    list(model.stream(longer, cache=cache, max_new_tokens=2))
    # The last generated token was never computed, so it comes with the two new ones.
    assert counts[0] == 3


def test_save_and_load_again(model: Model, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "copy")
    again = hanok.load(folder)
    ids = model.encode("The dog")
    assert torch.equal(again.logits(ids), model.logits(ids))
    assert again.generate("The dog", max_new_tokens=5) == model.generate(
        "The dog", max_new_tokens=5
    )
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert (folder / "chat_template.jinja").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(again.logits(ids), expected, atol=1e-4, rtol=0)
    with pytest.raises(hanok.CheckpointError, match="exists and is not empty"):
        model.save(folder)


def test_a_save_that_fails_leaves_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(model_module, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_folder_gets_its_name_in_one_rename(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then nothing has the name, and what was written is what gets it."""
    target, renamed = tmp_path / "copy", []
    original = Path.rename

    def rename(source: Path, new: Path) -> Path:
        if new == target:
            assert not target.exists()
            written = {item.name: item.stat().st_ino for item in source.iterdir()}
            renamed.append((source.stat().st_ino, written))
        return original(source, new)

    monkeypatch.setattr(Path, "rename", rename)
    model.save(target)
    ((folder, written),) = renamed
    assert "model.safetensors" in written
    assert target.stat().st_ino == folder
    assert {item.name: item.stat().st_ino for item in target.iterdir()} == written


def test_a_save_that_fails_while_it_renames_leaves_the_old_folder(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes").touch()
    with pytest.raises(hanok.CheckpointError, match="exists and is not empty"):
        model.save(kept)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "copy")
    assert [str(item.relative_to(tmp_path)) for item in sorted(tmp_path.rglob("*"))] == [
        "kept",
        "kept/notes",
    ]


def test_facts_of_the_model(model: Model) -> None:
    assert model.num_parameters() == sum(p.numel() for p in model.decoder.parameters())
    assert model.dtype is torch.float32
    assert model.device == torch.device("cpu")
    assert model.end_ids == {1}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "there is no prompt"),
        ([[]], "no tokens"),
        ([-1], "-1 is not a token id; this model's are 0 to 2047"),
        ([2048], "2048 is not a token id"),
        ([1.5], "1.5 is not a prompt"),
        ([3, 1.5], "1.5 is not a token id"),
        ([5] * 1025, "has 1025 tokens, and this model's context holds 1024"),
        ([5] * 1024, "fills the model's context of 1024 tokens"),
        ([{"role": "wizard", "content": "x"}], "not wizard"),
    ],
)
def test_a_prompt_that_cannot_be_served_says_why(
    model: Model, prompt: list[object], message: str
) -> None:
    with pytest.raises(hanok.RequestError, match=message):
        model.generate(prompt, max_new_tokens=1)  # type: ignore[call-overload]


def test_an_unknown_option_names_the_nearest(model: Model) -> None:
    with pytest.raises(hanok.OptionError, match="did you mean 'temperature'"):
        model.generate("hi", temprature=1.0)  # type: ignore[call-overload]


def test_without_a_tokenizer_only_ids_can_be_given(model: Model, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    bare = hanok.load(folder)
    out = bare.generate([3, 4, 5], max_new_tokens=3)
    assert out.token_ids == model.generate([3, 4, 5], max_new_tokens=3).token_ids
    assert out.text == ""
    for call in (lambda: bare.generate("hi"), lambda: bare.generate([3], stop=["x"])):
        with pytest.raises(hanok.RequestError, match="has no tokenizer"):
            call()


def save_with_dropped_space(folder: Path) -> Path:
    """A tiny random llama whose vocabulary drops the first space of a text, as SentencePiece does."""
    texts = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁big", "e"]
    library = tokenizers.Tokenizer(
        models.BPE({text: i for i, text in enumerate(texts)}, [], byte_fallback=True)
    )
    rules = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*rules, decoders.Strip(" ", left=1)])
    library.add_special_tokens(["<s>"])
    sizes = {"vocab_size": len(texts), "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "eos_token_id": None}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(
        folder
    )
    library.save(str(folder / "tokenizer.json"))
    return folder


def test_the_space_behind_the_prompt_is_the_texts(tmp_path: Path) -> None:
    """Prompt and answer join to what the vocabulary's library makes of both."""
    found = hanok.load(save_with_dropped_space(tmp_path))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found.tokenizer is not None
    the, big = (found.tokenizer.token_to_id(text) for text in ("▁the", "▁big"))
    bias: dict[int, float] = {big: 100.0}  # type: ignore[dict-item]
    prompt: list[int] = [1, the, the]  # type: ignore[list-item]
    out = found.generate(prompt, max_new_tokens=3, logit_bias=bias)
    assert library.decode(prompt) + out.text == library.decode([*prompt, *out.token_ids])
    assert out.text == " big big big"
    stopped = found.generate(prompt, max_new_tokens=3, logit_bias=bias, stop=[" big"])
    assert (stopped.text, stopped.finish_reason) == ("", "stop_sequence")
    speculation = hanok.Speculation(method="ngram")
    guessed = found.generate(prompt, max_new_tokens=3, logit_bias=bias, speculation=speculation)
    assert guessed.text == out.text


def test_generation_config_gives_the_defaults(model: Model, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "copy")
    values = {"eos_token_id": [1, 5], "do_sample": True, "temperature": 0.6, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(values))
    found = hanok.load(folder)
    assert found.end_ids == {1, 5}
    assert found.defaults.temperature == 0.6
    assert "num_beams = 4" in found.notes[-1]
    greedy = found.generate("The dog", max_new_tokens=5, temperature=0.0)
    assert greedy.token_ids == model.generate("The dog", max_new_tokens=5).token_ids


IDS = [("stop_token_ids", [5, 2048]), ("stop_token_ids", -1), ("logit_bias", {-1: 1.0})]
IDS += [("logit_bias", {2048: -math.inf}), ("spelled_token_ids", [10**30])]


@pytest.mark.parametrize(("name", "value"), IDS)
def test_an_option_that_names_no_token_is_refused_before_anything_is_computed(
    model: Model, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.decoder), "forward", None)
    with pytest.raises(
        OptionError, match=f"^{name} names token .*this model's tokens are 0 to 2047"
    ):
        model.stream("hi", **{name: value})  # type: ignore[arg-type]


END_IDS = [
    ({"eos_token_id": [1, 99999, -1]}, {1}, ["99999", "-1"]),
    ({"eos_token_id": -1}, {1}, ["-1"]),
    ({"eos_token_id": "2"}, {1}, ["'2'"]),
    ({"eos_token_id": [True, 5.0, 7]}, {7}, ["True", "5.0"]),
    ({"eos_token_id": None}, {1}, []),
    ({"eos_token_id": []}, set(), []),
]


@pytest.mark.parametrize(("values", "ends", "named"), END_IDS)
def test_end_tokens_that_are_not_there_end_nothing_and_are_noted(
    values: dict[str, object], ends: set[int], named: list[str], tmp_path: Path, model: Model
) -> None:
    """As if the file did not name them: with `min_new_tokens` they would be looked up."""
    folder = model.save(tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps(values))
    found = hanok.load(folder, dtype="float32")
    assert found.end_ids == ends
    notes = [note for note in found.notes if "as an end token" in note]
    for note, name in zip(notes, named, strict=True):
        assert note.startswith(f"generation_config.json names {name} as an end token")
    options = {"max_new_tokens": 6, "min_new_tokens": 3}
    assert found.generate("The dog", **options).token_ids == (  # type: ignore[arg-type]
        model.generate("The dog", **options).token_ids  # type: ignore[arg-type]
    )


def test_a_token_beyond_the_embedding_is_refused_by_name(model: Model, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "copy")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    while library.get_vocab_size() < 2048:
        library.add_tokens([f"<added {library.get_vocab_size()}>"])
    library.add_tokens(["<beyond>"])
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(hanok.RequestError, match="makes token 2048 of the prompt"):
        hanok.load(folder).generate("a <beyond>", max_new_tokens=1)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_an_int8_cache_says_almost_the_same(backend: str) -> None:
    plain = hanok.load(hanok.BUNDLED, attn_implementation=backend)
    small = hanok.load(hanok.BUNDLED, attn_implementation=backend, cache_dtype="int8")
    cache = small.decoder.new_cache(2, 10)
    assert cache.states[0].keys.dtype is torch.int8
    head_dim = small.config.attentions[0].head_dim
    wide = plain.decoder.new_cache(2, 10)
    assert cache.size_bytes * 2 * head_dim == wide.size_bytes * (head_dim + 4)
    options = {"max_new_tokens": 12, "temperature": 0.0}
    first, second = (model.generate("Once upon a time", **options) for model in (plain, small))
    assert first.token_ids[:4] == second.token_ids[:4]
    difference = torch.tensor(first.logprobs[:4]) - torch.tensor(second.logprobs[:4])
    assert 0 < float(difference.abs().max()) < 0.1


def test_an_unknown_cache_dtype_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"cache_dtype 'int4' is unknown\. Choose one of: int8, auto"
    ):
        hanok.load(hanok.BUNDLED, cache_dtype="int4")  # type: ignore[arg-type]  # what users may write


def test_end_tokens_may_stand_in_the_text_part_of_a_config(model: Model, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "copy")
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    text = json.loads(path.read_text()) | {"eos_token_id": [2, 7]}
    inside = {"model_type": "llava", "text_config": text}
    path.write_text(json.dumps(inside))
    assert hanok.load(folder).end_ids == {2, 7}
    path.write_text(json.dumps(inside | {"eos_token_id": 5}))
    assert hanok.load(folder).end_ids == {5}
