"""Every product of `dense` against float64, and which one is chosen.

Tolerance: what bfloat16 rounding of the result costs, 2**-8 of it, and of a bias added after rounding;
float32 sums over at most 300 products of the order of 1 add less than 1e-4.
"""

import platform
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.kernels import processor
from hanok.kernels.native import native
from hanok.models import linear
from hanok.models.config import LayerConfig, Mlp, ModelConfig, Norm, Rope, SoftmaxAttention
from hanok.models.decoder import Decoder
from hanok.models.linear import Linear, Product, choose_product, dense

BFLOAT16_TOLERANCE = {"rtol": 2**-7, "atol": 2e-2}
# Sums and bias in float32, rounded once: half of the last of 8 bits, and what the sums may err by.
ROUNDED_ONCE = {"rtol": 2**-8, "atol": 1e-4}
FLOAT32_TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}
PRODUCTS: tuple[Product, ...] = get_args(Product)
NATIVE_TOKENS = 8

quick = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x.double() @ weight.double().t()
    return product if bias is None else product + bias.double()


def limit_of(product: Product) -> int:
    return {"native": NATIVE_TOKENS, "vector": 1}.get(product, 40)


def force(monkeypatch: pytest.MonkeyPatch, product: Product) -> None:
    if product == "native" and native() is None:
        pytest.skip("the kernels were not built on this machine")
    monkeypatch.setattr(linear, "choose_product", lambda weight, num_tokens: product)


@pytest.mark.parametrize("product", PRODUCTS)
@quick
@given(
    tokens=st.integers(1, 12) | st.just(33),
    rows=st.sampled_from([1, 2, 3, 5, 31, 33, 64, 255, 257, 513]),
    columns=st.sampled_from([1, 3, 31, 32, 33, 65, 96, 255, 300]),
    has_bias=st.booleans(),
)
@example(tokens=33, rows=1025, columns=3, has_bias=True)  # more rows than one widened block
def test_each_product_is_the_product_in_float64(
    product: Product,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    rows: int,
    columns: int,
    has_bias: bool,
) -> None:
    force(monkeypatch, product)
    x, weight = (
        random(min(tokens, limit_of(product)), columns, seed=1),
        random(rows, columns, seed=2),
    )
    bias = random(rows, seed=3) if has_bias else None
    answer = dense(x, weight, bias)
    assert answer.dtype is torch.bfloat16
    tolerance = ROUNDED_ONCE if product in ("native", "widened") else BFLOAT16_TOLERANCE
    torch.testing.assert_close(answer.double(), wide(x, weight, bias), **tolerance)


@pytest.mark.parametrize("has_bias", [False, True])
@quick
@given(tokens=st.integers(0, 12), rows=st.integers(1, 40), columns=st.integers(1, 70))
def test_float32_is_the_product_in_float64(
    has_bias: bool, tokens: int, rows: int, columns: int
) -> None:
    x = random(tokens, columns, seed=1, dtype=torch.float32)
    weight = random(rows, columns, seed=2, dtype=torch.float32)
    bias = random(rows, seed=3, dtype=torch.float32) if has_bias else None
    answer = dense(x, weight, bias)
    torch.testing.assert_close(answer.double(), wide(x, weight, bias), **FLOAT32_TOLERANCE)


