"""Peak memory of a call, against calls whose memory is known."""

from pathlib import Path

import pytest
import torch

from hanok.bench import growth
from hanok.bench.growth import peak_growth_bytes

CPU = torch.device("cpu")
MIB = 2**20
# Pages of the interpreter itself, and of the C library's bookkeeping.
NOISE = MIB

linux = pytest.mark.skipif(not growth.RESET.exists(), reason="no /proc/self/clear_refs")


@linux
@pytest.mark.parametrize("size", [4 * MIB, 64 * MIB])
def test_what_is_freed_before_the_end_counts(size: int) -> None:
    def call() -> None:
        first = torch.ones(size, dtype=torch.uint8)
        del first
        torch.ones(size // 2, dtype=torch.uint8)

    call()  # what the C library would keep of this is given back
    # It may put the second block beside a first one that it keeps, and does so with small ones.
    assert size - NOISE < (peak_growth_bytes(call, CPU) or 0) < size * 3 // 2 + NOISE


@linux
def test_two_blocks_at_a_time_are_both_counted() -> None:
    def call() -> None:
        blocks = [torch.ones(64 * MIB, dtype=torch.uint8) for _ in range(2)]
        del blocks

    call()
    assert abs((peak_growth_bytes(call, CPU) or 0) - 128 * MIB) < NOISE


@linux
def test_an_earlier_peak_does_not_count() -> None:
    torch.ones(64 * MIB, dtype=torch.uint8)
    assert (peak_growth_bytes(lambda: None, CPU) or 0) < NOISE


@linux
def test_memory_that_was_there_does_not_count() -> None:
    there = torch.ones(32 * MIB, dtype=torch.uint8)
    assert (peak_growth_bytes(lambda: there.add_(1), CPU) or 0) < NOISE


def test_where_the_system_does_not_tell_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(growth, "RESET", tmp_path / "nowhere" / "clear_refs")
    assert peak_growth_bytes(lambda: pytest.fail("called"), CPU) is None
