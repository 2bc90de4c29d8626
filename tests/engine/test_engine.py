"""Many requests at a time give what each gives alone, and what goes wrong with one stays with it."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import hanok
from hanok.engine.engine import Engine
from hanok.engine.grammar import GrammarCompiler
from hanok.engine.grammar_spec import GrammarSpec
from hanok.engine.model import Model
from hanok.engine.runner import BLOCK_TOKENS, StepResult
from hanok.engine.schedule import Chunk
from hanok.engine.ticket import Request, Ticket

STORY = (
    "One day, Tom and his friend went to the big park and saw a dog. The dog was very happy. Tom said "
    "to the dog that it was a good dog, and his friend gave it a ball. The dog ran and ran with the "
    "ball, and Tom laughed. Then the sun went down, and they all went home to eat with their mom."
)
PROMPTS = ["Once upon a time", "The dog", STORY, STORY + " The next day", "Lily"]
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def model() -> Model:
    """The bundled model in float32, where rounding does not decide between tokens."""
    return hanok.load(hanok.BUNDLED, dtype="float32", context=512, batch=4)


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, cache_tokens=4096) as found:
        yield found


def ids(ticket: Ticket) -> list[int]:
    return [event.token_id for event in ticket.result()]


def test_requests_together_give_the_tokens_of_each_alone(model: Model, engine: Engine) -> None:
    tickets = [engine.submit(prompt, max_new_tokens=24) for prompt in PROMPTS]
    for prompt, ticket in zip(PROMPTS, tickets, strict=True):
        alone = model.generate(prompt, max_new_tokens=24)
        events = ticket.result()
        assert [event.token_id for event in events] == alone.token_ids
        assert "".join(event.text for event in events) == alone.text
        assert [e.logprob for e in events] == pytest.approx(alone.logprobs, abs=1e-4)
        assert events[-1].finish_reason == alone.finish_reason


def test_a_seed_gives_the_same_text_alone_and_among_sixteen(model: Model, engine: Engine) -> None:
    options = {"temperature": 1.1, "top_p": 0.95, "max_new_tokens": 16}
    alone = [
        model.generate("Lily", seed=seed, **options).token_ids  # type: ignore[call-overload]
        for seed in range(16)
    ]
    tickets = [engine.submit("Lily", seed=seed, **options) for seed in range(16)]  # type: ignore[arg-type]
    assert [ids(ticket) for ticket in tickets] == alone
    assert len({tuple(item) for item in alone}) > 8


def test_a_cache_too_small_for_all_changes_no_token(model: Model) -> None:
    with Engine(model, cache_tokens=4 * BLOCK_TOKENS, max_running=4) as small:
        tickets = [
            small.submit(p, max_new_tokens=90, temperature=1.0, seed=3, ignore_eos=True)
            for p in PROMPTS
        ]
        found = [ids(ticket) for ticket in tickets]
        stats = small.stats()
    expected = [
        model.generate(p, max_new_tokens=90, temperature=1.0, seed=3, ignore_eos=True).token_ids
        for p in PROMPTS
    ]
    assert stats.preemptions > 0
    assert stats.used_blocks == 0
    assert found == expected


def test_what_was_computed_before_is_found_and_gives_the_same(model: Model, engine: Engine) -> None:
    first = engine.submit(STORY, max_new_tokens=70, ignore_eos=True)
    tokens = ids(first)
    assert first.num_cached_tokens == 0
    again = engine.submit(STORY, max_new_tokens=70, ignore_eos=True)
    assert ids(again) == tokens
    assert again.num_cached_tokens == len(model.encode(STORY)) // BLOCK_TOKENS * BLOCK_TOKENS > 0
    # The next turn of a conversation finds the answer too.
    turn = [*model.encode(STORY), *tokens, *model.encode(" And then")[1:]]
    second = engine.submit(turn, max_new_tokens=8)
    assert ids(second) == model.generate(turn, max_new_tokens=8).token_ids
    known = (len(model.encode(STORY)) + len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert second.num_cached_tokens == known
    salted = Request(sequence=model.sequence(turn, {"max_new_tokens": 8}), salt="other")
    stranger = engine.submit_request(salted)
    assert ids(stranger) == ids(second)
    assert stranger.num_cached_tokens == 0


def test_a_prompt_is_scored_as_the_model_scores_it(model: Model, engine: Engine) -> None:
    engine.submit(STORY, max_new_tokens=1).result()
    request = Request(sequence=model.sequence(STORY, {"max_new_tokens": 2}), scored=2)
    ticket = engine.submit_request(request)
    ticket.result()
    expected = model.score(STORY)
    assert [s.token_id for s in ticket.prompt_scores] == expected.token_ids[1:]
    found = [score.logprob for score in ticket.prompt_scores]
    assert found == pytest.approx(expected.logprobs[1:], abs=1e-4)
    assert all(len(score.top_logprobs) == 2 for score in ticket.prompt_scores)


def test_what_is_given_up_ends_wherever_it_is(model: Model) -> None:
    engine = Engine(model, cache_tokens=512, max_running=1)
    running = engine.submit("Lily", max_new_tokens=400, ignore_eos=True)
    waiting = engine.submit("Tom", max_new_tokens=400, ignore_eos=True)
    for _ in range(3):
        engine.step()
    assert engine.stats().num_running == 1
    for ticket in (running, waiting):
        ticket.abort()
        ticket.abort()
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.used_blocks) == (0, 0, 0)
    assert stats.cancelled == 2
    assert stats.generated_tokens == 3
    for ticket in (running, waiting):
        with pytest.raises(hanok.RequestAbortedError):
            ticket.result()


def test_a_request_given_up_while_a_step_computes_gets_that_steps_token_and_no_more(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, cache_tokens=512)
    ticket = engine.submit("Lily", max_new_tokens=400, ignore_eos=True)
    engine.step()
    assert engine.stats().most_tokens_after_abort == 0
    run = engine._runner.run

    def give_up_meanwhile(*arguments: Any) -> Any:
        ticket.abort()
        return run(*arguments)

    monkeypatch.setattr(engine._runner, "run", give_up_meanwhile)
    engine.step()
    engine.step()
    assert ticket.num_tokens_after_abort == 1
    assert engine.stats().most_tokens_after_abort == 1
    assert engine.stats().generated_tokens == 2


def test_a_deadline_ends_a_request_in_the_queue_and_under_way(model: Model) -> None:
    engine = Engine(model, cache_tokens=512, max_running=1)
    options = {"max_new_tokens": 100, "ignore_eos": True}
    sequences = [model.sequence(name, options) for name in ("Lily", "Tom")]  # type: ignore[arg-type]
    later = time.monotonic() + 1e6
    first = engine.submit_request(Request(sequence=sequences[0], deadline=later))
    second = engine.submit_request(Request(sequence=sequences[1], deadline=0.0))
    engine.step()
    with pytest.raises(hanok.DeadlineError, match="not finished within"):
        second.result()
    object.__setattr__(first.request, "deadline", 0.0)
    engine.step()
    with pytest.raises(hanok.DeadlineError):
        first.result()
    assert engine.stats().used_blocks == 0


@pytest.mark.parametrize(
    ("deadline", "asked_at", "words"), [(-5.0, None, "0 s"), (-5.0, -7.5, "2.5 s")]
)
def test_a_deadlines_text_has_the_time_that_was_given(
    model: Model, deadline: float, asked_at: float | None, words: str
) -> None:
    """Also where it was over before the request was submitted."""
    engine = Engine(model, cache_tokens=512, max_running=1)
    request = Request(sequence=model.sequence("Tom", {}), deadline=deadline, asked_at=asked_at)
    ticket = engine.submit_request(request)
    engine.step()
    with pytest.raises(hanok.DeadlineError, match=rf"^not finished within {words}\.$"):
        ticket.result()


def test_an_exception_in_a_pass_fails_one_request(
    model: Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine._runner.run
    bad = model.encode("The dog")

    def faulty(chunks: Sequence[Chunk], scored: Sequence[int | None]) -> StepResult:
        if any(chunk.row.tokens[: len(bad)] == bad for chunk in chunks):
            raise RuntimeError("a fault of this prompt")
        return run(chunks, scored)

    monkeypatch.setattr(engine._runner, "run", faulty)
    tickets = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS]
    for prompt, ticket in zip(PROMPTS, tickets, strict=True):
        if prompt == "The dog":
            with pytest.raises(hanok.GenerationError, match="a fault of this prompt"):
                ticket.result()
        else:
            assert ids(ticket) == model.generate(prompt, max_new_tokens=12).token_ids
    assert engine.stats().used_blocks == 0


def test_scores_that_are_no_numbers_fail_one_request(
    model: Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine._runner.run

    def poisoned(chunks: Sequence[Chunk], scored: Sequence[int | None]) -> StepResult:
        result = run(chunks, scored)
        last = [chunk for chunk in chunks if chunk.is_last]
        for index, chunk in enumerate(last):
            if chunk.row.id == 2 and len(chunk.row.tokens) > 6 and result.logits is not None:
                with torch.inference_mode():
                    result.logits[index, 5] = torch.nan
        return result

    monkeypatch.setattr(engine._runner, "run", poisoned)
    tickets = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS[:3]]
    with pytest.raises(hanok.GenerationError, match="not finite numbers"):
        tickets[1].result()
    for index in (0, 2):
        assert ids(tickets[index]) == model.generate(PROMPTS[index], max_new_tokens=12).token_ids


def test_a_grammar_is_kept_beside_requests_without_one(model: Model, engine: Engine) -> None:
    if model.tokenizer is None:
        raise AssertionError("the bundled model has a tokenizer")
    compiler = GrammarCompiler(model.tokenizer, model.config.vocab_size, model.end_ids)
    grammar = compiler.compile(GrammarSpec("regex", "(yes|no), [a-c]{3}"))
    sequence = model.sequence("Is it?", {"max_new_tokens": 20, "temperature": 1.0, "seed": 1})
    sequence.grammar = grammar.matcher()
    bound = engine.submit_request(Request(sequence=sequence))
    free = engine.submit("Once upon a time", max_new_tokens=12)
    text = "".join(event.text for event in bound.result())
    assert text.partition(", ")[0] in ("yes", "no")
    assert set(text.partition(", ")[2]) <= set("abc")
    assert ids(free) == model.generate("Once upon a time", max_new_tokens=12).token_ids


def test_fewest_tokens_and_stops_that_stay(model: Model, engine: Engine) -> None:
    plain = model.generate(STORY, max_new_tokens=60)
    stop = plain.text[5:9]
    cut = model.generate(STORY, max_new_tokens=60, stop=[stop])
    kept = "".join(
        e.text for e in engine.submit(STORY, max_new_tokens=60, stop=[stop], include_stop=True)
    )
    assert kept == cut.text + stop
    assert plain.text.startswith(kept)
    end = next(iter(model.end_ids))
    early = engine.submit("Lily", max_new_tokens=9, logit_bias={end: 1000.0}).result()
    late = engine.submit(
        "Lily", max_new_tokens=9, logit_bias={end: 1000.0}, min_new_tokens=4
    ).result()
    assert ([e.token_id for e in early], len(late)) == ([end], 5)
    assert end not in [event.token_id for event in late[:4]]


def test_a_watermark_prefers_the_same_tokens_each_time(model: Model, engine: Engine) -> None:
    marked = engine.submit("Once upon a time", max_new_tokens=12, watermark_delta=50.0)
    plain = engine.submit("Once upon a time", max_new_tokens=12)
    tokens = ids(marked)
    assert tokens != ids(plain)
    before = [model.encode("Once upon a time")[-1], *tokens]
    for last, token in zip(before, tokens, strict=False):
        generator = torch.Generator().manual_seed(15485863 * last)
        green = torch.randperm(model.config.vocab_size, generator=generator)
        assert token in green[: model.config.vocab_size // 2]


def test_an_event_loop_reads_many_at_a_time(model: Model, engine: Engine) -> None:
    async def one(prompt: str) -> list[int]:
        return [e.token_id async for e in engine.submit(prompt, max_new_tokens=10)]

    async def every() -> list[list[int]]:
        return list(await asyncio.gather(*map(one, PROMPTS)))

    expected = [model.generate(p, max_new_tokens=10).token_ids for p in PROMPTS]
    assert asyncio.run(every()) == expected


def test_an_engine_that_closes_fails_what_is_left_and_takes_nothing(model: Model) -> None:
    engine = Engine(model, cache_tokens=2048)
    ticket = engine.submit("Lily", max_new_tokens=5)
    engine.close()
    with pytest.raises(hanok.ClosedError, match="before the request was finished"):
        ticket.result()
    with pytest.raises(hanok.ClosedError, match="takes no more"):
        engine.submit("Lily")


def test_draining_finishes_what_is_there(model: Model) -> None:
    with Engine(model, cache_tokens=2048) as engine:
        tickets = [engine.submit(p, max_new_tokens=30, ignore_eos=True) for p in PROMPTS]
        assert engine.drain(TIMEOUT_S)
        assert all(len(ticket.result()) == 30 for ticket in tickets)
        with pytest.raises(hanok.ClosedError):
            engine.submit("Lily")
    assert not [t for t in threading.enumerate() if t.name == "hanok-engine"]


def test_a_step_that_hangs_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanok.engine.engine.STALL_S", 0.0)
    monkeypatch.setattr("hanok.engine.engine.STALL_FACTOR", 0.0)
    engine, inside, release = Engine(model, cache_tokens=512), threading.Event(), threading.Event()
    run = engine._runner.run

    def hanging(chunks: Sequence[Chunk], scored: Sequence[int | None]) -> StepResult:
        if chunks[0].start:
            inside.set()
            release.wait(TIMEOUT_S)
        return run(chunks, scored)

    monkeypatch.setattr(engine._runner, "run", hanging)
    with engine:
        ticket = engine.submit("Lily", max_new_tokens=3)
        assert inside.wait(TIMEOUT_S)
        assert engine.is_stuck
        release.set()
        ticket.result()
    assert not engine.is_stuck


def test_what_cannot_fit_is_refused_at_once(model: Model) -> None:
    engine = Engine(model, cache_tokens=BLOCK_TOKENS)
    with pytest.raises(hanok.RequestError, match="the engine holds 64 of one request"):
        engine.submit(STORY)
    with pytest.raises(hanok.OptionError, match="at least 64 tokens and one request"):
        Engine(model, cache_tokens=1)


def test_an_engine_that_nobody_closed_ends_with_the_program() -> None:
    """Behind the pass it is in: Python would end its thread in the middle of one."""
    code = """
import atexit
import hanok
engine = hanok.Engine(hanok.load(hanok.BUNDLED), cache_tokens=2048)
# What is registered first runs last.
atexit.register(lambda: print(engine._thread.is_alive()))
engine.start()
ticket = engine.submit([5, 6, 7], max_new_tokens=900, ignore_eos=True)
next(iter(ticket))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"
