"""Packed sequences on a GPU: attention of documents beside others, and a decoder compiled whole."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import hanok
from hanok.attention.base import AttentionSpec, ForwardBatch, backends, choose, reference
from hanok.attention.cache import KVCache
from hanok.attention.state import KeysAndValues

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # torch warns of its own modules while it imports its compiler.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
CUDA = torch.device("cuda")
LENGTHS = [5, 300, 1, 64, 5]


def heads_of(spec: AttentionSpec, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return [torch.randn(tokens, n, spec.head_dim, generator=generator).to(dtype) for n in counts]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_documents_are_attended_to_and_trained_as_alone(window: int | None, head_dim: int) -> None:
    """Entries of N(0, 1) in bfloat16 beside float64: errors of 2**-8 of outputs of the order of 1."""
    spec = AttentionSpec(
        num_heads=8, num_kv_heads=2, head_dim=head_dim, scale=head_dim**-0.5, window=window
    )
    assert backends()["varlen"].why_not(spec, CUDA, torch.bfloat16) is None
    parts = [heads_of(spec, length, torch.bfloat16) for length in LENGTHS]
    packed = [torch.cat([part[i] for part in parts]).to(CUDA).requires_grad_() for i in range(3)]
    upstream = heads_of(spec, sum(LENGTHS), torch.bfloat16)[0]
    batch = ForwardBatch.of([[0] * length for length in LENGTHS], device=CUDA)
    answer = choose("auto", spec, CUDA, torch.bfloat16).attend(*packed, spec, batch, None)
    answer.backward(upstream.to(CUDA))
    start = 0
    for part, length in zip(parts, LENGTHS, strict=True):
        here = slice(start, start + length)
        q, k, v = alone = [item.double().requires_grad_() for item in part]
        expected = reference(q, k.transpose(0, 1), v.transpose(0, 1), spec, torch.float64)
        expected.backward(upstream[here].double())
        torch.testing.assert_close(answer[here].cpu().double(), expected, atol=3e-2, rtol=2e-2)
        for whole, mine in zip(packed, alone, strict=True):
            assert whole.grad is not None
            found = whole.grad[here].cpu().double()
            torch.testing.assert_close(found, mine.grad, atol=0.15, rtol=5e-2)
        start += length


@pytest.mark.parametrize("window", [None, 40])
def test_prompts_continue_what_a_cache_holds(window: int | None) -> None:
    """In blocks of 64 in no order; one sequence begins, one has a single new token."""
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, scale=0.125, window=window)
    new, past = [5, 100, 1, 64], [0, 200, 64, 3]
    parts = [heads_of(spec, p + n, torch.bfloat16) for p, n in zip(past, new, strict=True)]
    blocks = [(3,), (9, 0, 5, 7, 2), (1, 8), (6, 4)]
    layer = KeysAndValues(num_kv_heads=2, head_dim=64)
    cache = KVCache([layer], num_sequences=10, capacity=64, dtype=torch.bfloat16, devices=[CUDA])
    state, expected = cache.states[0], []
    for part, start, mine in zip(parts, past, blocks, strict=True):
        q, k, v = part
        if start:
            state.extend(mine, 0, *(x[:start].transpose(0, 1).to(CUDA) for x in (k, v)))
        q, k, v = (item.double() for item in part)
        whole = reference(q[start:], k.transpose(0, 1), v.transpose(0, 1), spec, torch.float64)
        expected.append(whole)
    packed = [
        torch.cat([part[i][start:] for part, start in zip(parts, past, strict=True)]).to(CUDA)
        for i in range(3)
    ]
    batch = ForwardBatch.of([[0] * n for n in new], past=past, blocks=blocks, device=CUDA)
    with torch.inference_mode():
        answer = choose("auto", spec, CUDA, torch.bfloat16).attend(*packed, spec, batch, state)
    torch.testing.assert_close(answer.cpu().double(), torch.cat(expected), atol=3e-2, rtol=2e-2)
    for part, mine in zip(parts, blocks, strict=True):
        kept = torch.cat([state.keys[block] for block in mine], dim=1)[:, : len(part[1])]
        assert torch.equal(kept.cpu(), part[1].transpose(0, 1))


def test_a_compiled_decoder_serves_any_packing_with_two_programs() -> None:
    decoder = hanok.load(hanok.BUNDLED, dtype="bfloat16", device_map="cuda").decoder
    decoder.requires_grad_(True)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    for lengths in ([30, 7, 100], [5, 5, 61, 20, 9], [200, 11]):
        documents = [[n % 300 + 3 for n in range(length)] for length in lengths]
        batch = ForwardBatch.of(documents, device=CUDA)
        expected, found = decoder(batch), compiled(batch)
        found.float().sum().backward()
        right = expected.detach().float()
        difference = (found.detach().float() - right).abs().max() / right.abs().max()
        assert float(difference) < 3e-2
    assert counters["stats"]["unique_graphs"] <= 2
