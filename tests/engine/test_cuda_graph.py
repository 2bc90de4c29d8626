"""Decoding from buffers in place: the same tokens as the plain passes, without and with a graph.

Without a GPU the steps run in Triton's interpreter and nothing is recorded. In float32 logits differ by
the order of sums alone: a few 1e-6 of their size, which is about 10.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import hanok
from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.attention.triton import TritonAttention
from hanok.engine import cuda_graph
from hanok.engine.cuda_graph import DecodeGraphs, DecodeStep, why_not, why_not_static
from hanok.engine.engine import Engine
from hanok.engine.model import Model
from hanok.errors import RequestError
from hanok.models.decoder import Decoder
from hanok.models.family import read_config

TOLERANCE = 1e-3
PROMPTS = ([5, 9, 200, 31], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19])
CAPACITY = 40


@pytest.fixture(scope="module")
def plain() -> Model:
    device = {"": 0 if torch.cuda.is_available() else "cpu"}
    model = hanok.load(hanok.BUNDLED, dtype="float32", device_map=device)
    model.decoder.use_attention("sdpa")
    return model


@pytest.fixture(scope="module")
def static(kernel_device: torch.device) -> Iterator[Model]:
    """The same model with Triton's attention, which nobody chooses on a CPU but this test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonAttention, "why_not", lambda *_: None)
        device = {"": 0 if kernel_device.type == "cuda" else "cpu"}
        model = hanok.load(hanok.BUNDLED, dtype="float32", device_map=device)
        model.decoder.use_attention("triton")
        yield model


def prefilled(decoder: Decoder, prompts: tuple[list[int], ...]) -> KVCache:
    """Return a cache of all but the prompts' last tokens."""
    cache = decoder.new_cache(len(prompts), CAPACITY)
    for slot, prompt in enumerate(prompts):
        if prompt[:-1]:
            decoder(ForwardBatch.of([prompt[:-1]], slots=[slot], device=decoder.device), cache)
    return cache


def plain_logits(decoder: Decoder, cache: KVCache, tokens: list[int], slots: list[int]) -> Tensor:
    batch = ForwardBatch.of(
        [[token] for token in tokens],
        past=[cache.lengths[slot] for slot in slots],
        slots=slots,
        device=decoder.device,
    )
    return decoder.logits(decoder(batch, cache))


@torch.inference_mode()
def test_tokens_are_those_of_plain_passes_one_by_one(plain: Model, static: Model) -> None:
    """Three sequences of different lengths, a step of four; then one of them ends."""
    expected_cache = prefilled(plain.decoder, PROMPTS)
    cache = prefilled(static.decoder, PROMPTS)
    assert why_not_static(static.decoder, cache) is None
    graphs = DecodeGraphs(static.decoder, cache)
    tokens, slots = [prompt[-1] for prompt in PROMPTS], [0, 1, 2]
    for index in range(7):
        if index == 4:
            tokens, slots = [tokens[0], tokens[2]], [0, 2]
        expected = plain_logits(plain.decoder, expected_cache, tokens, slots)
        answer = graphs.logits(tokens, slots)
        assert answer.shape == expected.shape
        assert float((answer - expected).abs().max()) < TOLERANCE
        assert cache.lengths == expected_cache.lengths
        tokens = expected.argmax(-1).tolist()
        assert answer.argmax(-1).tolist() == tokens
    for state, other in zip(cache.states, expected_cache.states, strict=True):
        for slot, length in enumerate(cache.lengths):
            torch.testing.assert_close(
                state.keys[slot, :, :length], other.keys[slot, :, :length], atol=1e-4, rtol=0
            )


@torch.inference_mode()
def test_what_fills_a_step_up_changes_nothing(static: Model) -> None:
    """The same sequence in a step of its own size and in one of four times that."""
    answers = []
    for size in (1, 4):
        cache = prefilled(static.decoder, PROMPTS)
        step = DecodeStep(static.decoder, cache, size)
        step.write(ForwardBatch.of([PROMPTS[0][-1:]], past=[len(PROMPTS[0]) - 1]))
        answers.append(step.run()[0])
    assert float((answers[0] - answers[1]).abs().max()) < TOLERANCE


