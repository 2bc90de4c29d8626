"""Weights that change while a decoder is in use: every token is that of the weights there are.

The oracle is another model with the same change, which has never seen the text.
"""

import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import hanok
from hanok.attention.base import ForwardBatch
from hanok.engine.draft import DraftModel
from hanok.engine.engine import Engine
from hanok.engine.generate import PrefixCache
from hanok.engine.model import Model
from hanok.engine.passes import Passes, WeightVersion
from hanok.engine.runner import BLOCK_TOKENS
from hanok.engine.ticket import Request
from hanok.models.decoder import Decoder

PROMPT = [20 + place % 200 for place in range(3 * BLOCK_TOKENS + 8)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


def loaded() -> Model:
    return hanok.load(hanok.BUNDLED, dtype="float32", context=512, batch=2)


def sgd_step(decoder: Decoder) -> None:
    decoder.requires_grad_(True)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.2)
    batch = ForwardBatch.of([PROMPT[:40]])
    logits = decoder.logits(decoder(batch))
    torch.nn.functional.cross_entropy(logits[:-1], batch.token_ids[1:]).backward()
    optimizer.step()
    decoder.requires_grad_(False)


def state_dict(decoder: Decoder) -> None:
    decoder.load_state_dict({name: 0.7 * value for name, value in decoder.state_dict().items()})


def new_parameters(decoder: Decoder) -> None:
    values = {name: 0.7 * value for name, value in decoder.state_dict().items()}
    decoder.load_state_dict(values, assign=True)


def unseen(decoder: Decoder) -> None:
    for parameter in decoder.parameters():
        parameter.data.mul_(0.7)
    decoder.weights_changed()


CHANGES = [sgd_step, state_dict, new_parameters, unseen]
with_each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda item: item.__name__)


def following(change: Callable[[Decoder], None], tokens: list[int], number: int) -> list[float]:
    """Return the logprobs of the tokens that a model which only knows the new weights adds."""
    other = loaded()
    change(other.decoder)
    found = other.generate(tokens, **OPTIONS | {"max_new_tokens": number})
    return found.logprobs


@with_each_change
def test_an_engine_answers_a_prompt_that_it_knows_with_the_new_weights(
    change: Callable[[Decoder], None],
) -> None:
    model = loaded()
    with Engine(model, cache_tokens=1024) as engine:
        before = engine.submit(PROMPT, **OPTIONS)
        first = [event.logprob for event in before.result()]
        known = engine.submit(PROMPT, **OPTIONS)
        assert [event.logprob for event in known.result()] == pytest.approx(first, abs=1e-4)
        assert known.num_cached_tokens == 3 * BLOCK_TOKENS
        change(model.decoder)
        after = engine.submit(PROMPT, **OPTIONS)
        found = [event.logprob for event in after.result()]
        assert after.num_cached_tokens == 0
        assert engine.submit(PROMPT, **OPTIONS).result()[-1].logprob == pytest.approx(found[-1])
    assert found == pytest.approx(following(change, PROMPT, 8), abs=1e-4)
    assert found != pytest.approx(first, abs=1e-3)


@with_each_change
def test_what_runs_in_an_engine_goes_on_with_the_new_weights(
    change: Callable[[Decoder], None],
) -> None:
    model = loaded()
    engine = Engine(model, cache_tokens=1024)
    tickets = [engine.submit(PROMPT[start:], **OPTIONS) for start in (0, 5)]
    while len(tickets[1].request.sequence.generated_ids) < 4:
        engine.step()
    known = [[*ticket.request.sequence.token_ids] for ticket in tickets]
    change(model.decoder)
    while engine.step():
        pass
    engine.close()
    for ticket, tokens in zip(tickets, known, strict=True):
        left = len(ticket.result()) - (len(tokens) - len(ticket.request.sequence.prompt_ids))
        found = [event.logprob for event in ticket.result()[-left:]]
        assert left >= 3
        assert found == pytest.approx(following(change, tokens, left), abs=1e-4)


def test_a_prompt_that_is_computed_again_is_scored_once() -> None:
    model = loaded()
    engine = Engine(model, cache_tokens=1024)
    sequence = model.sequence(PROMPT, OPTIONS)
    ticket = engine.submit_request(Request(sequence=sequence, scored=1))
    while len(sequence.generated_ids) < 3:
        engine.step()
    engine.weights_changed()
    while engine.step():
        pass
    engine.close()
    assert [score.token_id for score in ticket.prompt_scores] == PROMPT[1:]
    found = [score.logprob for score in ticket.prompt_scores]
    assert found == pytest.approx(model.score(PROMPT).logprobs[1:], abs=1e-4)


