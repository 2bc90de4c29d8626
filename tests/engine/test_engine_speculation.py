"""Requests of an engine that guesses: the tokens of each alone, whatever is right, refused or fails."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import hanok
from hanok.attention.cache import KVCache
from hanok.engine.engine import Engine
from hanok.engine.grammar import GrammarCompiler
from hanok.engine.grammar_spec import GrammarError, GrammarSpec
from hanok.engine.model import Model
from hanok.engine.runner import BLOCK_TOKENS, StepResult
from hanok.engine.schedule import Chunk
from hanok.engine.sequence import LookAhead, TokenEvent
from hanok.engine.speculate import Speculation
from hanok.engine.ticket import Request, Ticket
from hanok.errors import GenerationError
from hanok.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("any_length")
STORY = "The dog saw a cat. The cat saw the dog. The dog saw a bird. " * 3
PROMPTS = ["Once upon a time", STORY, "The dog", STORY + "The cat", "Lily", STORY, "Tom and", "A"]


@pytest.fixture(scope="module")
def model() -> Model:
    return hanok.load(hanok.BUNDLED, quant="int8", weights="copied", context=512, batch=4)


@pytest.fixture(scope="module")
def compiler(model: Model) -> GrammarCompiler:
    assert model.tokenizer is not None
    return GrammarCompiler(model.tokenizer, model.config.vocab_size, model.end_ids)


def speculation_by(method: str, model: Model) -> Speculation:
    return Speculation(method="draft", draft=model) if method == "draft" else Speculation()


def plainly(model: Model, prompt: Any, **options: Any) -> list[TokenEvent]:
    return list(model.stream(prompt, **options))


def same(found: Sequence[TokenEvent], expected: Sequence[TokenEvent]) -> bool:
    """Token for token; log-probabilities but for the order in which sums are made."""
    return [(e.token_id, e.text, e.finish_reason) for e in found] == [
        (e.token_id, e.text, e.finish_reason) for e in expected
    ] and [e.logprob for e in found] == pytest.approx([e.logprob for e in expected], abs=1e-4)


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 5},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 1.0, "top_k": 20, "seed": 9, "presence_penalty": 0.4},
    {"stop": ["dog", "never said"]},
    {"top_logprobs": 3},
    {"temperature": 0.7, "seed": 2, "min_new_tokens": 30},
    {"watermark_delta": 3.0},
]


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_eight_requests_at_once_give_the_tokens_of_each_alone(model: Model, method: str) -> None:
    with Engine(model, cache_tokens=8192, speculation=speculation_by(method, model)) as engine:
        for _ in range(2):  # the second time from blocks that the first left
            tickets = [
                engine.submit(prompt, max_new_tokens=40, **options)
                for prompt, options in zip(PROMPTS, MIXED, strict=True)
            ]
            for prompt, options, ticket in zip(PROMPTS, MIXED, tickets, strict=True):
                expected = plainly(model, prompt, max_new_tokens=40, **options)
                assert same(ticket.result(), expected)
        stats = engine.stats()
    assert stats.used_blocks == 0
    assert stats.drafted_tokens >= stats.accepted_tokens > 20
    assert (stats.drafted_tokens == stats.accepted_tokens) == (method == "draft")
    assert stats.steps < stats.generated_tokens
    counts = [ticket.request.sequence.speculation for ticket in tickets]
    assert 0 < sum(item.proposed for item in counts) < stats.drafted_tokens


def test_a_grammar_that_cannot_go_back_fails_alone(
    model: Model, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plainly(model, "The dog", max_new_tokens=40)
    sequence = model.sequence(STORY, {"max_new_tokens": 40})
    matcher = compiler.compile(GrammarSpec("regex", "(The dog saw a cat\\. ){3,6}")).matcher()
    sequence.grammar = matcher

    def broken(*_: Any) -> Any:
        raise GrammarError("the grammar could not be followed any further")

    def rollback(num_tokens: int) -> None:
        monkeypatch.setattr(matcher, "mask", broken)  # as a real one then says at every call
        broken()

    monkeypatch.setattr(matcher, "rollback", rollback)
    with Engine(model, cache_tokens=4096, speculation=speculation_by("draft", model)) as engine:
        failing = engine.submit_request(Request(sequence=sequence))
        other = engine.submit("The dog", max_new_tokens=40)
        with pytest.raises(GenerationError, match="could not be followed"):
            failing.result()
        assert same(other.result(), expected)


def test_a_draft_model_claims_what_the_plan_counts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load for 4 requests of 512 tokens: no more are drafted for, and none beyond those."""
    claimed: list[tuple[int, int]] = []

    def new_cache(decoder: Decoder, num_sequences: int, capacity: int, **how: bool) -> KVCache:
        claimed.append((num_sequences, capacity))
        return plainly_made(decoder, num_sequences, capacity, **how)

    plainly_made = Decoder.new_cache
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "new_cache", new_cache)
        engine = Engine(model, speculation=speculation_by("draft", model))
    assert (4, 512) in claimed
    assert engine.max_tokens == 1024  # the model's context: one request may have the cache of two
    with engine:
        ticket = engine.submit([5] * 500, max_new_tokens=40, ignore_eos=True)
        expected = plainly(model, [5] * 500, max_new_tokens=40, ignore_eos=True)
        assert same(ticket.result(), expected)


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_a_cache_too_small_for_all_changes_no_token(model: Model, method: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 90, "temperature": 0.9, "seed": 3}
    options["ignore_eos"] = True
    with Engine(
        model,
        cache_tokens=4 * BLOCK_TOKENS,
        max_running=4,
        speculation=speculation_by(method, model),
    ) as small:
        tickets = [small.submit(prompt, **options) for prompt in PROMPTS]
        for prompt, ticket in zip(PROMPTS, tickets, strict=True):
            assert same(ticket.result(), plainly(model, prompt, **options))
        stats = small.stats()
    assert stats.preemptions > 0
    assert stats.used_blocks == 0
    assert stats.accepted_tokens > 0


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_shared_blocks_hold_what_was_accepted(model: Model, method: str) -> None:
    with Engine(model, cache_tokens=4096, speculation=speculation_by(method, model)) as engine:
        first = engine.submit(STORY, max_new_tokens=150, ignore_eos=True)
        answer = [event.token_id for event in first.result()]
        turn = [*model.encode(STORY), *answer, *model.encode(" And then")[1:]]
        second = engine.submit(turn, max_new_tokens=20)
        assert same(second.result(), plainly(model, turn, max_new_tokens=20))
        known = (len(model.encode(STORY)) + len(answer) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert second.num_cached_tokens == known


def test_a_grammar_is_kept_beside_requests_without_one(
    model: Model, compiler: GrammarCompiler
) -> None:
    schema = {"type": "object", "properties": {"name": {"enum": ["dog", "cat"]}}}
    specs = [
        GrammarSpec("regex", "(The (dog|cat) saw (a|the) (cat|dog)\\. ){3,5}"),
        GrammarSpec("json_schema", json.dumps(schema | {"required": ["name"]})),
    ]

    def run(speculation: Speculation | None) -> list[list[int]]:
        with Engine(model, cache_tokens=4096, speculation=speculation) as engine:
            tickets: list[Ticket] = [engine.submit(STORY, max_new_tokens=40)]
            for spec in specs:
                sequence = model.sequence(STORY, {"max_new_tokens": 80})
                sequence.grammar = compiler.compile(spec).matcher()
                tickets.append(engine.submit_request(Request(sequence=sequence)))
            return [[event.token_id for event in ticket.result()] for ticket in tickets]

    expected = run(None)
    assert run(Speculation()) == expected
    assert run(Speculation(method="draft", draft=model)) == expected


def test_a_pass_that_fails_is_made_again_without_guesses(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, cache_tokens=4096, speculation=Speculation())
    run, bad = engine._runner.run, model.encode("Lily")

    def faulty(chunks: Sequence[Chunk], scored: Sequence[int | None]) -> StepResult:
        if any(chunk.draft and 0 in (chunk.row.id % 2, len(chunks) % 2) for chunk in chunks):
            raise RuntimeError("a fault of these guesses")
        if any(chunk.row.tokens[: len(bad)] == bad for chunk in chunks):
            raise RuntimeError("a fault of this prompt")
        return run(chunks, scored)

    monkeypatch.setattr(engine._runner, "run", faulty)
    with engine:
        tickets = [engine.submit(prompt, max_new_tokens=30) for prompt in PROMPTS]
        for prompt, ticket in zip(PROMPTS, tickets, strict=True):
            if prompt == "Lily":
                with pytest.raises(hanok.GenerationError, match="a fault of this prompt"):
                    ticket.result()
            else:
                assert same(ticket.result(), plainly(model, prompt, max_new_tokens=30))
    assert engine.stats().used_blocks == 0


def test_scores_that_are_no_numbers_fail_one_request_behind_its_good_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, cache_tokens=4096, speculation=Speculation())
    run, length = engine._runner.run, len(model.encode(STORY)) + 21

    def poisoned(chunks: Sequence[Chunk], scored: Sequence[int | None]) -> StepResult:
        result, row = run(chunks, scored), 0
        for chunk in chunks:
            if not chunk.is_last or result.logits is None:
                continue
            offset = length - len(chunk.row.tokens)
            if chunk.row.id == 2 and 0 <= offset <= len(chunk.draft):
                with torch.inference_mode():
                    result.logits[row + offset, 5] = torch.nan
            row += 1 + len(chunk.draft)
        return result

    monkeypatch.setattr(engine._runner, "run", poisoned)
    with engine:
        tickets = [engine.submit(STORY, max_new_tokens=40, seed=n) for n in range(3)]
        expected = plainly(model, STORY, max_new_tokens=40)
        stream = iter(tickets[1])
        found = [next(stream) for _ in range(21)]
        with pytest.raises(hanok.GenerationError, match=f"token {length} are not finite numbers"):
            next(stream)
        assert same(found, expected[:21])
        for ticket in (tickets[0], tickets[2]):
            assert same(ticket.result(), expected)
    assert engine.stats().used_blocks == 0


