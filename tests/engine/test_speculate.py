"""Guessing tokens changes how many passes a text takes and nothing else: not a token, not a number."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hanok
from hanok.engine.draft import DraftModel
from hanok.engine.generate import PrefixCache, generate
from hanok.engine.grammar import GrammarCompiler
from hanok.engine.grammar_spec import GrammarSpec
from hanok.engine.model import Model
from hanok.engine.sequence import GenerationSequence, SpeculationCounts, TokenEvent
from hanok.engine.speculate import Speculation, Speculator, most_exact_tokens
from hanok.kernels.native import FLOAT_TOKENS, native
from hanok.models.decoder import Execution

VOCAB = 40
REPEATING = [3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4, 5]
PROMPTS = [REPEATING, [9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 11, 12]]
pytestmark = pytest.mark.usefixtures("any_length")
STORY = "The dog saw a cat. The cat saw the dog. The dog saw a bird. " * 3


def save_llama(folder: Path, *, seed: int, spread: float = 6.0, **options: object) -> Path:
    """Save a tiny random llama without a tokenizer."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**(sizes | heads | {"eos_token_id": None} | options))
    torch.manual_seed(seed)
    found = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread)
    found.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return hanok.load(save_llama(tmp_path_factory.mktemp("tiny"), seed=0))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Another tiny model, whose guesses are wrong most of the time."""
    return hanok.load(save_llama(tmp_path_factory.mktemp("other"), seed=1))


@pytest.fixture(scope="module")
def story_model() -> Model:
    return hanok.load(hanok.BUNDLED, quant="int8", weights="copied", context=512, batch=4)


def speculations(model: Model, other: Model) -> list[Speculation]:
    return [
        Speculation(),
        Speculation(max_tokens=3),
        Speculation(method="draft", draft=model),
        Speculation(method="draft", draft=other, max_tokens=4),
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 5},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "sampled with penalties": {"temperature": 1.0, "seed": 2, "frequency_penalty": 0.7, "top_k": 9},
    "bias": {"logit_bias": {5: 3.0, 7: -2.0}},
    "watermark": {"watermark_delta": 4.0},
    "logprobs": {"top_logprobs": 3, "model_logprobs": False, "temperature": 0.7, "seed": 1},
    "ends": {"stop_token_ids": [4, 18], "min_new_tokens": 7},
}


def counts_add_up(counts: SpeculationCounts, num_tokens: int) -> bool:
    """A pass gives a token and what was drafted right before it; the last may lack the former."""
    return counts.passes + counts.accepted - num_tokens in (0, 1)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_several_prompts_give_the_same_events(
    tiny: Model, other: Model, name: str, cache_dtype: str
) -> None:
    tiny.decoder.execution = Execution(cache_dtype=torch.int8 if cache_dtype == "int8" else None)
    options = {"max_new_tokens": 40, "top_logprobs": 2} | OPTIONS[name]
    plain = tiny.generate(PROMPTS, **options)
    for speculation in speculations(tiny, other):
        found = tiny.generate(PROMPTS, speculation=speculation, **options)
        for mine, expected in zip(found, plain, strict=True):
            assert mine.token_ids == expected.token_ids
            assert mine.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert mine.finish_reason == expected.finish_reason
            assert [len(top) for top in mine.top_logprobs] == [
                len(top) for top in expected.top_logprobs
            ]
            assert counts_add_up(mine.speculation, len(mine.token_ids))
        if name == "greedy" and speculation.draft is not other:
            assert sum(item.speculation.accepted for item in found) > 10
    tiny.decoder.execution = Execution()


def test_several_prompts_are_streamed_together(tiny: Model, other: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30}
    for speculation in (None, *speculations(tiny, other)):
        plain = tiny.generate(PROMPTS, speculation=speculation, **options)
        stream = tiny.stream(PROMPTS, speculation=speculation, **options)
        found: list[list[int]] = [[] for _ in PROMPTS]
        for event in stream:
            found[event.sequence].append(event.token_id)
        assert found == [item.token_ids for item in plain]
        counts = stream.speculation
        assert 0 <= counts.passes + counts.accepted - sum(map(len, found)) <= len(found)
        assert (counts.proposed > 0) == (speculation is not None)
    with pytest.raises(hanok.OptionError, match="3 prompts share one cache"):
        tiny.stream(PROMPTS, cache=PrefixCache())


def test_a_model_that_drafts_for_itself_is_always_right(tiny: Model) -> None:
    """Drawn tokens too: it draws with the number that will be drawn with."""
    for options in ({}, {"temperature": 1.1, "seed": 4, "frequency_penalty": 0.3}):
        found = tiny.generate(
            PROMPTS,
            max_new_tokens=60,
            speculation=Speculation(method="draft", draft=tiny),
            **options,  # type: ignore[arg-type]
        )
        for item in found:
            assert item.speculation.accepted == item.speculation.proposed > 20


@pytest.mark.parametrize("stop", ["cat", " saw the", "d. The", "bird"])
@pytest.mark.parametrize("sampled", [False, True])
def test_stop_texts_end_where_they_would(story_model: Model, stop: str, sampled: bool) -> None:
    options: dict[str, Any] = {"max_new_tokens": 80, "stop": [stop, "never said"]}
    options |= {"temperature": 0.6, "seed": 11} if sampled else {}
    plain = list(story_model.stream(STORY, **options))
    for speculation in (Speculation(), Speculation(method="draft", draft=story_model)):
        stream = story_model.stream(STORY, speculation=speculation, **options)
        assert list(stream) == plain
        assert counts_add_up(stream.speculation, len(plain))


@pytest.mark.parametrize("quant", [None, "int8", "int4", "nf4", "fp8"])
def test_quantized_or_not_the_numbers_are_the_same(quant: str | None) -> None:
    """With our kernels bit for bit: a token is computed as if it were alone."""
    kernels = native()
    if kernels is None:
        pytest.skip("needs our kernels")
    model = hanok.load(hanok.BUNDLED, quant=quant, weights="copied")
    exact = most_exact_tokens(model.decoder)
    assert exact == {None: kernels.dense_tokens, "fp8": FLOAT_TOKENS}.get(quant), quant
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        plain = list(model.stream(STORY, max_new_tokens=100, ignore_eos=True, **options))  # type: ignore[arg-type]
        most = 7 if exact else 15
        for speculation in (
            Speculation(max_tokens=most),
            Speculation(method="draft", draft=model, max_tokens=7),
        ):
            stream = model.stream(
                STORY,
                max_new_tokens=100,
                ignore_eos=True,
                speculation=speculation,
                **options,  # type: ignore[arg-type]
            )
            assert list(stream) == plain
            assert stream.speculation.proposed > 0


def test_a_conversations_cache_holds_only_what_was_said(story_model: Model) -> None:
    for speculation in (Speculation(), Speculation(method="draft", draft=story_model)):
        cache, plain_cache = PrefixCache(), PrefixCache()
        ids = story_model.encode(STORY)
        for turn in range(3):
            options: Any = {"max_new_tokens": 30, "ignore_eos": True, "temperature": 0.5, "seed": 3}
            stream = story_model.stream(ids, cache=cache, speculation=speculation, **options)
            plain = story_model.stream(ids, cache=plain_cache, **options)
            # Left in the middle, as by somebody who stops an answer.
            wanted = 30 if turn != 1 else 17
            found = [event for event, _ in zip(stream, range(wanted), strict=False)]
            stream.close()
            assert found == [event for event, _ in zip(plain, range(wanted), strict=False)]
            plain.close()
            ids = [*ids, *(event.token_id for event in found), *story_model.encode(" The cat")[1:]]


@pytest.fixture(scope="module")
def compiler(story_model: Model) -> GrammarCompiler:
    assert story_model.tokenizer is not None
    return GrammarCompiler(
        story_model.tokenizer, story_model.config.vocab_size, story_model.end_ids
    )


GRAMMARS = {
    "regex": GrammarSpec("regex", "(The (dog|cat) saw (a|the) (cat|dog)\\. ){3,6}"),
    "schema": GrammarSpec(
        "json_schema",
        json.dumps(
            {
                "type": "object",
                "properties": {name: {"enum": ["dog", "cat"]} for name in ("first", "second")},
                "required": ["first", "second"],
                "additionalProperties": False,
            }
        ),
    ),
}


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("method", ["ngram", "draft"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 6}], ids=["greedy", "drawn"])
def test_a_grammar_is_kept_and_what_it_refuses_is_not_drafted(
    story_model: Model, compiler: GrammarCompiler, grammar: str, method: str, options: Any
) -> None:
    compiled = compiler.compile(GRAMMARS[grammar])
    is_draft = method == "draft"
    speculation = (
        Speculation(method="draft", draft=story_model) if is_draft else Speculation(max_tokens=6)
    )

    def run(speculator: Speculator | None) -> tuple[GenerationSequence, list[TokenEvent]]:
        sequence = story_model.sequence(STORY, {"max_new_tokens": 60, **options})
        sequence.grammar = compiled.matcher()
        return sequence, list(generate(story_model.decoder, [sequence], speculator=speculator))

    _, expected = run(None)
    speculator = Speculator(speculation, story_model.decoder, num_sequences=1, max_tokens=512)
    drafts = speculator.drafts

    def kept(sequences: Mapping[int, GenerationSequence]) -> dict[int, list[int]]:
        found = drafts(sequences)
        for key, tokens in found.items():
            grammar = sequences[key].grammar
            assert grammar is not None
            assert grammar.allowed_prefix(tokens) == len(tokens)
        return found

    speculator.drafts = kept  # type: ignore[method-assign]
    sequence, events = run(speculator)
    assert events == expected
    counts = sequence.speculation
    assert counts.accepted > 3
    if is_draft:  # it drafts for itself, with the grammar's mask
        assert counts.accepted == counts.proposed


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_nothing_is_drafted_where_angles_would_change(kind: str, tmp_path: Path) -> None:
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "dynamic":
        sizes: dict[str, object] = {"max_position_embeddings": 24}
        rope |= {"factor": 4.0}
    else:
        sizes = {"max_position_embeddings": 96}
        rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
        rope |= {"original_max_position_embeddings": 24, "factor": 4.0}
    model = hanok.load(save_llama(tmp_path, seed=0, rope_parameters=rope, **sizes))
    plain = model.generate(REPEATING, max_new_tokens=50)
    for speculation in (Speculation(), Speculation(method="draft", draft=model)):
        found = model.generate(REPEATING, max_new_tokens=50, speculation=speculation)
        assert found.token_ids == plain.token_ids
        assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
        assert found.speculation.proposed > 0 or speculation.draft is None


def test_a_draft_model_with_a_shorter_context_drafts_up_to_it(tmp_path: Path, tiny: Model) -> None:
    short = hanok.load(save_llama(tmp_path, seed=0, max_position_embeddings=30))
    found = tiny.generate(
        PROMPTS, max_new_tokens=60, speculation=Speculation(method="draft", draft=short)
    )
    assert [item.token_ids for item in found] == [
        item.token_ids for item in tiny.generate(PROMPTS, max_new_tokens=60)
    ]
    for item in found:
        assert 0 < item.speculation.accepted <= 30 - len(item.prompt_ids)


def test_a_draft_model_catches_up_with_what_it_missed(tiny: Model) -> None:
    """Whenever it is asked, and whatever it guessed before, its guesses are those of a fresh one."""
    chooser = random.Random(3)
    drafter = DraftModel(tiny.decoder, num_slots=2, max_tokens=100, vocab_size=VOCAB)
    sequences = {key: tiny.sequence(PROMPTS[key], {"max_new_tokens": 60}) for key in (0, 2)}
    for _ in range(12):
        for sequence in sequences.values():
            sequence.token_ids += [chooser.randrange(VOCAB) for _ in range(chooser.randrange(4))]
        asked = {key: sequences[key] for key in sequences if chooser.random() < 0.7}
        counts = {key: chooser.randint(1, 5) for key in asked}
        drafter.catch_up(asked)
        found = drafter.propose(asked, counts)
        for key, sequence in asked.items():
            expected = tiny.generate(sequence.token_ids, max_new_tokens=counts[key]).token_ids
            assert found[key] == expected
            if chooser.random() < 0.5:  # what was right is kept
                sequence.token_ids += expected[: chooser.randint(0, counts[key])]
    assert drafter.with_slots({5: sequences[0]}) == {}
    drafter.forget(0)
    assert list(drafter.with_slots({5: sequences[0], 6: sequences[2]})) == [5]


def test_drawn_tokens_follow_the_models_distribution(tmp_path: Path) -> None:
    """Chi-squared of the first three tokens, drawn with 2,500 seeds, against the exact probabilities."""
    sizes = {"vocab_size": 5, "num_hidden_layers": 1}
    model = hanok.load(save_llama(tmp_path / "model", seed=3, spread=3.0, **sizes))
    wrong = hanok.load(save_llama(tmp_path / "draft", seed=8, spread=3.0, **sizes))
    # Whatever comes first, something followed it before.
    prompt = [*(token for first in range(5) for token in (2, first, (first + 1) % 5)), 2]
    runs, temperature = 2500, 1.3

    def exact(tokens: tuple[int, ...]) -> float:
        chance = 1.0
        for place, token in enumerate(tokens):
            rows = model.logits([*prompt, *tokens[:place]])
            chance *= float((rows[-1].double() / temperature).softmax(-1)[token])
        return chance

    expected = {
        (a, b, c): runs * exact((a, b, c)) for a in range(5) for b in range(5) for c in range(5)
    }
    assert sum(expected.values()) == pytest.approx(runs)
    for speculation in (Speculation(), Speculation(method="draft", draft=wrong)):
        seen = dict.fromkeys(expected, 0)
        accepted = 0
        for start in range(0, runs, 500):
            sequences = [
                model.sequence(prompt, {"max_new_tokens": 3, "temperature": temperature, "seed": n})
                for n in range(start, start + 500)
            ]
            speculator = Speculator(speculation, model.decoder, num_sequences=500, max_tokens=32)
            for _ in generate(model.decoder, sequences, speculator=speculator):
                pass
            for sequence in sequences:
                seen[tuple(sequence.generated_ids)] += 1
                accepted += sequence.speculation.accepted
        assert accepted > runs / 20
        likely = [key for key, number in expected.items() if number >= 5]
        rest = runs - sum(expected[key] for key in likely)
        squares = sum((seen[key] - expected[key]) ** 2 / expected[key] for key in likely)
        if rest > 1:
            squares += (runs - sum(seen[key] for key in likely) - rest) ** 2 / rest
        # Mean len(likely), standard deviation sqrt(2 len(likely)): 4 of them is one in 10,000.
        assert squares < len(likely) + 4 * (2 * len(likely)) ** 0.5


def test_vocabularies_that_differ_are_refused(tmp_path: Path, tiny: Model) -> None:
    larger = hanok.load(save_llama(tmp_path / "larger", seed=0, vocab_size=50))
    with pytest.raises(hanok.OptionError, match="have 50 and 40 tokens"):
        tiny.generate([3], speculation=Speculation(method="draft", draft=larger))
    bundled = hanok.load(hanok.BUNDLED)
    with pytest.raises(hanok.OptionError, match="has no tokenizer"):
        bundled.generate("A", speculation=Speculation(method="draft", draft=tiny))
    folder = tmp_path / "swapped"
    folder.mkdir()
    for file in hanok.BUNDLED.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(text for text, n in vocabulary.items() if n == i) for i in (700, 900))
    vocabulary[first], vocabulary[second] = 900, 700
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    swapped = hanok.load(folder)
    with pytest.raises(
        hanok.OptionError, match=r"differ, first at token 700, which is .*same family"
    ):
        bundled.generate("A", speculation=Speculation(method="draft", draft=swapped))
    bundled.generate("A", max_new_tokens=2, speculation=Speculation(method="draft", draft=bundled))


def test_options_that_make_no_sense_are_refused(tiny: Model) -> None:
    with pytest.raises(hanok.OptionError, match="needs one"):
        Speculation(method="draft")
    with pytest.raises(hanok.OptionError, match="say method='draft'"):
        Speculation(draft=tiny)
    with pytest.raises(hanok.OptionError, match="'eagle' is unknown"):
        Speculation(method="eagle")  # type: ignore[arg-type]
    with pytest.raises(hanok.OptionError, match="must be 1 to 255"):
        Speculation(max_tokens=0)
    with pytest.raises(hanok.OptionError, match="needs the cache"):
        tiny.generate([3], use_cache=False, speculation=Speculation())
    with pytest.raises(hanok.OptionError, match="needs the cache"):
        tiny.stream([3], use_cache=False, speculation=Speculation())


def test_a_broken_row_raises_behind_the_tokens_before_it(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = tiny.sequence(REPEATING, {"max_new_tokens": 30})
    speculator = Speculator(Speculation(), tiny.decoder, num_sequences=1, max_tokens=64)
    expected = tiny.generate(REPEATING, max_new_tokens=30).token_ids
    real = tiny.decoder.logits

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        rows = real(hidden)
        place = 25 - len(sequence.token_ids)
        if 0 <= place < len(rows):
            rows[place] = torch.nan
        return rows

    monkeypatch.setattr(tiny.decoder, "logits", poisoned)
    events = generate(tiny.decoder, [sequence], speculator=speculator)
    found = [next(events).token_id for _ in range(25 - len(REPEATING))]
    with pytest.raises(hanok.GenerationError, match="the scores of token 25 are not finite"):
        next(events)
    assert found == expected[: 25 - len(REPEATING)]
