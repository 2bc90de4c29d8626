"""Packed attention of a GPU: what torch's kernel is given, which has none for a CPU.

The kernel's place is taken by `reference`, sequence by sequence; tests/gpu runs the real one.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.attention.base import AttentionSpec, ForwardBatch, backends, reference
from hanok.attention.cache import KVCache, LayerState
from hanok.attention.state import KeysAndValues

CPU = torch.device("cpu")
BLOCK = 16


def by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch documents: causal, the last query of a sequence sees its last key."""
    assert window_size[1] == 0
    window = None if window_size[0] < 0 else window_size[0] + 1
    spec = AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        scale=scale,
        window=window,
    )
    outputs = []
    queries, keys = query_starts.tolist(), key_starts.tolist()
    for number in range(len(queries) - 1):
        here, there = (slice(item[number], item[number + 1]) for item in (queries, keys))
        assert here.stop - here.start <= longest
        assert there.stop - there.start <= longest_keys
        parts = q[here], k[there].transpose(0, 1), v[there].transpose(0, 1)
        outputs.append(reference(*parts, spec))
    assert queries[-1] == len(q)
    assert keys[-1] == len(k)
    return torch.cat(outputs)


def a_state(spec: AttentionSpec, num_blocks: int) -> LayerState:
    """Blocks of NaN: what is read without having been written shows."""
    layer = KeysAndValues(num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
    cache = KVCache(
        [layer], num_sequences=num_blocks, capacity=BLOCK, dtype=torch.float32, devices=[CPU]
    )
    for part in (cache.states[0].keys, cache.states[0].values):
        part.fill_(float("nan"))
    return cache.states[0]


@settings(max_examples=40)
@given(
    shape=st.lists(
        st.tuples(st.sampled_from([0, 0, 3, 15, 16, 40]), st.sampled_from([1, 2, 16, 33])),
        min_size=1,
        max_size=4,
    ),
    window=st.sampled_from([None, 1, 20]),
    has_cache=st.booleans(),
)
def test_keys_of_all_sequences_are_written_and_packed(
    shape: list[tuple[int, int]], window: int | None, has_cache: bool
) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, window=window)
    past, new = [p if has_cache else 0 for p, _ in shape], [n for _, n in shape]
    random = torch.Generator().manual_seed(5)
    parts = [
        torch.randn(p + n, 8, spec.head_dim, generator=random)
        for p, n in zip(past, new, strict=True)
    ]
    needed = [-(-len(part) // BLOCK) for part in parts]
    numbers = torch.randperm(sum(needed) + 1, generator=random).tolist()
    blocks = [tuple(numbers.pop() for _ in range(count)) for count in needed]
    state, expected_state = a_state(spec, sum(needed) + 1), a_state(spec, sum(needed) + 1)
    for part, start, mine in zip(parts, past, blocks, strict=True):
        _, k, v = part.split([4, 2, 2], dim=1)
        expected_state.extend(mine, 0, k.transpose(0, 1), v.transpose(0, 1))
        if start:
            state.extend(mine, 0, k[:start].transpose(0, 1), v[:start].transpose(0, 1))
    packed = torch.cat([part[start:] for part, start in zip(parts, past, strict=True)])
    batch = ForwardBatch.of([[0] * count for count in new], past=past, blocks=blocks)
    q, k, v = packed.split([4, 2, 2], dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", by_sequence)
        found = backends()["varlen"].attend(q, k, v, spec, batch, state if has_cache else None)
    expected = []
    for part, start in zip(parts, past, strict=True):
        q, k, v = part.split([4, 2, 2], dim=1)
        expected.append(reference(q[start:], k.transpose(0, 1), v.transpose(0, 1), spec))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)
    if has_cache:
        for one, other in (
            (state.keys, expected_state.keys),
            (state.values, expected_state.values),
        ):
            torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)


def test_a_cache_in_int8_goes_to_the_next_backend() -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16, scale=0.3)
    layer = KeysAndValues(num_kv_heads=1, head_dim=16)
    q, k, v = (torch.randn(5, n, 16, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 1))
    answers: list[Tensor] = []
    for name in ("varlen", "sdpa"):
        cache = KVCache([layer], num_sequences=1, capacity=8, dtype=torch.int8, devices=[CPU])
        backend: Any = backends()[name]
        answers.append(backend.attend(q, k, v, spec, ForwardBatch.of([[0] * 5]), cache.states[0]))
    torch.testing.assert_close(*answers, atol=1e-2, rtol=0)
