"""Generation: the same tokens however they are computed, and text that ends where it should."""

from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import hanok
from hanok.engine.model import Model
from hanok.engine.sequence import StopTexts

PROMPTS = ["Once upon a time", "The dog", "One day, Tom and his friend went to the big park and"]


@pytest.fixture(scope="module")
def model() -> Model:
    """The bundled model in float32, where rounding does not decide between tokens."""
    return hanok.load(hanok.BUNDLED, dtype="float32")


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(hanok.BUNDLED, dtype=torch.float32)


def save_llama(folder: Path, **options: object) -> Path:
    """Save a tiny random llama without a tokenizer."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
    config = transformers.LlamaConfig(**(sizes | heads | options))
    torch.manual_seed(0)
    found = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)  # so that tokens differ in likelihood
    found.save_pretrained(folder)
    return folder


def test_greedy_tokens_are_transformers(model: Model, oracle: transformers.PreTrainedModel) -> None:
    for prompt in PROMPTS:
        out = model.generate(prompt, max_new_tokens=48)
        ids = torch.tensor([out.prompt_ids])
        expected = oracle.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=1)[0]
        assert out.token_ids == expected[len(out.prompt_ids) :].tolist()


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_batched_is_alone_and_cached_is_uncached(model: Model, options: dict[str, float]) -> None:
    together = model.generate(PROMPTS, max_new_tokens=32, **options)  # type: ignore[arg-type]
    uncached = model.generate(PROMPTS, max_new_tokens=32, use_cache=False, **options)  # type: ignore[arg-type]
    for prompt, first, second in zip(PROMPTS, together, uncached, strict=True):
        alone = model.generate(prompt, max_new_tokens=32, **options)  # type: ignore[arg-type]
        assert first.token_ids == alone.token_ids == second.token_ids
        assert first.text == alone.text == second.text
        assert first.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_prompts_in_chunks_give_the_same_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [out.token_ids for out in model.generate(PROMPTS, max_new_tokens=12)]
    monkeypatch.setattr("hanok.engine.passes.PREFILL_TOKENS", 4)
    assert [out.token_ids for out in model.generate(PROMPTS, max_new_tokens=12)] == expected


def test_a_seed_gives_the_same_text_whatever_else_runs(model: Model) -> None:
    options = {"temperature": 1.2, "seed": 3, "max_new_tokens": 20}
    alone = model.generate(PROMPTS[1], **options)  # type: ignore[arg-type]
    among = model.generate([*PROMPTS, PROMPTS[1]], **options)  # type: ignore[arg-type]
    assert among[1].token_ids == among[3].token_ids == alone.token_ids
    other = model.generate(PROMPTS[1], temperature=1.2, seed=4, max_new_tokens=20)
    assert other.token_ids != alone.token_ids


def test_without_a_seed_each_run_draws_anew(model: Model) -> None:
    runs = [model.generate(PROMPTS[1], temperature=1.5, max_new_tokens=30) for _ in range(2)]
    assert runs[0].token_ids != runs[1].token_ids


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_change_with_length_leave_cached_equal_to_uncached(
    kind: str, tmp_path: Path
) -> None:
    """Generation crosses the original length: what was cached for other angles is not used."""
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "dynamic":
        folder = save_llama(
            tmp_path, rope_parameters={**rope, "factor": 4.0}, max_position_embeddings=12
        )
    else:
        rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
        rope |= {"original_max_position_embeddings": 12, "factor": 4.0}
        folder = save_llama(tmp_path, rope_parameters=rope, max_position_embeddings=48)
    found = hanok.load(folder)
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]]
    cached = found.generate(prompts, max_new_tokens=14)
    uncached = found.generate(prompts, max_new_tokens=14, use_cache=False)
    assert [out.token_ids for out in cached] == [out.token_ids for out in uncached]
    assert cached[0].logprobs == pytest.approx(uncached[0].logprobs, abs=1e-4)


def test_end_tokens_end_a_sequence_and_not_its_neighbours(model: Model) -> None:
    free = model.generate(PROMPTS, max_new_tokens=24, ignore_eos=True)
    ends = (free[0].token_ids[5], free[2].token_ids[9])
    stopped = model.generate(PROMPTS, max_new_tokens=24, stop_token_ids=ends)
    for out, whole in zip(stopped, free, strict=True):
        cut = next((at for at, token in enumerate(whole.token_ids) if token in ends), 23)
        assert out.token_ids == whole.token_ids[: cut + 1]
        assert out.finish_reason == ("eos_token" if whole.token_ids[cut] in ends else "length")
    story = model.generate(PROMPTS[0], max_new_tokens=600)
    assert story.finish_reason == "eos_token"
    assert story.token_ids[-1] == model.tokenizer.eos_token_id  # type: ignore[union-attr]
    assert "</s>" not in story.text


def test_the_context_ends_a_sequence(tmp_path: Path) -> None:
    found = hanok.load(save_llama(tmp_path, max_position_embeddings=20))
    out = found.generate([3] * 15, max_new_tokens=100)
    assert (len(out.token_ids), out.finish_reason) == (5, "length")


def test_a_stop_text_that_straddles_tokens_is_cut(model: Model) -> None:
    whole = model.generate(PROMPTS[0], max_new_tokens=40).text
    for start, end in ((9, 17), (20, 23), (31, 45)):
        stop = whole[start:end]
        out = model.generate(PROMPTS[0], max_new_tokens=40, stop=[stop, "never said"])
        assert out.text == whole[: whole.index(stop)]
        assert out.finish_reason == "stop_sequence"
        pieces = list(model.stream(PROMPTS[0], max_new_tokens=40, stop=stop))
        assert "".join(event.text for event in pieces) == out.text


def test_text_held_back_for_a_stop_is_not_lost(model: Model) -> None:
    whole = model.generate(PROMPTS[0], max_new_tokens=20).text
    out = model.generate(PROMPTS[0], max_new_tokens=20, stop=[whole[-3:] + "?!"])
    assert out.text == whole
    assert out.finish_reason == "length"


# With this bias the bundled model says " He", then a turn's opening and a new line, again and again.
TURNS: dict[str, Any] = {"logit_bias": {2: 10.0}, "max_new_tokens": 8}


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("<|user|>", " He"),
        ("<|user|>\n", " He"),
        ("He<|user|>", " "),
        (">\n<|us", " He"),
        ("\n", " He"),
    ],
)
def test_a_stop_text_may_hold_special_tokens(
    stop: str, shown: str, model: Model, oracle: transformers.PreTrainedModel
) -> None:
    """transformers stops at the same token; what is shown has no special tokens, and no stop text."""
    assert model.tokenizer is not None
    out = model.generate("Tom had a dog.", stop=[stop], **TURNS)
    expected = oracle.generate(
        torch.tensor([out.prompt_ids]),
        max_new_tokens=8,
        do_sample=False,
        sequence_bias=[[[2], 10.0]],
        stop_strings=[stop],
        tokenizer=transformers.AutoTokenizer.from_pretrained(hanok.BUNDLED),
        pad_token_id=1,
    )[0]
    assert out.token_ids == expected[len(out.prompt_ids) :].tolist()
    assert (out.text, out.finish_reason) == (shown, "stop_sequence")
    included = model.generate("Tom had a dog.", stop=[stop], include_stop=True, **TURNS)
    assert included.text == model.tokenizer.decode(out.token_ids)


def test_special_tokens_are_spelled_where_they_are_asked_for(model: Model) -> None:
    plain = model.generate("Tom had a dog.", **TURNS)
    assert plain.text == " He\n\n\n"
    out = model.generate("Tom had a dog.", spelled_token_ids=[2], **TURNS)
    assert (out.text, out.token_ids) == (" He" + "<|user|>\n" * 3 + "<|user|>", plain.token_ids)
    ended = model.generate("Tom had a dog.", spelled_token_ids=[2], stop_token_ids=[2], **TURNS)
    assert (ended.text, ended.finish_reason) == (" He", "eos_token")


def test_an_end_token_is_no_stop_text(model: Model) -> None:
    options: dict[str, Any] = {"stop": ["<|user|>"], "stop_token_ids": [2]}
    out = model.generate("Tom had a dog.", **options, **TURNS)
    assert (out.text, out.finish_reason) == (" He", "eos_token")


TEXTS = st.text(alphabet="abAB \n", max_size=40)


@settings(max_examples=300)
@given(
    text=TEXTS,
    stops=st.lists(st.text(alphabet="abAB \n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_what_is_shown_is_the_text_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """However the text is cut into pieces, nothing of a stop is shown and nothing before it is lost."""
    matcher, shown, is_stopped = StopTexts(stops), "", False
    borders = sorted({0, *(cut for cut in cuts if cut <= len(text)), len(text)})
    for start, end in pairwise(borders):
        piece, is_stopped = matcher.push(text[start:end])
        shown += piece
        # What was shown could not have been the beginning of a stop that appears.
        assert not any(stop in shown for stop in stops)
        if is_stopped:
            break
    if not is_stopped:
        shown += matcher.finish()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
        assert matcher.reached is None
    else:
        first_seen = min(border for border in borders if border >= min(ends))
        starts = [text[:first_seen].find(stop) for stop in stops]
        assert shown == text[: min(start for start in starts if start >= 0)]
        assert matcher.reached in stops
        assert text.startswith(matcher.reached, len(shown))
    assert is_stopped == bool(ends)


@settings(max_examples=300)
@given(
    parts=st.lists(st.tuples(st.text("abc", max_size=3), st.text("abc", max_size=3)), max_size=6),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    are_included=st.booleans(),
)
def test_what_is_not_shown_counts_as_text_for_stops(
    parts: list[tuple[str, str]], stops: list[str], are_included: bool
) -> None:
    """What is shown is what would be if all were, less the parts that are passed over."""
    hidden, plain = (StopTexts(stops, are_included=are_included) for _ in range(2))
    marks: list[bool] = []
    spelled = shown = ""
    for text, passed_over in parts:
        marks += [True] * len(text) + [False] * len(passed_over)
        piece, is_stopped = hidden.push(text, passed_over=passed_over)
        whole, is_expected = plain.push(text + passed_over)
        shown, spelled = shown + piece, spelled + whole
        assert is_stopped == is_expected
        if is_stopped:
            break
    else:
        shown, spelled = shown + hidden.finish(), spelled + plain.finish()
    assert shown == "".join(compress(spelled, marks))


def test_logprobs_are_the_models_own(model: Model) -> None:
    """Before temperature, penalties and cuts: they say what the model thinks."""
    out = model.generate(
        PROMPTS[1], max_new_tokens=10, top_logprobs=3, temperature=0.8, top_k=5, seed=1
    )
    table = model.logits([*out.prompt_ids, *out.token_ids]).log_softmax(-1)
    for step, (token, logprob, best) in enumerate(
        zip(out.token_ids, out.logprobs, out.top_logprobs, strict=True)
    ):
        row = table[len(out.prompt_ids) - 1 + step]
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(3)
        assert [token for token, _ in best] == ids.tolist()
        assert [value for _, value in best] == pytest.approx(values.tolist(), abs=1e-4)


def test_penalties_and_bias_act_in_the_loop(model: Model) -> None:
    plain = model.generate(PROMPTS[0], max_new_tokens=30)
    banned = plain.token_ids[0]
    biased = model.generate(PROMPTS[0], max_new_tokens=30, logit_bias={banned: -1e9})
    assert banned not in biased.token_ids
    penalised = model.generate(PROMPTS[0], max_new_tokens=30, frequency_penalty=100.0)
    assert len(set(penalised.token_ids)) == 30
    repeated = model.generate(PROMPTS[0], max_new_tokens=30, repetition_penalty=1e6)
    assert not set(repeated.token_ids) & set(repeated.prompt_ids)
    present = model.generate(PROMPTS[0], max_new_tokens=30, presence_penalty=100.0)
    assert len(set(present.token_ids)) == 30


def test_end_tokens_are_left_out_before_the_fewest_tokens_and_read_over_on_request(
    model: Model,
) -> None:
    first = model.generate(PROMPTS[0], max_new_tokens=1).token_ids[0]
    late = model.generate(PROMPTS[0], max_new_tokens=9, stop_token_ids=[first], min_new_tokens=4)
    assert first not in late.token_ids[:4]
    (end,) = model.end_ids
    options = {"max_new_tokens": 5, "logit_bias": {end: 1000.0}}
    assert model.generate(PROMPTS[0], **options).token_ids == [end]
    assert model.generate(PROMPTS[0], ignore_eos=True, **options).token_ids == [end] * 5


def test_logprobs_are_the_models_or_those_of_what_was_drawn_from(model: Model) -> None:
    options = {"max_new_tokens": 3, "temperature": 1.0, "top_k": 1}
    assert all(event.logprob < 0 for event in model.stream(PROMPTS[0], **options))
    alone = [event.logprob for event in model.stream(PROMPTS[0], model_logprobs=False, **options)]
    assert alone == [0.0] * 3


@pytest.mark.parametrize("attention", ["eager", "sdpa", "sdpa_math", "sdpa_flash"])
def test_every_attention_gives_the_same_greedy_text(attention: str, model: Model) -> None:
    other = hanok.load(hanok.BUNDLED, dtype="float32", attn_implementation=attention)
    assert set(other.report.attention) == {attention}
    texts = [m.generate(PROMPTS[2], max_new_tokens=32).text for m in (other, model)]
    assert texts[0] == texts[1]