@with_each_change
def test_a_stream_and_a_conversation_go_on_with_the_new_weights(
    change: Callable[[Decoder], None],
) -> None:
    model, cache = loaded(), PrefixCache()
    stream = model.stream(PROMPT, cache=cache, **OPTIONS)
    events = [next(stream) for _ in range(4)]
    tokens = [*PROMPT, *(event.token_id for event in events)]
    change(model.decoder)
    events = list(stream)
    assert [item.logprob for item in events] == pytest.approx(
        following(change, tokens, 4), abs=1e-4
    )
    turn = [*tokens, *(event.token_id for event in events), 44, 45]
    found = [event.logprob for event in model.stream(turn, cache=cache, **OPTIONS)]
    assert found == pytest.approx(following(change, turn, 8), abs=1e-4)


def test_a_conversation_computes_what_is_new_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = loaded(), PrefixCache()
    first = [event.token_id for event in model.stream(PROMPT, cache=cache, **OPTIONS)]
    computed: list[int] = []
    forward = Decoder.forward

    def counted(decoder: Decoder, batch: ForwardBatch, *rest: Any) -> torch.Tensor:
        computed.append(len(batch.token_ids))
        return forward(decoder, batch, *rest)

    monkeypatch.setattr(Decoder, "forward", counted)
    list(model.stream([*PROMPT, *first, 44, 45], cache=cache, **OPTIONS))
    assert computed[0] == 3  # the last token of the answer and the two that are new


@with_each_change
@torch.inference_mode()
def test_a_draft_model_guesses_with_its_new_weights(change: Callable[[Decoder], None]) -> None:
    model = loaded()
    how: dict[str, Any] = {"num_slots": 1, "max_tokens": 400, "vocab_size": model.config.vocab_size}
    drafter = DraftModel(model.decoder, **how)
    sequence = model.sequence(PROMPT, OPTIONS)
    drafter.catch_up({1: sequence})
    old = drafter.propose({1: sequence}, {1: 8})
    with torch.inference_mode(mode=False), torch.enable_grad():
        change(model.decoder)
    drafter.catch_up({1: sequence})
    found = drafter.propose({1: sequence}, {1: 8})
    fresh = DraftModel(model.decoder, **how)
    fresh.catch_up({1: sequence})
    assert found == fresh.propose({1: sequence}, {1: 8})
    assert found != old
    for mine, others in zip(drafter._cache.states, fresh._cache.states, strict=True):
        length = len(PROMPT)
        torch.testing.assert_close(mine.keys[:, :, :length], others.keys[:, :, :length])


def test_the_version_of_weights_grows_with_a_change_and_not_with_a_move() -> None:
    model = loaded()
    version = WeightVersion(model.decoder)
    first = version.number()
    model.generate(PROMPT, max_new_tokens=2)  # mapped weights move into memory
    assert version.number() == first
    for number, change in enumerate(CHANGES, start=1):
        change(model.decoder)
        assert version.number() == first + number
        assert version.number() == first + number


def test_hooks_are_called_in_every_pass() -> None:
    """So no pass is recorded: what replays one would not call them."""
    model = loaded()
    calls: list[int] = []
    model.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert Passes(model.decoder, model.decoder.new_cache(1, 8)).recorded is None
    model.generate(PROMPT, **OPTIONS)
    assert len(calls) == 8
    with Engine(model, cache_tokens=1024) as engine:
        engine.submit(PROMPT, **OPTIONS).result()
    assert len(calls) == 16


def generate_sharded(rank: int, port: int, expected: tuple[list[int], list[float]]) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = loaded()
    for block in model.decoder.layers:
        fully_shard(block)
    fully_shard(model.decoder)
    try:
        for _ in range(2):
            found = model.generate(PROMPT, **OPTIONS)
            assert found.token_ids == expected[0]
            assert found.logprobs == pytest.approx(expected[1], abs=1e-4)
        engine = Engine(model, cache_tokens=1024)
        ticket = engine.submit(PROMPT, **OPTIONS)
        while not ticket.is_finished:
            engine.step()
        engine.close()
        assert [event.token_id for event in ticket.result()] == expected[0]
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback")
def test_a_sharded_decoder_generates_and_serves_the_same_tokens() -> None:
    """Two processes with half of each parameter."""
    found = loaded().generate(PROMPT, **OPTIONS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(generate_sharded, (port, (found.token_ids, found.logprobs)), nprocs=2)
