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

from hanok.attention.base import AttentionSpec, ForwardBatch, backends, choose, reference
from hanok.attention.cache import LayerState
from hanok.attention.triton import TritonAttention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)

grid = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


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
    spec: AttentionSpec, counts: list[int], slots: list[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, LayerState]:
    """Return what the kernels answer after all but one token went into a cache, and the right answer."""
    parts = [heads_of(spec, count, seed, dtype) for seed, count in enumerate(counts)]
    shape = (max(slots) + 1, spec.num_kv_heads, 600, spec.head_dim)
    # Full of NaN: what is read without having been written shows.
    keys, values = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
    state = LayerState(keys, values)
    for slot, (_, k, v) in zip(slots, parts, strict=True):
        state.extend(slot, 0, k[:-1].transpose(0, 1).to(device), v[:-1].transpose(0, 1).to(device))
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
