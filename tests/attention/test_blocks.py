"""A sequence in several blocks of the cache is answered as one in a single block, bit for bit."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.attention.base import AttentionSpec, ForwardBatch, backends
from hanok.attention.cache import KVCache, LayerState
from hanok.attention.state import KeysAndValues

CPU = torch.device("cpu")
BLOCK = 64
NAMES = ("native", "sdpa", "eager")


def a_state(spec: AttentionSpec, num_blocks: int, capacity: int, dtype: torch.dtype) -> LayerState:
    layer = KeysAndValues(num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
    cache = KVCache(
        [layer], num_sequences=num_blocks, capacity=capacity, dtype=dtype, devices=[CPU]
    )
    for part in (cache.states[0].keys, cache.states[0].values):
        part.fill_(99)  # what nobody wrote would be seen
    return cache.states[0]


def attend_in_turn(
    name: str,
    spec: AttentionSpec,
    state: LayerState,
    blocks: list[tuple[int, ...]],
    lengths: list[int],
    cuts: list[int],
) -> Tensor:
    """Attend over sequences of some lengths, each cut once, and return the second parts' outputs."""
    outputs = []
    for is_second in (False, True):
        counts = [n - c if is_second else c for n, c in zip(lengths, cuts, strict=True)]
        parts = []
        for index, (length, cut) in enumerate(zip(lengths, cuts, strict=True)):
            drawn = torch.Generator().manual_seed(index)
            heads = spec.num_heads + 2 * spec.num_kv_heads
            whole = torch.randn(length, heads, spec.head_dim, generator=drawn)
            parts.append(whole[cut:] if is_second else whole[:cut])
        packed = torch.cat(parts)
        batch = ForwardBatch.of(
            [[0] * count for count in counts], past=cuts if is_second else None, blocks=blocks
        )
        q, k, v = packed.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        outputs.append(backends()[name].attend(q, k, v, spec, batch, state))
    return outputs[1]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(
    lengths=st.lists(st.sampled_from([2, 63, 64, 65, 130, 200, 1100]), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.5, 0.99]),
    window=st.sampled_from([None, None, 5, 70]),
    dtype=st.sampled_from([torch.float32, torch.int8]),
    seed=st.integers(0, 99),
)
def test_blocks_in_any_order_change_nothing(
    name: str,
    lengths: list[int],
    share: float,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, window=window)
    if backends()[name].why_not(spec, CPU, torch.float32) is not None:
        pytest.skip("this backend is not here")
    cuts = [max(1, min(length - 1, int(length * share))) for length in lengths]
    needed = [-(-length // BLOCK) for length in lengths]
    numbers = list(range(sum(needed) + 2))
    random.Random(seed).shuffle(numbers)
    blocks = [tuple(numbers.pop() for _ in range(count)) for count in needed]
    scattered = a_state(spec, sum(needed) + 2, BLOCK, dtype)
    found = attend_in_turn(name, spec, scattered, blocks, lengths, cuts)
    whole = a_state(spec, len(lengths), max(lengths), dtype)
    single = [(index,) for index in range(len(lengths))]
    assert torch.equal(found, attend_in_turn(name, spec, whole, single, lengths, cuts))
    for index, (length, mine) in enumerate(zip(lengths, blocks, strict=True)):
        kept = torch.cat([scattered.keys[block] for block in mine], dim=1)[:, :length]
        assert torch.equal(kept, whole.keys[index, :, :length])
    for block in numbers:  # nobody's
        assert bool((scattered.keys[block] == 99).all())


def test_a_block_that_ends_within_a_tile_of_keys_is_refused() -> None:
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=16, scale=1.0)
    native = backends()["native"]
    if native.why_not(spec, CPU, torch.float32) is not None:
        pytest.skip("our kernels are not here")
    x = torch.zeros(40, 1, 16)
    batch = ForwardBatch.of([[0] * 40], blocks=[(0, 1)])
    with pytest.raises(ValueError, match="blocks of 32 keys; the kernel reads 64 at a time"):
        native.attend(x, x, x, spec, batch, a_state(spec, 2, 32, torch.float32))
