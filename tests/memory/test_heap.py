"""Freed memory goes back to the system, and long prompts give theirs back."""

import platform

import pytest
import torch

import hanok
from hanok.engine import passes
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


@pytest.mark.parametrize(("length", "gives"), [(300, True), (20, False)])
def test_long_prompts_return_their_memory(
    monkeypatch: pytest.MonkeyPatch, length: int, gives: bool
) -> None:
    called: list[None] = []
    monkeypatch.setattr(passes, "trim_heap", lambda: called.append(None))
    model = hanok.load(hanok.BUNDLED)
    model.generate([5 + n % 99 for n in range(length)], max_new_tokens=3)
    assert bool(called) is gives
