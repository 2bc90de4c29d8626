"""Recorded passes give the same logits as plain ones, bit for bit, and refuse what they would miss."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hanok
from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.engine import passes
from hanok.engine.native_steps import NativeSteps, why_not
from hanok.engine.runner import Runner
from hanok.errors import RequestError
from hanok.kernels.lora import by_columns
from hanok.kernels.native import native
from hanok.kernels.native import why_not as why_no_kernels
from hanok.models.decoder import Decoder, Execution
from hanok.models.family import read_config
from hanok.models.linear import Linear
from hanok.models.lora import Adapter, Lora, Part

pytestmark = pytest.mark.skipif(native() is None, reason=f"the kernels are {why_no_kernels()}")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": ROPE},
    "qwen2": {"model_type": "qwen2", "rope_parameters": ROPE, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "rope_parameters": ROPE, "head_dim": 8},
    "olmo2": {"model_type": "olmo2", "rope_parameters": ROPE},
    "gemma2": {
        "model_type": "gemma2",
        "rope_parameters": ROPE,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
    },
    "dynamic": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60},
    "mixtral": {
        "model_type": "mixtral",
        "rope_parameters": ROPE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
PROMPTS = ([5, 9, 20, 31], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19])


def random_decoder(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    own = CONFIGS[name]
    config = own if name == "gpt2" else SIZES | own
    decoder = Decoder(read_config(config, name)[1]).to(dtype)
    decoder.initialise(0.2, torch.Generator().manual_seed(7))
    decoder.use_attention("native")
    return decoder.eval().requires_grad_(False)


def prefilled(decoder: Decoder) -> KVCache:
    cache = decoder.new_cache(len(PROMPTS), 40)
    for slot, prompt in enumerate(PROMPTS):
        if prompt[:-1]:
            decoder(ForwardBatch.of([prompt[:-1]], slots=[slot]), cache)
    return cache


def plain_logits(decoder: Decoder, cache: KVCache, tokens: list[int], slots: list[int]) -> Tensor:
    past = [cache.lengths[slot] for slot in slots]
    batch = ForwardBatch.of([[token] for token in tokens], past=past, slots=slots)
    return decoder.logits(decoder(batch, cache))


def compare(decoder: Decoder, steps: NativeSteps, expected: KVCache, rounds: int = 6) -> None:
    """Decode all prompts, then all but the second, beside plain passes."""
    tokens, slots = [prompt[-1] for prompt in PROMPTS], [0, 1, 2]
    for number in range(2 * rounds):
        if number == rounds:
            del tokens[1], slots[1]
        wanted = plain_logits(decoder, expected, tokens, slots)
        found = steps.logits([[token] for token in tokens], slots)
        assert torch.equal(found, wanted), number
        tokens = wanted.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "olmo2", "gemma2"])
@torch.inference_mode()
def test_recorded_passes_are_plain_passes(name: str, dtype: torch.dtype) -> None:
    decoder = random_decoder(name, dtype)
    cache, expected = prefilled(decoder), prefilled(decoder)
    assert why_not(decoder, cache) is None
    steps = NativeSteps(decoder, cache)
    compare(decoder, steps, expected)
    assert steps.recorded_tokens == [3, 2]
    assert steps.obstacles == {}
    assert cache.lengths == expected.lengths


@pytest.mark.parametrize("quant", [None, "int8", "int4", "nf4"])
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_generation_is_recorded_and_gives_the_same_tokens(
    quant: str | None, cache_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hanok.load(hanok.BUNDLED, quant=quant, cache_dtype=cache_dtype, weights="copied")
    made: list[NativeSteps] = []
    real = passes.Passes._record

    def kept(item: passes.Passes) -> Any:
        found = real(item)
        assert isinstance(found, NativeSteps)
        made.append(found)
        return found

    prompts = ["Once upon a time", "The dog", "Lily and Tom went to the park and"]
    options: Any = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3}
    monkeypatch.setattr(passes.Passes, "_record", kept)
    recorded = model.generate(prompts, **options)
    monkeypatch.setattr(passes.Passes, "_record", lambda _: None)
    plain = model.generate(prompts, **options)
    assert [item.token_ids for item in recorded] == [item.token_ids for item in plain]
    assert [item.logprobs for item in recorded] == [item.logprobs for item in plain]
    assert made[0].recorded_tokens == [3]


def test_a_model_may_be_told_to_record_nothing() -> None:
    model = hanok.load(hanok.BUNDLED, graphs=False, weights="copied")
    cache = model.decoder.new_cache(2, 64)
    assert passes.Passes(model.decoder, cache).recorded is None
    assert Runner(model.decoder, 2, 1)._passes.recorded is None
    model.decoder.execution = Execution()
    assert passes.Passes(model.decoder, cache).recorded is not None
    assert Runner(model.decoder, 2, 1)._passes.recorded is not None


@pytest.mark.parametrize(("name", "function"), [("gpt2", "layer_norm"), ("mixtral", "float")])
@torch.inference_mode()
def test_what_would_be_missing_is_computed_plainly(name: str, function: str) -> None:
    decoder = random_decoder(name)
    steps = NativeSteps(decoder, cache := prefilled(decoder))
    compare(decoder, steps, prefilled(decoder), rounds=3)
    assert steps.recorded_tokens == []
    assert list(steps.obstacles) == [3, 2]
    assert steps.obstacles[3] == function
    assert cache.lengths[1] == 3


@torch.inference_mode()
def test_angles_that_depend_on_the_length_are_written_into_place() -> None:
    """Past 8 tokens they change with every token; both ways compute with those of the last one."""
    decoder = random_decoder("dynamic")
    steps = NativeSteps(decoder, prefilled(decoder))
    compare(decoder, steps, prefilled(decoder), rounds=3)
    assert steps.recorded_tokens == [3, 2]


@torch.inference_mode()
def test_weights_that_moved_are_found() -> None:
    """The old places are spoilt, so that reading them would show."""
    decoder = random_decoder("llama")
    cache, expected = prefilled(decoder), prefilled(decoder)
    steps = NativeSteps(decoder, cache)
    compare(decoder, steps, expected, rounds=3)
    old = [parameter.data for parameter in decoder.parameters()]
    for parameter in decoder.parameters():
        parameter.data = parameter.data.clone()
    for weight in old:
        weight.fill_(float("nan"))
    recorded = []
    for token in range(3):
        found = steps.logits([[token], [token]], [0, 2])
        assert torch.equal(found, plain_logits(decoder, expected, [token, token], [0, 2]))
        recorded.append(steps.recorded_tokens)
    assert recorded == [[], [2], [2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.inference_mode()
def test_passes_over_several_tokens_are_those_over_one_after_another(dtype: torch.dtype) -> None:
    """Bit for bit, recorded or not: one recording serves however many tokens which sequences have."""
    decoder = random_decoder("qwen3", dtype)
    cache, expected = prefilled(decoder), prefilled(decoder)
    steps = NativeSteps(decoder, cache)
    random = torch.Generator().manual_seed(4)
    passes = ({0: 4, 1: 1, 2: 2}, {0: 1, 1: 3, 2: 1}) * 2
    for counts in (*passes, {1: 7}, {2: 1, 0: 4}, {0: 1, 2: 2, 1: 4}, {1: 5}):
        tokens = [torch.randint(60, (n,), generator=random).tolist() for n in counts.values()]
        found = steps.logits(tokens, list(counts))
        one_by_one = torch.cat(
            [
                plain_logits(decoder, expected, [token], [slot])
                for slot, new in zip(counts, tokens, strict=True)
                for token in new
            ]
        )
        assert torch.equal(found, one_by_one)
        for slot, count in counts.items():  # as where all but the first were drafted wrong
            for each in (cache, expected):
                each.truncate(slot, each.lengths[slot] - count + 1)
    assert steps.recorded_tokens == [7, 5]


@torch.inference_mode()
@pytest.mark.parametrize("in_place", [True, False], ids=["by columns", "by rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recorded_passes_with_adapters_are_plain_passes(dtype: torch.dtype, in_place: bool) -> None:
    """Whichever token has which; where the kernel would take copies nothing is recorded."""
    decoder = random_decoder("llama", dtype)
    generator = torch.Generator().manual_seed(5)
    for number in (0, 3):
        for module in decoder.modules():
            if isinstance(module, Linear) and module is not decoder.lm_head:
                rows, columns = module.weight.shape
                a = 0.3 * torch.randn(4, columns, generator=generator).to(dtype)
                b = torch.randn(rows, 4, generator=generator).to(dtype)
                part = Part(a=a, b=by_columns(b) if in_place else b, scale=0.5)
                module.lora = module.lora or Lora()
                module.lora.add(number, Adapter([part], [rows]).requires_grad_(False))
    decoder.weights_changed()
    cache, expected = prefilled(decoder), prefilled(decoder)
    steps = NativeSteps(decoder, cache)
    tokens = [prompt[-1] for prompt in PROMPTS]
    for chosen in ([-1, 0, 3], [3, 3, 0], [-1, -1, -1], [0, -1, -1], [3, 0, 0]):
        wanted = decoder(batch_of(tokens, expected, chosen), expected)
        found = steps.hidden_states(batch_of(tokens, cache, chosen))
        assert torch.equal(found, wanted), chosen
        tokens = decoder.logits(wanted).argmax(-1).tolist()
    assert steps.recorded_tokens == ([3] if in_place else [])
    assert set(steps.obstacles) == (set() if in_place else {3})


def batch_of(tokens: list[int], cache: KVCache, adapters: list[int]) -> ForwardBatch:
    one = [[token] for token in tokens]
    return ForwardBatch.of(one, past=list(cache.lengths), adapters=adapters)


@torch.inference_mode()
def test_what_was_not_used_for_longest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanok.engine.native_steps.KEPT_TOKENS", 8)
    decoder = random_decoder("llama")
    cache = decoder.new_cache(1, 40)
    steps = NativeSteps(decoder, cache)

    def make(*counts: int) -> list[int]:
        for count in counts:
            steps.logits([[5] * count], [0])
            cache.truncate(0, 0)
        return steps.recorded_tokens

    assert make(3, 3, 4, 4, 3) == [4, 3]
    assert make(2, 2) == [3, 2]
    assert make(9, 9, 9) == [3, 2]
    assert make(4) == [3, 2]
    assert make(4) == [2, 4]


@torch.inference_mode()
def test_a_full_cache_is_refused_before_anything_is_written() -> None:
    decoder = random_decoder("llama")
    cache = decoder.new_cache(1, 4)
    steps = NativeSteps(decoder, cache)
    for token in range(4):
        steps.logits([[token]], [0])
    with pytest.raises(RequestError, match="sequence 0 holds 4 tokens"):
        steps.logits([[5]], [0])
    assert cache.lengths == [4]


@contextmanager
def attention(decoder: Decoder, name: str) -> Iterator[None]:
    decoder.use_attention(name)
    yield
    decoder.use_attention("native")


def test_reasons_not_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder("llama")
    cache = decoder.new_cache(1, 8)
    with attention(decoder, "sdpa"):
        assert why_not(decoder, cache) == "attention sdpa is not one of our kernels"
    half = random_decoder("llama").to(torch.float16)
    assert why_not(half, half.new_cache(1, 8)) == "our kernels do not compute in float16"
    meta = Decoder(decoder.config).to("meta")
    assert why_not(meta, meta.new_cache(1, 8)) == "records calls on a CPU (found: meta)"
    monkeypatch.setattr("hanok.engine.native_steps.native", lambda: None)
    assert why_not(decoder, cache) == "our kernels are not there"


def test_recording_imports_nothing() -> None:
    """A first import of torch's compiler takes a second, in the middle of an answer."""
    code = (
        "import sys, hanok; model = hanok.load(hanok.BUNDLED); model.generate([5], max_new_tokens=2)\n"
        "before = set(sys.modules); model.generate([5], max_new_tokens=6, ignore_eos=True)\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