# What each product calls, and nothing else of these.
CALLS: dict[Product, tuple[object, str]] = {
    "native": (linear, "_native"),
    "vector": (torch, "mv"),
    "torch without oneDNN": (linear, "_without_onednn"),
    "widened": (linear, "_widened"),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_chosen_product_is_the_one_that_is_computed(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, product)
    called: list[str] = []

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def spy(*arguments: Tensor) -> Tensor:
            called.append(name)
            return real(*arguments)

        monkeypatch.setattr(owner, name, spy)

    for owner, name in CALLS.values():
        watch(owner, name)
    dense(random(1, 8, seed=1), random(4, 8, seed=2))
    assert called == ([CALLS[product][1]] if product in CALLS else [])


@pytest.mark.parametrize(("tokens", "block"), [(2, 4), (3, 8)])
def test_no_more_than_a_block_of_rows_is_widened_at_a_time(
    tokens: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, "widened")
    sizes = {"FEW_TOKENS": 2, "FEW_TOKENS_ROWS": 4, "MANY_TOKENS_ROWS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(linear, name, size)
    made: list[tuple[int, ...]] = []
    real = torch.empty

    def spy(*shape: int) -> Tensor:
        made.append(shape)
        return real(*shape)

    monkeypatch.setattr(torch, "empty", spy)
    x, weight, bias = random(tokens, 5, seed=1), random(19, 5, seed=2), random(19, seed=3)
    answer = dense(x, weight, bias)
    assert made == [(block, 5)]
    torch.testing.assert_close(answer.double(), wide(x, weight, bias), **ROUNDED_ONCE)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("product", "tokens"), [("vector", 1), ("widened", 3), ("widened", 40)])
def test_the_number_of_threads_changes_rounding_alone(
    product: Product,
    tokens: int,
    with_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, product)
    x, weight, bias = random(tokens, 300, seed=1), random(1030, 300, seed=2), random(1030, seed=3)
    answers = []
    for count in (1, 2, 3):
        with_threads(count)
        answers.append(dense(x, weight, bias).double())
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("has_bias", [False, True])
def test_no_tokens_give_no_rows(has_bias: bool) -> None:
    bias = random(64, seed=3) if has_bias else None
    assert dense(random(0, 96, seed=1), random(64, 96, seed=2), bias).shape == (0, 64)


@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_an_input_of_another_width_is_refused(tokens: int) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        dense(random(tokens, 32, seed=1), random(16, 64, seed=2))


def test_the_switch_for_onednn_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "torch without oneDNN")
    seen: list[bool] = []
    real = linear.F.linear

    def spy(*arguments: Tensor) -> Tensor:
        seen.append(torch._C._get_mkldnn_enabled())
        return real(*arguments)

    monkeypatch.setattr(linear.F, "linear", spy)
    before = torch._C._get_mkldnn_enabled()
    dense(random(1, 8, seed=1), random(4, 8, seed=2))
    assert seen == [False]
    assert torch._C._get_mkldnn_enabled() is before
    with pytest.raises(RuntimeError):
        dense(random(1, 7, seed=1), random(4, 8, seed=2))
    assert torch._C._get_mkldnn_enabled() is before


class Machine:
    """Which kernels, which processor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch

    def __call__(
        self,
        *,
        built: bool,
        machine: str = "x86_64",
        bfloat16: bool = False,
        halves: bool = False,
        dense_tokens: int = NATIVE_TOKENS,
    ) -> None:
        kernels = SimpleNamespace(dense_tokens=dense_tokens) if built else None
        self.patch.setattr(linear, "native", lambda: kernels)
        self.patch.setattr(processor, "has_bfloat16_instructions", lambda: bfloat16)
        self.patch.setattr(processor, "halves_bfloat16", lambda: halves)
        self.patch.setattr(platform, "machine", lambda: machine)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("built", "machine", "bfloat16", "tokens", "product"),
    [
        (True, "x86_64", True, 1, "native"),
        (True, "x86_64", False, 8, "native"),
        (True, "aarch64", False, 8, "native"),
        (True, "x86_64", True, 9, "torch"),
        (True, "x86_64", False, 9, "widened"),
        (True, "x86_64", False, 0, "widened"),
        (False, "x86_64", True, 1, "torch without oneDNN"),
        (False, "x86_64", True, 2, "torch"),
        (False, "x86_64", False, 1, "vector"),
        (False, "AMD64", False, 1, "vector"),
        (False, "x86_64", False, 2, "widened"),
        (False, "aarch64", False, 1, "torch"),
        (True, "aarch64", False, 9, "torch"),
    ],
)
def test_the_processor_the_build_and_the_tokens_choose_the_product(
    on: Machine, built: bool, machine: str, bfloat16: bool, tokens: int, product: Product
) -> None:
    on(built=built, machine=machine, bfloat16=bfloat16)
    weight = random(4, 8, seed=1)
    assert choose_product(weight, tokens) == product
    assert choose_product(weight.float(), tokens) == ("native" if product == "native" else "torch")
    assert choose_product(weight.to("meta"), tokens) == "torch"
    assert choose_product(weight.clone().requires_grad_(), tokens) == product


@pytest.mark.parametrize(("tokens", "product"), [(8, "native"), (32, "torch"), (33, "widened")])
def test_many_tokens_are_widened_where_bfloat16_has_half_the_rate(
    on: Machine, tokens: int, product: Product
) -> None:
    on(built=True, bfloat16=True, halves=True)
    assert choose_product(random(4, 8, seed=1), tokens) == product


@pytest.mark.parametrize("tokens", [1, 9, 512])
def test_kernels_that_take_any_number_of_tokens_are_given_all(on: Machine, tokens: int) -> None:
    on(built=True, dense_tokens=2**63 - 1)
    weight = random(4, 8, seed=1)
    assert choose_product(weight, tokens) == choose_product(weight.float(), tokens) == "native"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_float16_is_widened_where_torch_is_slow_with_it(on: Machine, machine: str) -> None:
    on(built=True, machine=machine, bfloat16=True)
    weight = random(4, 8, seed=1).half()
    slow = machine == "x86_64"
    assert choose_product(weight, 9) == ("widened" if slow else "torch")
    assert choose_product(weight, 1) == ("vector" if slow else "torch")


def test_a_transposed_weight_is_not_given_to_the_kernel(on: Machine) -> None:
    on(built=True)
    assert choose_product(random(8, 4, seed=1).t(), 1) == "vector"


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", ["all", "x", "weight", "bias"])
def test_gradients_reach_whatever_asks_for_them(
    learned: str, dtype: torch.dtype, tokens: int, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the input alone too, as where the weights are frozen."""
    if not built:
        monkeypatch.setattr(linear, "native", lambda: None)
    # More rows than a widened block has.
    parts = {
        "x": random(tokens, 33, seed=1, dtype=dtype),
        "weight": random(300, 33, seed=2, dtype=dtype),
        "bias": random(300, seed=3, dtype=dtype),
    }
    oracle = {name: part.double() for name, part in parts.items()}
    for name in parts if learned == "all" else (learned,):
        parts[name].requires_grad_()
        oracle[name].requires_grad_()
    upstream = random(tokens, 300, seed=4, dtype=dtype)
    dense(**parts).backward(upstream)
    wide(**oracle).backward(upstream.double())
    tolerance = FLOAT32_TOLERANCE if dtype is torch.float32 else {"rtol": 2**-6, "atol": 6e-2}
    for name, part in parts.items():
        assert (part.grad is None) == (oracle[name].grad is None)
        if part.grad is not None:
            torch.testing.assert_close(part.grad.double(), oracle[name].grad, **tolerance)