@torch.inference_mode()
def test_one_step_serves_sequences_in_blocks_of_any_lengths(plain: Model, static: Model) -> None:
    """Blocks in no order, one to three of a sequence; new ones begin on the way; one sequence ends."""
    cache = static.decoder.new_cache(12, 64)
    graphs = DecodeGraphs(static.decoder, cache, blocks_per_sequence=4)
    texts = [list(range(3, 3 + length)) for length in (130, 62, 1)]
    blocks = [(7, 2, 11), (0, 9), (4,)]
    for text, mine in zip(texts, blocks, strict=True):
        batch = ForwardBatch.of([text], blocks=[mine], device=static.decoder.device)
        static.decoder.hidden_states(batch, cache)
    for index in range(6):
        if index == 4:
            del texts[1], blocks[1]
        for text in texts:
            text.append(20 + index)
        batch = ForwardBatch.of(
            [text[-1:] for text in texts],
            past=[len(text) - 1 for text in texts],
            blocks=[m[: -(-len(text) // 64)] for m, text in zip(blocks, texts, strict=True)],
        )
        answer = graphs.logits_of(batch)
        whole = ForwardBatch.of(texts, device=plain.decoder.device)
        hidden = plain.decoder(whole)[whole.last_tokens()]
        assert float((answer - plain.decoder.logits(hidden)).abs().max()) < TOLERANCE
    assert set(graphs._steps) == {4, 2}


@torch.inference_mode()
def test_a_pass_with_adapters_reads_no_buffer(static: Model) -> None:
    cache = prefilled(static.decoder, PROMPTS)
    graphs = DecodeGraphs(static.decoder, cache)
    seen: list[Tensor | None] = []
    product = static.decoder.layers[0].mlp.down_proj
    handle = product.register_forward_pre_hook(lambda _, args: seen.append(args[1].adapters))
    for adapters in ([2, -1], [-1, -1]):
        graphs.logits_of(ForwardBatch.of([[5], [7]], past=[3, 0], adapters=adapters))
    handle.remove()
    assert [None if item is None else item.tolist() for item in seen] == [[2, -1], None]


@torch.inference_mode()
def test_angles_that_depend_on_the_length_are_written_into_place(
    kernel_device: torch.device,
) -> None:
    """Past 8 tokens they change with every token, and each sequence has its own."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 8}
    config = {"model_type": "llama", "rope_parameters": rope, **sizes, **rest}
    decoder = Decoder(read_config(config, "dynamic")[1])
    decoder.initialise(0.2, torch.Generator().manual_seed(7))
    decoder.to(kernel_device).requires_grad_(False)
    texts = [[5, 6, 7], list(range(9, 20))]
    for index in range(2):
        # What was computed for other angles is computed again, as generation does.
        lengths = [len(text) for text in texts]
        cache = decoder.new_cache(2, CAPACITY)
        decoder.use_attention("sdpa")
        head = [text[:-1] for text in texts]
        decoder(ForwardBatch.of(head, sequence_lengths=lengths, device=kernel_device), cache)
        whole = ForwardBatch.of(texts, device=kernel_device)
        expected = decoder.logits(decoder(whole)[whole.last_tokens()])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TritonAttention, "why_not", lambda *_: None)
            decoder.use_attention("triton")
            if index == 0:
                assert why_not_static(decoder, cache) is None
            graphs = DecodeGraphs(decoder, cache)
            answer = graphs.logits([text[-1] for text in texts], [0, 1])
            for text in texts:
                text.append(30)
        assert float((answer - expected).abs().max()) < TOLERANCE


@torch.inference_mode()
def test_a_sequence_that_outgrows_the_cache_is_refused(static: Model) -> None:
    cache = static.decoder.new_cache(1, 2)
    graphs = DecodeGraphs(static.decoder, cache)
    graphs.logits([5], [0])
    graphs.logits([6], [0])
    with pytest.raises(RequestError, match="exceed the cache's 2"):
        graphs.logits([7], [0])


def test_what_cannot_be_recorded_says_why(plain: Model, static: Model) -> None:
    cache = plain.decoder.new_cache(1, 8)
    assert why_not_static(plain.decoder, cache) == "attention sdpa takes lengths from the CPU"
    if not torch.cuda.is_available():
        assert why_not(static.decoder, cache) == "needs a CUDA device (found: cpu)"
    cache.dtype = torch.int8
    assert why_not_static(static.decoder, cache) is not None


def test_generation_with_steps_gives_the_same_tokens(
    plain: Model, static: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    expected = plain.generate(prompts, max_new_tokens=6)
    monkeypatch.setattr(cuda_graph, "why_not", why_not_static)
    sizes = []
    original = DecodeStep.write

    def write(step: DecodeStep, batch: ForwardBatch) -> None:
        sizes.append(step.size)  # here, since a recorded step is replayed without `DecodeStep.run`
        original(step, batch)

    monkeypatch.setattr(DecodeStep, "write", write)
    answer = static.generate(prompts, max_new_tokens=6)
    assert [item.token_ids for item in answer] == [item.token_ids for item in expected]
    assert sizes == [4] * 5


def test_the_engine_decodes_by_steps_over_its_blocks_and_gives_the_same_tokens(
    plain: Model, static: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*map(list, PROMPTS), [5, 9] * 32]  # the last one goes on in a second block
    expected = plain.generate(prompts, max_new_tokens=4)
    monkeypatch.setattr(cuda_graph, "why_not", why_not_static)
    runs = []
    original = DecodeGraphs.logits_of

    def noted(graphs: DecodeGraphs, batch: ForwardBatch) -> Tensor:
        runs.append(len(batch.token_ids))
        return original(graphs, batch)

    monkeypatch.setattr(DecodeGraphs, "logits_of", noted)
    with Engine(static, max_running=4, cache_tokens=1024) as engine:
        tickets = [engine.submit(prompt, max_new_tokens=4) for prompt in prompts]
        found = [[event.token_id for event in ticket.result()] for ticket in tickets]
    assert found == [item.token_ids for item in expected]
    # A prompt's pass gives its first token; passes over prompts and tokens together are not replayed.
    assert 0 < sum(runs) <= 3 * len(prompts)
