"""Weights that move from the file into memory after the first answer: the same numbers throughout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hanok
from hanok.attention.base import ForwardBatch
from hanok.checkpoint.files import open_checkpoint
from hanok.engine.model import Model
from hanok.memory import load as load_module
from hanok.memory.account import understand
from hanok.memory.budget import Budget, Limit
from hanok.memory.load import Loaded, load_decoder
from hanok.memory.options import LoadOptions
from hanok.memory.planning import describe
from hanok.memory.promote import Promotion
from hanok.models.decoder import Decoder

PROMPT = "Once upon a time"


def leave(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the host have so much memory left."""
    budget = Budget(device="cpu", limits=(Limit(num_bytes=num_bytes, source="the test"),))
    monkeypatch.setattr(load_module, "host_budget", lambda: budget)


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 2**60)


def load_bundled() -> tuple[Loaded, Model]:
    checkpoint = open_checkpoint(hanok.BUNDLED)
    loaded = load_decoder(understand(checkpoint))
    return loaded, Model(checkpoint, loaded, hanok.load(hanok.BUNDLED).tokenizer)


def promotion_of(loaded: Loaded) -> Promotion:
    assert loaded.promotion is not None
    return loaded.promotion


def mapped_ranges() -> list[tuple[int, int]]:
    """Return the address ranges of this process that look into the bundled weights."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if "model.safetensors" in line]
    return [(int(first, 16), int(last, 16)) for first, last in spans]


def num_in_the_file(loaded: Loaded) -> int:
    ranges = mapped_ranges()
    return sum(
        any(first <= parameter.data_ptr() < last for first, last in ranges)
        for parameter in loaded.decoder.parameters()
    )


@pytest.mark.usefixtures("plenty")
def test_logits_are_bit_equal_and_no_parameter_stays_in_the_file() -> None:
    loaded, model = load_bundled()
    ids = model.encode(PROMPT)
    before = model.logits(ids)
    assert num_in_the_file(loaded) > 0
    promotion = promotion_of(loaded)
    pointers = {name: item.data_ptr() for name, item in loaded.decoder.named_parameters()}
    values = {name: item.clone() for name, item in loaded.decoder.named_parameters()}
    promotion.finish()
    assert num_in_the_file(loaded) == 0
    moved = [
        name
        for name, item in loaded.decoder.named_parameters()
        if item.data_ptr() != pointers[name]
    ]
    sizes = {name: item.nbytes for name, item in values.items()}
    assert sum(sizes[name] for name in moved) == loaded.report.mapped_bytes
    for name, item in loaded.decoder.named_parameters():
        assert torch.equal(item, values[name]), name
    assert torch.equal(model.logits(ids), before)


@pytest.mark.usefixtures("plenty")
def test_tied_weights_stay_tied() -> None:
    loaded, _ = load_bundled()
    promotion = promotion_of(loaded)
    promotion.finish()
    head, embedding = loaded.decoder.lm_head.weight, loaded.decoder.embed_tokens.weight
    assert head is embedding
    assert head.data_ptr() == embedding.data_ptr()


@pytest.mark.usefixtures("plenty")
def test_it_begins_with_the_first_answer_and_is_done_once() -> None:
    loaded, model = load_bundled()
    promotion = promotion_of(loaded)
    num_mapped = num_in_the_file(loaded)
    assert num_mapped > 0
    model.generate(PROMPT, max_new_tokens=1)
    assert promotion.is_over  # all of them are smaller than one step
    assert num_in_the_file(loaded) == 0
    pointers = [item.data_ptr() for item in loaded.decoder.parameters()]
    model.generate(PROMPT, max_new_tokens=2)
    promotion.finish()
    assert [item.data_ptr() for item in loaded.decoder.parameters()] == pointers


@pytest.mark.usefixtures("plenty")
def test_tokens_are_the_same_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight moves after each token, so that every token sees another mixture."""
    options = {"max_new_tokens": 30, "ignore_eos": True, "seed": 3, "temperature": 0.8}
    expected = hanok.load(hanok.BUNDLED, weights="mapped").generate(PROMPT, **options)
    loaded, model = load_bundled()
    promotion = promotion_of(loaded)
    monkeypatch.setattr(model, "promote", lambda: promotion.advance(1))
    counts = []
    events = []
    for event in model.stream(PROMPT, **options):
        events.append(event)
        counts.append(num_in_the_file(loaded))
    assert [event.token_id for event in events] == expected.token_ids
    assert [event.logprob for event in events] == expected.logprobs
    assert counts == [max(0, counts[0] - place) for place in range(len(counts))]


def times_half(decoder: Decoder) -> None:
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.5)


