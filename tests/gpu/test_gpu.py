"""What only a GPU can show: kernels compiled and run there, and steps that are really recorded."""

import pytest
import torch

import hanok
from hanok.attention.base import ForwardBatch, choose
from hanok.engine import cuda_graph
from hanok.engine.cuda_graph import DecodeGraphs, why_not
from hanok.quant.base import choose_layout
from hanok.quant.int4 import Int4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = torch.device("cuda")


@torch.inference_mode()
def test_recorded_steps_give_what_plain_passes_give() -> None:
    decoder = hanok.load(hanok.BUNDLED, dtype="float32", device_map="cuda").decoder
    assert {block.self_attn.backend.name for block in decoder.layers} == {"triton"}
    prompts = [[5, 9, 200, 31], [7, 8], [11, 12, 13, 14, 15]]
    caches = [decoder.new_cache(3, 64) for _ in range(2)]
    for cache in caches:
        decoder(ForwardBatch.of([prompt[:-1] for prompt in prompts], device=CUDA), cache)
    assert why_not(decoder, caches[1]) is None
    graphs = DecodeGraphs(decoder, caches[1])
    tokens = [prompt[-1] for prompt in prompts]
    for _ in range(8):
        past = list(caches[0].lengths)
        batch = ForwardBatch.of([[token] for token in tokens], past=past, device=CUDA)
        expected = decoder.logits(decoder(batch, caches[0]))
        answer = graphs.logits(tokens, [0, 1, 2])
        torch.testing.assert_close(answer, expected, atol=1e-3, rtol=0)
        tokens = expected.argmax(-1).tolist()
    assert graphs._steps[4]._recorded is not None  # type: ignore[attr-defined]  # looks inside: was it recorded


@pytest.mark.parametrize("quant", [None, "int8", "int4", "nf4"])
def test_generation_on_a_gpu_is_that_without_graphs(
    quant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32", device_map="cuda", quant=quant)
    prompts = ["Once upon a time", "The dog"]
    recorded = model.generate(prompts, max_new_tokens=24)
    monkeypatch.setattr(cuda_graph, "why_not", lambda *_: "not in this test")
    plain = model.generate(prompts, max_new_tokens=24)
    assert [item.token_ids for item in recorded] == [item.token_ids for item in plain]


def test_gpus_get_our_kernels() -> None:
    from hanok.attention.base import AttentionSpec

    assert choose_layout(Int4().format, CUDA).name == "triton"
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.1)
    assert choose("auto", spec, CUDA, torch.bfloat16).name == "triton"
