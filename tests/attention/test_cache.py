"""The cache against Python lists: what was written is what is read, and nothing else is touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.attention.cache import KVCache
from hanok.attention.state import FLOAT_BYTES, KeysAndValues
from hanok.errors import RequestError
from hanok.models.config import LayerConfig, Mlp, ModelConfig, Norm, SoftmaxAttention
from hanok.models.decoder import Decoder, Execution

CPU = torch.device("cpu")
SEQUENCES, CAPACITY, KV_HEADS, HEAD_DIM = 3, 7, 2, 4


def new_cache() -> KVCache:
    spec = KeysAndValues(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    return KVCache(
        [spec] * 2,
        num_sequences=SEQUENCES,
        capacity=CAPACITY,
        dtype=torch.float32,
        devices=[CPU] * 2,
    )


slots = st.integers(0, SEQUENCES - 1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), slots, st.integers(1, CAPACITY + 1)),
        st.tuples(st.just("truncate"), slots, st.integers(0, CAPACITY + 2)),
    ),
    max_size=20,
)


@settings(max_examples=60)
@given(steps=operations)
def test_any_order_of_operations_is_the_same_on_lists(
    steps: list[tuple[str, int, int]],
) -> None:
    cache = new_cache()
    model: list[list[int]] = [[] for _ in range(SEQUENCES)]
    stamp = 0
    for kind, slot, count in steps:
        if kind == "truncate":
            cache.truncate(slot, count)
            del model[slot][count:]
        elif len(model[slot]) + count > CAPACITY:
            with pytest.raises(RequestError):
                cache.advance([slot], [count], [count])
        else:
            start = cache.lengths[slot]
            cache.advance([slot], [count], [start + count])
            new = list(range(stamp + 1, stamp + count + 1))
            stamp += count
            model[slot] += new
            for layer, state in enumerate(cache.states):
                k = torch.tensor(new, dtype=torch.float32)[None, :, None].expand(
                    KV_HEADS, count, HEAD_DIM
                )
                keys, values = state.extend((slot,), start, k + 1000 * layer, -k)
                assert keys.shape == values.shape == (KV_HEADS, len(model[slot]), HEAD_DIM)
        assert cache.lengths == [len(items) for items in model]
        for layer, state in enumerate(cache.states):
            for index, items in enumerate(model):
                kept = torch.tensor(items, dtype=torch.float32)[None, :, None]
                keys = state.keys[index, :, : len(items)]
                values = state.values[index, :, : len(items)]
                assert torch.equal(keys, (kept + 1000 * layer).expand_as(keys))
                assert torch.equal(values, (-kept).expand_as(values))


def test_one_sequence_too_many_tokens_changes_nothing_for_any() -> None:
    cache = new_cache()
    cache.advance([0, 1], [5, 2], [6, 7])
    lengths, computed_for = list(cache.lengths), list(cache.computed_for)
    with pytest.raises(RequestError, match=r"sequence 0 holds 5 tokens and 3 more .* cache's 7"):
        cache.advance([1, 0], [1, 3], [9, 9])
    assert cache.lengths == lengths == [5, 2, 0]
    assert cache.computed_for == computed_for == [6, 7, 0]
    cache.advance([0], [2], [7])  # exactly full is not too many
    assert cache.lengths[0] == CAPACITY


def test_extend_returns_views_and_no_copies() -> None:
    cache = new_cache()
    k = torch.ones(KV_HEADS, 3, HEAD_DIM)
    keys, values = cache.states[0].extend((1,), 2, k, k)
    state = cache.states[0]
    assert keys.data_ptr() == state.keys[1].data_ptr()
    assert values.data_ptr() == state.values[1].data_ptr()


@pytest.mark.parametrize("dtype", [*FLOAT_BYTES, "int8"])
@pytest.mark.parametrize(("sequences", "capacity"), [(1, 1), (3, 11)])
def test_a_decoders_cache_takes_the_bytes_that_its_config_plans(
    dtype: str, sequences: int, capacity: int
) -> None:
    mixer = SoftmaxAttention(num_heads=6, num_kv_heads=3, head_dim=5, rope=None)
    mlp = Mlp(intermediate_size=8, activation="silu")
    config = ModelConfig(
        model_type="llama",
        vocab_size=11,
        hidden_size=12,
        max_positions=64,
        norm=Norm(kind="rms", eps=1e-6),
        layers=(LayerConfig(mixer=mixer, mlp=mlp),) * 2,
    )
    made = Execution(cache_dtype=torch.int8 if dtype == "int8" else None)
    decoder = Decoder(config, made).to(torch.float32 if dtype == "int8" else getattr(torch, dtype))
    cache = decoder.new_cache(sequences, capacity)
    assert cache.size_bytes == sequences * config.kv_cache_bytes(capacity, dtype)
    head_bytes = {"float32": 5 * 4, "bfloat16": 5 * 2, "float16": 5 * 2, "int8": 5 + 4}[dtype]
    assert cache.size_bytes == sequences * capacity * 2 * 2 * 3 * head_bytes
