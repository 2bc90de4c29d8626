"""On a processor without bfloat16 instructions no product of many 16-bit rows is left to torch.

torch multiplies them there a hundred times slower than float32. The processor is simulated: the kernels
are capped, the instructions are denied, and oneDNN, which would have them, is off.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hanok
from hanok.attention.base import AttentionSpec, ForwardBatch, choose
from hanok.kernels import native as native_module
from hanok.kernels import processor
from hanok.kernels.processor import FEW_ROWS, multiplies

NARROW = (torch.bfloat16, torch.float16)
PROMPT = list(range(5, 45))
# torch's operators that multiply, by the argument whose rows they are.
ROWS_OF = {
    "linear": 0,
    "matmul": 0,
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "baddbmm": 1,
    "scaled_dot_product_attention": 0,
    "_scaled_dot_product_attention_math": 0,
    "_scaled_dot_product_flash_attention_for_cpu": 0,
}


class Watch(TorchDispatchMode):
    """Remembers products of many 16-bit rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.products = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ROWS_OF:
            self.products += 1
            left: Tensor = args[ROWS_OF[name]]
            if left.dtype in NARROW and left.shape[-2] > FEW_ROWS:
                self.found.append(f"{name} of {left.dtype} {tuple(left.shape)}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["our kernels", "torch alone"])
def old_processor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setenv(processor.CAP, "avx2")
    monkeypatch.setattr(processor, "is_x86", lambda: True)
    if request.param == "torch alone":
        monkeypatch.setattr(native_module, "instruction_sets", lambda: ())
    caches = (native_module.instruction_sets, processor.has_bfloat16_instructions)
    for item in caches:
        getattr(item, "cache_clear", lambda: None)()
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(was_enabled)
    monkeypatch.undo()
    for item in (native_module.instruction_sets, processor.has_bfloat16_instructions):
        item.cache_clear()


def watched(action: Callable[[], object]) -> Watch:
    with Watch() as watch:
        action()
    return watch


def test_the_watch_sees_what_it_looks_for() -> None:
    x, weight = torch.ones(FEW_ROWS + 1, 4).bfloat16(), torch.ones(3, 4).bfloat16()
    assert watched(lambda: torch.nn.functional.linear(x, weight)).found
    assert not watched(lambda: torch.nn.functional.linear(x[1:], weight)).found
    with torch.inference_mode():
        q = x.view(1, 1, -1, 4)
        attend = torch.nn.functional.scaled_dot_product_attention
        assert watched(lambda: attend(q, q, q)).found


@pytest.mark.parametrize("attention", ["native", "eager", "sdpa", "sdpa_math", "sdpa_flash"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_text_is_generated_and_scored_without_one(
    old_processor: None, attention: str, dtype: str
) -> None:
    if attention == "native" and (native_module.native() is None or dtype == "float16"):
        pytest.skip("our kernels are not there, or do not compute in float16")
    model = hanok.load(hanok.BUNDLED, dtype=dtype, attn_implementation=attention)

    def use() -> None:
        model.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
        model.generate([PROMPT] * 2, max_new_tokens=2, ignore_eos=True)
        model.score(PROMPT)

    watch = watched(use)
    assert watch.found == []
    assert watch.products or native_module.native() is not None


@pytest.mark.parametrize("quant", ["int8", "int4", "nf4", "fp8", "int8-outlier"])
def test_quantized_weights_are_multiplied_without_one(old_processor: None, quant: str) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="bfloat16", quant=quant)
    assert watched(lambda: model.generate(PROMPT, max_new_tokens=2)).found == []


def test_quality_is_measured_without_one(old_processor: None) -> None:
    text = "Once upon a time there was a little girl who had a red ball. " * 3
    model = hanok.load(hanok.BUNDLED, dtype="bfloat16")
    watch = watched(
        lambda: hanok.measure_quality(
            hanok.BUNDLED, ["int8"], text=text, dtype=str(model.decoder.dtype)[6:], max_tokens=40
        )
    )
    assert watch.found == []


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [4, 16])
def test_widened_attention_is_the_attention(old_processor: None, name: str, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    spec = AttentionSpec(num_heads=heads, num_kv_heads=1, head_dim=32, scale=0.2)
    q = torch.randn(20, heads, 32, generator=generator).bfloat16()
    k, v = (torch.randn(20, 1, 32, generator=generator).bfloat16() for _ in range(2))
    backend = choose(name, spec, q.device, q.dtype)
    batch = ForwardBatch.of([list(range(20))])
    answer = backend.attend(q, k, v, spec, batch, None)
    assert answer.dtype is torch.bfloat16
    exact = backend.attend(q.float(), k.float(), v.float(), spec, batch, None)
    # In float32 throughout and rounded once: at most half of the last of 8 bits.
    torch.testing.assert_close(answer.float(), exact, rtol=2**-8, atol=1e-6)


def test_only_numbers_of_16_bits_on_such_a_processor_are_to_be_widened(old_processor: None) -> None:
    cpu = torch.device("cpu")
    assert not multiplies(torch.bfloat16, cpu)
    assert not multiplies(torch.float16, cpu)
    assert multiplies(torch.float32, cpu)
    assert multiplies(torch.bfloat16, torch.device("meta"))
