"""A decoder compiled whole: one program for any mix of lengths, with the gradients of the plain one.

In float32 both differ by the order of sums alone: a few 1e-6 of the largest number.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hanok.attention.base import ForwardBatch
from hanok.models.decoder import Decoder
from hanok.models.family import read_config

# torch warns of its own modules while it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
TOLERANCE = 2e-5
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 5,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": ROPE},
    "dynamic": {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}
    | {"max_position_embeddings": 5},
    "longrope": {"rope_parameters": LONG},
    "yarn": {"rope_parameters": YARN},
    "gemma2": {  # soft caps, and a window on every second layer
        "model_type": "gemma2",
        "rope_parameters": ROPE,
        "head_dim": 8,
        "sliding_window": 3,
        "query_pre_attn_scalar": 8,
    },
    "mistral": {"model_type": "mistral", "rope_parameters": ROPE, "sliding_window": 3},
}
# Other lengths, another number of documents, another total.
PACKINGS = (
    [[5, 9, 20, 31], [7, 8], [11, 12, 13, 14, 15, 16, 17, 18, 19]],
    [[3, 4, 5, 6, 7, 8], [9, 10, 11], [12], [13, 14], [1, 2, 3, 4, 5, 6, 7]],
    [[30 + n for n in range(20)], [1, 2]],
)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def random_decoder(name: str, attention: str) -> Decoder:
    decoder = Decoder(read_config(SIZES | CONFIGS[name], name)[1])
    decoder.initialise(0.2, torch.Generator().manual_seed(7))
    decoder.use_attention(attention)
    return decoder


def answers(decoder: Decoder, forward: Any, documents: list[list[int]]) -> list[Tensor]:
    """Return the hidden states, and each parameter's gradient of a loss over all logits."""
    hidden = forward(ForwardBatch.of(documents))
    targets = torch.tensor([(3 * token + 1) % 60 for item in documents for token in item])
    decoder.zero_grad()
    torch.nn.functional.cross_entropy(decoder.logits(hidden), targets, reduction="sum").backward()
    found = [hidden.detach()]
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        found.append(parameter.grad.clone())
    return found


@pytest.mark.parametrize(
    ("name", "attention", "backend"),
    [
        ("llama", "sdpa", "aot_eager"),
        ("llama", "auto", "eager"),
        ("llama", "eager", "eager"),
        ("gemma2", "auto", "aot_eager"),
        ("mistral", "auto", "eager"),
        ("dynamic", "sdpa", "eager"),
        ("longrope", "sdpa", "eager"),
        ("yarn", "sdpa", "eager"),
    ],
)
def test_two_programs_serve_every_packing(name: str, attention: str, backend: str) -> None:
    """The first is of the first packing's sizes, the second of any."""
    decoder = random_decoder(name, attention)
    compiled = torch.compile(decoder, fullgraph=True, backend=backend)
    for documents in PACKINGS:
        expected = answers(decoder, decoder, documents)
        found = answers(decoder, compiled, documents)
        for right, other in zip(expected, found, strict=True):
            difference = float((right - other).abs().max() / right.abs().max())
            assert difference < TOLERANCE
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_decoder_in_bfloat16_is_compiled_whole(name: str) -> None:
    """Plain passes ask the processor how to multiply, which a compiler cannot."""
    decoder = random_decoder(name, "auto").to(torch.bfloat16)
    decoder.use_attention("auto")
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            batch = ForwardBatch.of(PACKINGS[0]).complete()
            found, expected = compiled(batch).detach(), decoder(batch).detach()
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_two_programs_serve_every_step_over_a_cache(attention: str) -> None:
    """Prompts and single tokens, of other sequences each time, in blocks that hold NaN at first."""
    decoder = random_decoder("mistral", attention)
    plain, cache = decoder.new_cache(9, 8), decoder.new_cache(9, 8)
    for state in (*plain.states, *cache.states):
        state.keys.fill_(float("nan"))
        state.values.fill_(float("nan"))
    compiled = torch.compile(decoder.hidden_states, fullgraph=True, dynamic=True, backend="eager")
    blocks = [(7, 2, 3), (0, 8), (5, 1)]
    lengths = [0, 0, 0]
    for counts in (
        {0: 9, 1: 3, 2: 2},
        {0: 1, 1: 1, 2: 1},
        {2: 4, 0: 1},
        {1: 2, 2: 3},
        {0: 7, 1: 4},
    ):
        batch = ForwardBatch.of(
            [[(3 * n + slot) % 60 for n in range(count)] for slot, count in counts.items()],
            past=[lengths[slot] for slot in counts],
            blocks=[blocks[slot] for slot in counts],
        ).complete()
        for slot, count in counts.items():
            lengths[slot] += count
        expected = decoder.hidden_states(batch, plain)
        torch.testing.assert_close(compiled(batch, cache), expected, atol=1e-5, rtol=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    for state, other in zip(cache.states, plain.states, strict=True):
        torch.testing.assert_close(state.keys, other.keys, atol=1e-5, rtol=0, equal_nan=True)


@torch.no_grad()
def test_a_batch_made_without_gradients_has_to_be_complete() -> None:
    decoder = random_decoder("llama", "auto")
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    batch = ForwardBatch.of(PACKINGS[0])
    with pytest.raises(Exception, match="complete"):
        compiled(batch)
    torch.testing.assert_close(compiled(batch.complete()), decoder(batch), atol=1e-5, rtol=1e-5)