def test_the_module_multiplies_with_its_own_weight_and_bias() -> None:
    layer = Linear(5, 3, has_bias=True)
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_(torch.arange(15.0).view(3, 5))
        layer.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
    assert layer(torch.eye(5)[:1]).tolist() == [[10.0, 25.0, 40.0]]
    assert Linear(5, 3).bias is None


@pytest.fixture
def decoder() -> Decoder:
    rope = Rope(theta=10000.0, rotary_dim=16)
    mixer = SoftmaxAttention(num_heads=4, num_kv_heads=2, head_dim=16, rope=rope)
    mlp = Mlp(intermediate_size=96, activation="silu")
    config = ModelConfig(
        model_type="llama",
        vocab_size=67,
        hidden_size=64,
        max_positions=64,
        norm=Norm(kind="rms", eps=1e-5),
        layers=(LayerConfig(mixer=mixer, mlp=mlp),) * 2,
    )
    made = Decoder(config)
    made.initialise(0.15, torch.Generator().manual_seed(3))
    return made.to(torch.bfloat16)


@torch.inference_mode()
def greedy(decoder: Decoder, tokens: list[int], count: int) -> tuple[list[int], Tensor]:
    cache = decoder.new_cache(1, len(tokens) + count)
    made: list[int] = []
    rows, new = [], tokens
    for _ in range(count):
        hidden = decoder(ForwardBatch.of([new], past=[cache.lengths[0]]), cache)
        rows.append(decoder.logits(hidden[-1:])[0])
        new = [int(rows[-1].argmax())]
        made += new
    return made, torch.stack(rows)


def test_a_decoder_says_the_same_without_the_kernels(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native() is None:
        pytest.skip("the kernels were not built on this machine")
    calls: list[Tensor] = []
    real: Callable[..., Tensor] = linear._native

    def spy(*arguments: Tensor) -> Tensor:
        calls.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(linear, "_native", spy)
    built, built_logits = greedy(decoder, [3, 9, 27, 14], 10)
    assert calls
    calls.clear()
    monkeypatch.setattr(linear, "native", lambda: None)
    plain, plain_logits = greedy(decoder, [3, 9, 27, 14], 10)
    assert not calls
    assert built == plain
    assert len(set(built)) > 2  # tokens that could differ
    torch.testing.assert_close(built_logits, plain_logits, atol=0.1, rtol=0)
