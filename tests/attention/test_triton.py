"""Attention of single tokens in Triton against `reference`: in the interpreter, or on a GPU.

Tolerances as for the other backends: entries are drawn from N(0, 1), in float32 only the order of sums
differs; in half precision scores of the order of 4 and weights are rounded.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.attention import triton as module
from hanok.attention.base import AttentionSpec, ForwardBatch, backends, choose, reference
from hanok.attention.cache import LayerState
from hanok.attention.triton import TritonAttention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)

grid = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 7]))
    return AttentionSpec(
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 24])),
        scale=draw(st.sampled_from([0.25, 0.1])),
        window=draw(st.sampled_from([None, None, 1, 5, 9, 300])),
        softcap=draw(st.sampled_from([None, None, 1.5])),
    )


# Keys of each sequence, the new one included; kernels cut them at multiples of 64 and 256.
lengths = st.lists(st.sampled_from([1, 2, 7, 64, 65, 256, 257, 521]), min_size=1, max_size=3)


def heads_of(spec: AttentionSpec, tokens: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return [torch.randn(tokens, n, spec.head_dim, generator=generator).to(dtype) for n in counts]


def run(
    spec: AttentionSpec,
    counts: list[int],
    slots: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, LayerState]:
    """Return what the kernels answer after all but one token went into a cache, and the right answer."""
    parts = [heads_of(spec, count, seed, dtype) for seed, count in enumerate(counts)]
    shape = (max(slots) + 1, spec.num_kv_heads, 600, spec.head_dim)
    # Full of NaN: what is read without having been written shows.
    keys, values = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
    state = LayerState(keys, values)
    for slot, (_, k, v) in zip(slots, parts, strict=True):
        state.extend(
            (slot,), 0, k[:-1].transpose(0, 1).to(device), v[:-1].transpose(0, 1).to(device)
        )
    batch = ForwardBatch.of(
        [[0] for _ in counts], past=[count - 1 for count in counts], slots=slots, device=device
    )
    q, k, v = (torch.cat([part[i][-1:] for part in parts]).to(device) for i in range(3))
    answer = TritonAttention().attend(q, k, v, spec, batch, state)
    expected = [reference(q[-1:], k.transpose(0, 1), v.transpose(0, 1), spec) for q, k, v in parts]
    return answer.cpu(), torch.cat(expected), state


@given(spec=specs(), counts=lengths, dtype=st.sampled_from(list(TOLERANCE)), data=st.data())
@grid
def test_single_tokens_are_attended_as_by_the_reference(
    spec: AttentionSpec,
    counts: list[int],
    dtype: torch.dtype,
    data: st.DataObject,
    kernel_device: torch.device,
) -> None:
    slots = data.draw(st.permutations(range(4)))[: len(counts)]
    answer, expected, _ = run(spec, counts, slots, dtype, kernel_device)
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.float(), expected, atol=TOLERANCE[dtype], rtol=0)


def test_keys_are_found_through_the_block_table(kernel_device: torch.device) -> None:
    """Blocks of 16 keys in no order; the last block of a sequence is not full."""
    from hanok.kernels.triton_attention import append, attend

    spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=8, scale=0.3, window=300)
    generator = torch.Generator().manual_seed(4)
    counts, block_size, num_blocks = [5, 330, 16], 16, 40
    shape = (num_blocks, 2, block_size, 8)
    keys, values = (torch.full(shape, float("nan")) for _ in range(2))
    order = torch.randperm(num_blocks, generator=generator).tolist()
    table = torch.full((3, 21), -1, dtype=torch.int32)
    parts = [heads_of(spec, count, seed, torch.float32) for seed, count in enumerate(counts)]
    for row, (count, (_, k, v)) in enumerate(zip(counts, parts, strict=True)):
        for index in range(-(-count // block_size)):
            block = order.pop()
            table[row, index] = block
            here = slice(index * block_size, min(count - 1, (index + 1) * block_size))
            size = max(0, here.stop - here.start)
            keys[block, :, :size] = k[here].transpose(0, 1)
            values[block, :, :size] = v[here].transpose(0, 1)
    q, k, v = (torch.stack([part[i][-1] for part in parts]).to(kernel_device) for i in range(3))
    keys, values, table = keys.to(kernel_device), values.to(kernel_device), table.to(kernel_device)
    lengths_there = torch.tensor(counts, dtype=torch.int64, device=kernel_device)
    append(k, v, keys, values, lengths_there, table)
    answer = attend(
        q, keys, values, lengths_there, table, scale=spec.scale, window=300, softcap=None
    )
    expected = [reference(q[-1:], k.transpose(0, 1), v.transpose(0, 1), spec) for q, k, v in parts]
    torch.testing.assert_close(answer.cpu(), torch.cat(expected), atol=1e-5, rtol=0)


def test_a_sequence_is_the_same_beside_others(kernel_device: torch.device) -> None:
    """Bit for bit: how its keys are cut depends on its length alone."""
    together, _, _ = run(PLAIN, [521, 3, 64], [2, 0, 1], torch.float32, kernel_device)
    alone, _, _ = run(PLAIN, [521], [0], torch.float32, kernel_device)
    assert torch.equal(together[:1], alone)


def test_the_new_token_is_in_the_cache_and_nothing_else(kernel_device: torch.device) -> None:
    _, _, state = run(PLAIN, [7, 2], [2, 0], torch.float32, kernel_device)
    for slot, count, seed in ((2, 7, 0), (0, 2, 1)):
        _, k, v = heads_of(PLAIN, count, seed, torch.float32)
        assert torch.equal(state.keys[slot, :, :count].cpu(), k.transpose(0, 1))
        assert torch.equal(state.values[slot, :, :count].cpu(), v.transpose(0, 1))
        assert state.keys[slot, :, count:].isnan().all()
    assert state.keys[1].isnan().all()


@pytest.mark.parametrize("is_cached", [True, False])
def test_many_tokens_go_to_the_next_backend(is_cached: bool) -> None:
    q, k, v = heads_of(PLAIN, 5, 0, torch.float32)
    batch = ForwardBatch.of([[0, 0, 0, 0], [0]])
    shape = (2, PLAIN.num_kv_heads, 8, PLAIN.head_dim)
    state = LayerState(torch.empty(shape), torch.empty(shape)) if is_cached else None
    answer = backends()["triton"].attend(q, k, v, PLAIN, batch, state)
    parts = (slice(0, 4), slice(4, 5))
    expected = [
        reference(q[part], k[part].transpose(0, 1), v[part].transpose(0, 1), PLAIN)
        for part in parts
    ]
    torch.testing.assert_close(answer, torch.cat(expected), atol=1e-5, rtol=0)


def test_gradients_go_through_the_next_backend() -> None:
    q, k, v = (part.requires_grad_() for part in heads_of(PLAIN, 1, 0, torch.float32))
    shape = (1, PLAIN.num_kv_heads, 8, PLAIN.head_dim)
    state = LayerState(torch.zeros(shape), torch.zeros(shape))
    answer = backends()["triton"].attend(q, k, v, PLAIN, ForwardBatch.of([[0]]), state)
    assert answer.requires_grad


def test_it_is_chosen_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends()["triton"]
    assert choose("auto", PLAIN, CPU, torch.float32).name != "triton"
    assert backend.why_not(PLAIN, CPU, torch.float32) == "needs a CUDA device (found: cpu)"
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert choose("auto", replace(PLAIN, window=5, softcap=2.0), CUDA, torch.float16) is backend
    assert "float64" in str(backend.why_not(PLAIN, CUDA, torch.float64))
    assert "up to 256" in str(backend.why_not(replace(PLAIN, head_dim=512), CUDA, torch.float16))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install triton" in str(backend.why_not(PLAIN, CUDA, torch.float16))
    assert choose("auto", PLAIN, CUDA, torch.float16).name == "sdpa"
