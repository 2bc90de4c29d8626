"""Weights that move from the file into memory behind the first answer: the same numbers throughout."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import hanok
from hanok.checkpoint.files import open_checkpoint
from hanok.engine.model import Model
from hanok.memory import load as load_module
from hanok.memory import promote
from hanok.memory.budget import Budget, Limit
from hanok.memory.load import Loaded, load_decoder
from hanok.memory.promote import Promotion

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
    loaded = load_decoder(checkpoint)
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
    promotion.start()
    promotion.wait()
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
    promotion.start()
    promotion.wait()
    head, embedding = loaded.decoder.lm_head.weight, loaded.decoder.embed_tokens.weight
    assert head is embedding
    assert head.data_ptr() == embedding.data_ptr()


@pytest.mark.usefixtures("plenty")
def test_it_begins_with_the_first_answer_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    original = Promotion._run

    def counted(self: Promotion) -> None:
        runs.append(threading.current_thread().name)
        original(self)

    monkeypatch.setattr(Promotion, "_run", counted)
    loaded, model = load_bundled()
    promotion = promotion_of(loaded)
    promotion.wait()
    assert runs == []
    model.generate(PROMPT, max_new_tokens=1)
    promotion.wait()
    assert runs == ["hanok-promotion"]
    pointers = [item.data_ptr() for item in loaded.decoder.parameters()]
    model.generate(PROMPT, max_new_tokens=2)
    promotion.start()
    promotion.wait()
    assert runs == ["hanok-promotion"]
    assert [item.data_ptr() for item in loaded.decoder.parameters()] == pointers


@pytest.mark.usefixtures("plenty")
def test_tokens_are_the_same_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight moves after each token, so that every token sees another mixture."""
    options = {"max_new_tokens": 30, "ignore_eos": True, "seed": 3, "temperature": 0.8}
    expected = hanok.load(hanok.BUNDLED, weights="mapped").generate(PROMPT, **options)
    steps = threading.Semaphore(0)
    original = promote.read_run

    def paced(*args: object) -> None:
        assert steps.acquire(timeout=60)
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(promote, "read_run", paced)
    loaded, model = load_bundled()
    counts = []
    events = []
    for event in model.stream(PROMPT, **options):
        events.append(event)
        counts.append(num_in_the_file(loaded))
        steps.release()
    steps.release(100)
    promotion_of(loaded).wait()
    assert [event.token_id for event in events] == expected.token_ids
    assert [event.logprob for event in events] == expected.logprobs
    assert counts[0] > counts[-1]
    assert num_in_the_file(loaded) == 0


@pytest.mark.parametrize(("extra", "moves"), [(0, False), (1, True)])
def test_it_happens_only_where_twice_the_bytes_are_available(
    monkeypatch: pytest.MonkeyPatch, extra: int, moves: bool
) -> None:
    mapped_bytes = load_decoder(open_checkpoint(hanok.BUNDLED)).report.mapped_bytes
    leave(monkeypatch, 2 * mapped_bytes + extra)
    loaded, model = load_bundled()
    assert (loaded.promotion is not None) is moves
    assert loaded.report.mapped_bytes == mapped_bytes
    assert model.generate(PROMPT, max_new_tokens=2).token_ids


@pytest.mark.usefixtures("plenty")
@pytest.mark.parametrize("weights", ["mapped", "copied"])
def test_it_does_not_happen_where_the_user_decided(weights: str) -> None:
    assert load_decoder(open_checkpoint(hanok.BUNDLED), weights=weights).promotion is None  # type: ignore[arg-type]


def test_it_ends_with_the_program() -> None:
    """Behind the weight it is at: Python would end the thread in the middle of torch's copying."""
    code = """
import subprocess
import sys
import threading
import types
import hanok
from hanok.memory import promote
began, is_over = threading.Event(), threading.Event()
promote.threading = types.SimpleNamespace(
    Thread=threading.Thread, current_thread=threading.current_thread, Event=lambda: is_over
)
def read_run(ref, copy):
    began.set()
    is_over.wait()
    print("moved one", flush=True)
promote.read_run = read_run
model = hanok.load(hanok.BUNDLED)
model.generate([5], max_new_tokens=2)
began.wait()
print("the end", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split("\n") == ["the end", "moved one", ""]