def times_half_unseen(decoder: Decoder) -> None:
    for parameter in decoder.parameters():
        parameter.data.mul_(0.5)


def one_norm(decoder: Decoder) -> None:
    with torch.inference_mode():
        decoder.norm.weight.mul_(-1.0)


def halved(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: value * 0.5 for name, value in decoder.state_dict().items()}


def state_dict_copied(decoder: Decoder) -> None:
    decoder.load_state_dict(halved(decoder))


def state_dict_assigned(decoder: Decoder) -> None:
    decoder.load_state_dict(halved(decoder), assign=True)


def other_data(decoder: Decoder) -> None:
    for parameter in decoder.parameters():
        parameter.data = parameter.data * 0.5


def sgd_step(decoder: Decoder) -> None:
    decoder.requires_grad_(True)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.5)
    batch = ForwardBatch.of([list(range(20, 40))])
    logits = decoder.logits(decoder(batch))
    torch.nn.functional.cross_entropy(logits[:-1], batch.token_ids[1:]).backward()
    optimizer.step()


UPDATES = [
    times_half,
    times_half_unseen,
    one_norm,
    state_dict_copied,
    state_dict_assigned,
    other_data,
    sgd_step,
]


@pytest.mark.usefixtures("plenty")
@pytest.mark.parametrize("num_moved", [0, 3, None])
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_an_update_is_never_overwritten(
    update: Callable[[Decoder], None], num_moved: int | None
) -> None:
    """Before the first answer, while weights move, and after all of them have moved."""
    loaded, model = load_bundled()
    promotion = promotion_of(loaded)
    if num_moved is None:
        promotion.finish()
    for _ in range(num_moved or 0):
        promotion.advance(1)
    other = hanok.load(hanok.BUNDLED, weights="copied")
    update(model.decoder)
    update(other.decoder)
    expected = {name: item.clone() for name, item in other.decoder.named_parameters()}
    for _ in range(2):
        found = model.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
        wanted = other.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
        assert (found.token_ids, found.logprobs) == (wanted.token_ids, wanted.logprobs)
        for name, item in model.decoder.named_parameters():
            assert torch.equal(item, expected[name]), name
    assert promotion.is_over


@pytest.mark.usefixtures("plenty")
def test_what_another_name_shows_is_kept_as_well() -> None:
    """Releasing a page of the file would put its bytes back under whoever looks at it."""
    loaded, model = load_bundled()
    times_half(model.decoder)
    shown = model.decoder.state_dict()
    expected = {name: value.clone() for name, value in shown.items()}
    model.generate(PROMPT, max_new_tokens=2)
    assert all(torch.equal(value, expected[name]) for name, value in shown.items())
    assert promotion_of(loaded).is_over


@pytest.mark.usefixtures("plenty")
def test_parameters_that_training_replaced_are_left_alone() -> None:
    """As FSDP does: what the module holds from then on is another parameter."""
    loaded, model = load_bundled()
    norm = loaded.decoder.norm
    norm.register_parameter("weight", torch.nn.Parameter(-norm.weight, requires_grad=False))
    expected = norm.weight.clone()
    model.generate(PROMPT, max_new_tokens=2)
    assert torch.equal(norm.weight, expected)
    assert promotion_of(loaded).is_over
    assert num_in_the_file(loaded) > 0


@pytest.mark.parametrize(("extra", "moves"), [(0, False), (1, True)])
def test_it_happens_only_where_twice_the_bytes_are_available(
    monkeypatch: pytest.MonkeyPatch, extra: int, moves: bool
) -> None:
    mapped_bytes = load_decoder(describe(hanok.BUNDLED)).report.mapped_bytes
    leave(monkeypatch, 2 * mapped_bytes + extra)
    loaded, model = load_bundled()
    assert (loaded.promotion is not None) is moves
    assert loaded.report.mapped_bytes == mapped_bytes
    assert model.generate(PROMPT, max_new_tokens=2).token_ids


@pytest.mark.usefixtures("plenty")
@pytest.mark.parametrize("weights", ["mapped", "copied"])
def test_it_does_not_happen_where_the_user_decided(weights: str) -> None:
    assert load_decoder(describe(hanok.BUNDLED), LoadOptions(weights=weights)).promotion is None  # type: ignore[arg-type]


@pytest.mark.usefixtures("plenty")
def test_nothing_moves_once_training_may_begin() -> None:
    loaded, model = load_bundled()
    pointers = [item.data_ptr() for item in loaded.decoder.parameters()]
    loaded.decoder.layers[1].requires_grad_(True)
    model.generate(PROMPT, max_new_tokens=2)
    assert [item.data_ptr() for item in loaded.decoder.parameters()] == pointers
