"""Freed memory goes back to the system, and long prompts give theirs back."""

import platform

import pytest
import torch

import hanok
from hanok.engine import embed, passes, runner
from hanok.engine.engine import Engine
from hanok.memory import load
from hanok.memory.heap import trim_heap
from hanok.memory.watch import claimed_bytes

BLOCK_BYTES, NUM_BLOCKS = 2**16, 2000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own way")
def test_what_was_freed_is_given_back() -> None:
    before = claimed_bytes()
    blocks = [torch.ones(BLOCK_BYTES // 4) for _ in range(NUM_BLOCKS)]
    kept = blocks[-1]  # keeps the heap from shrinking by itself
    held = claimed_bytes() - before
    del blocks
    trim_heap()
    assert held > 0.8 * BLOCK_BYTES * NUM_BLOCKS
    assert claimed_bytes() - before < 0.2 * held
    assert kept.sum() == BLOCK_BYTES // 4


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that returned memory, in order."""
    called: list[str] = []
    for module in (passes, runner, embed, load):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "trim_heap", lambda name=name: called.append(name))
    return called


@pytest.mark.parametrize(("length", "gives"), [(300, True), (20, False)])
def test_long_prompts_return_their_memory(trims: list[str], length: int, gives: bool) -> None:
    model = hanok.load(hanok.BUNDLED)
    assert trims == ["load"]
    prompt = [5 + n % 99 for n in range(length)]
    trims.clear()
    model.generate(prompt, max_new_tokens=3)
    assert ("passes" in trims) is gives
    trims.clear()
    with Engine(model, cache_tokens=512) as engine:
        list(engine.submit(prompt, max_new_tokens=3).result())
    assert ("runner" in trims) is gives


def test_embedding_returns_the_memory_of_each_pass(
    trims: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 1,000 tokens in chunks of 300: four passes, and once more at the end."""
    model = hanok.load(hanok.BUNDLED)
    for module in (embed, passes):
        monkeypatch.setattr(module, "PREFILL_TOKENS", 300)
    for length, expected in ((3, 1), (1000, 5)):
        trims.clear()
        model.embed([[5 + n % 99 for n in range(length)]], pooling="mean")
        assert trims == ["embed"] * expected