def test_a_draft_model_that_fails_takes_nobody_with_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> dict[int, list[int]]:
        raise RuntimeError("no memory")

    engine = Engine(model, cache_tokens=4096, speculation=Speculation(method="draft", draft=model))
    monkeypatch.setattr("hanok.engine.draft.DraftModel.propose", broken)
    with engine:
        found = engine.submit(STORY, max_new_tokens=20).result()
    assert same(found, plainly(model, STORY, max_new_tokens=20))
    assert "speculation failed and is off from now on" in caplog.text


def test_what_is_given_up_or_late_leaves_nothing(model: Model) -> None:
    engine = Engine(model, cache_tokens=2048, speculation=Speculation(method="draft", draft=model))
    tickets = [engine.submit(STORY, max_new_tokens=200, ignore_eos=True) for _ in range(3)]
    for _ in range(12):
        engine.step()
    tickets[0].abort()
    object.__setattr__(tickets[1].request, "deadline", 0.0)
    engine.step()
    with pytest.raises(hanok.RequestAbortedError):
        tickets[0].result()
    with pytest.raises(hanok.DeadlineError):
        tickets[1].result()
    tickets[2].abort()
    engine.step()
    assert engine.stats().used_blocks == 0


def test_a_draft_model_of_another_vocabulary_is_refused(model: Model) -> None:
    other = hanok.load(hanok.BUNDLED)
    other.tokenizer = None
    with pytest.raises(hanok.OptionError, match="has no tokenizer"):
        Engine(model, cache_tokens=512, speculation=Speculation(method="draft", draft=other))


def test_looking_ahead_under_a_grammar_that_cannot_go_back_raises_nothing(
    model: Model, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = model.sequence(STORY, {"max_new_tokens": 40})
    matcher = compiler.compile(GrammarSpec("regex", "(The dog saw a cat\\. ){3,6}")).matcher()
    sequence.grammar = matcher
    asked: list[int] = []

    def rollback(num_tokens: int) -> None:
        asked.append(num_tokens)
        raise GrammarError("the grammar could not be followed any further")

    monkeypatch.setattr(matcher, "rollback", rollback)
    ahead = LookAhead(sequence)
    assert ahead.choose(torch.zeros(model.config.vocab_size)) is not None
    ahead.close()
    assert asked == [1]
