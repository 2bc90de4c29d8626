"""Our CPU kernel for attention: every instruction set, every cache, the same bits whatever is beside it.

`test_backends.py` holds it against the other backends.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.attention import native as module
from hanok.attention.base import AttentionSpec, ForwardBatch, backends, reference
from hanok.attention.cache import KVCache, LayerState
from hanok.attention.native import NativeAttention
from hanok.attention.state import KeysAndValues
from hanok.kernels.native import Native

CPU = torch.device("cpu")
SETTINGS = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)


@pytest.fixture
def backend(kernels: Native, monkeypatch: pytest.MonkeyPatch) -> NativeAttention:
    """The backend on one instruction set."""
    monkeypatch.setattr(module, "native_for", lambda *tensors: kernels)
    return NativeAttention()


class Case:
    """Sequences with what came before, drawn once; and a cache that holds it."""

    def __init__(
        self,
        spec: AttentionSpec,
        past: list[int],
        new: list[int],
        *,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int, heads: int) -> Tensor:
            return torch.randn(count, heads, spec.head_dim, generator=generator).to(dtype)

        self.spec, self.past, self.new, self.dtype = spec, past, new, dtype
        self.cache_dtype = cache_dtype or dtype
        lengths = [p + n for p, n in zip(past, new, strict=True)]
        self.q = [draw(n, spec.num_heads) for n in lengths]
        self.k = [draw(n, spec.num_kv_heads) for n in lengths]
        self.v = [draw(n, spec.num_kv_heads) for n in lengths]
        self.slots = list(range(len(past)))[::-1]  # not in turn

    def state(self) -> LayerState:
        layer = KeysAndValues(num_kv_heads=self.spec.num_kv_heads, head_dim=self.spec.head_dim)
        capacity = max(len(item) for item in self.k) + 2
        cache = KVCache(
            [layer],
            num_sequences=len(self.past) + 1,
            capacity=capacity,
            dtype=self.cache_dtype,
            devices=[CPU],
        )
        for slot, start, k, v in zip(self.slots, self.past, self.k, self.v, strict=True):
            cache.states[0].extend((slot,), 0, k[:start].transpose(0, 1), v[:start].transpose(0, 1))
        return cache.states[0]

    def attend(
        self, backend: NativeAttention, state: LayerState | None, which: list[int] | None = None
    ) -> Tensor:
        """Return the outputs of some sequences, packed."""
        which = list(range(len(self.past))) if which is None else which
        parts = [
            torch.cat([items[i][self.past[i] :] for i in which])
            for items in (self.q, self.k, self.v)
        ]
        batch = ForwardBatch.of(
            [[0] * self.new[i] for i in which],
            past=[self.past[i] for i in which],
            slots=[self.slots[i] for i in which],
        )
        return backend.attend(*parts, self.spec, batch, state)

    def expected(self) -> Tensor:
        return torch.cat(
            [
                reference(q[p:], k.transpose(0, 1), v.transpose(0, 1), self.spec)
                for q, k, v, p in zip(self.q, self.k, self.v, self.past, strict=True)
            ]
        )


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 7, 8]))
    head_dim = draw(st.sampled_from([8, 16, 20, 64, 80, 96, 128, 256]))
    return AttentionSpec(
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        window=draw(st.sampled_from([None, None, 1, 5, 70])),
        softcap=draw(st.sampled_from([None, None, 3.0])),
    )


sequences = st.lists(
    st.tuples(st.sampled_from([0, 0, 3, 63, 130]), st.sampled_from([1, 1, 4, 9, 40])),
    min_size=1,
    max_size=3,
)


@SETTINGS
@given(spec=specs(), shape=sequences, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_the_reference(
    backend: NativeAttention,
    spec: AttentionSpec,
    shape: list[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    case = Case(spec, [p for p, _ in shape], [n for _, n in shape], dtype=dtype)
    state = case.state()
    found = case.attend(backend, state)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), case.expected(), atol=tolerance, rtol=0)
    for slot, k, v in zip(case.slots, case.k, case.v, strict=True):
        assert torch.equal(state.keys[slot, :, : len(k)], k.transpose(0, 1))
        assert torch.equal(state.values[slot, :, : len(v)], v.transpose(0, 1))


@SETTINGS
@given(spec=specs(), lengths=st.lists(st.sampled_from([1, 2, 40, 70]), min_size=1, max_size=3))
def test_without_a_cache_it_is_the_reference(
    backend: NativeAttention, spec: AttentionSpec, lengths: list[int]
) -> None:
    case = Case(spec, [0] * len(lengths), lengths)
    torch.testing.assert_close(case.attend(backend, None), case.expected(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("new", [1, 4, 9])
def test_contexts_longer_than_a_split(backend: NativeAttention, new: int) -> None:
    for window in (None, 1500):
        spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, window=window)
        case = Case(spec, [2300, 1023, 5], [new, new, new])
        found = case.attend(backend, case.state())
        torch.testing.assert_close(found, case.expected(), atol=1e-5, rtol=0)


@SETTINGS
@given(spec=specs(), shape=sequences)
def test_an_int8_cache_holds_each_head_to_127_steps(
    backend: NativeAttention, spec: AttentionSpec, shape: list[tuple[int, int]]
) -> None:
    past, new = [p for p, _ in shape], [n for _, n in shape]
    case = Case(spec, past, new, cache_dtype=torch.int8)
    state = case.state()
    found = case.attend(backend, state)
    assert state.key_scale is not None
    assert state.value_scale is not None
    start = 0
    for index, slot in enumerate(case.slots):
        length = past[index] + new[index]
        kept = []
        for codes, scale, exact in (
            (state.keys, state.key_scale, case.k[index]),
            (state.values, state.value_scale, case.v[index]),
        ):
            largest = exact.abs().amax(-1).t()
            torch.testing.assert_close(scale[slot, :, :length], largest / 127)
            wide = codes[slot, :, :length] * scale[slot, :, :length, None]
            error = (wide - exact.transpose(0, 1)).abs().amax(-1)
            assert bool((error <= largest / 127 * 0.5001 + 1e-6).all())
            kept.append(wide)
        queries = case.q[index][past[index] :]
        wanted = reference(queries, kept[0], kept[1], spec)
        part = found[start : start + new[index]]
        torch.testing.assert_close(part, wanted, atol=1e-5, rtol=0)
        start += new[index]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_other_backends_read_an_int8_cache_too(name: str) -> None:
    case = Case(PLAIN, [40, 3], [1, 5], cache_dtype=torch.int8)
    batch = ForwardBatch.of([[0], [0] * 5], past=case.past, slots=case.slots)
    parts = [
        torch.cat([item[p:] for item, p in zip(items, case.past, strict=True)])
        for items in (case.q, case.k, case.v)
    ]
    found = backends()[name].attend(*parts, PLAIN, batch, case.state())
    torch.testing.assert_close(found, case.expected(), atol=3e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
def test_a_sequence_alone_is_the_sequence_in_company(
    backend: NativeAttention, window: int | None, dtype: torch.dtype
) -> None:
    spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=32, scale=0.2, window=window)
    case = Case(spec, [1100, 0, 63, 5], [1, 30, 4, 9], dtype=dtype)
    together = case.attend(backend, case.state()).split(case.new)
    for index, part in enumerate(together):
        assert torch.equal(part, case.attend(backend, case.state(), [index]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_is_many_passes(backend: NativeAttention, dtype: torch.dtype) -> None:
    """Over the borders of blocks, of splits, and of few and many queries."""
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, window=1030)
    whole = Case(spec, [0], [1300], dtype=dtype)
    expected = whole.attend(backend, whole.state())
    state, found, start = whole.state(), [], 0
    for count in (1, 1, 6, 60, 300, 8, 9, 640, 2, 1, 272):
        parts = [items[0][start : start + count] for items in (whole.q, whole.k, whole.v)]
        batch = ForwardBatch.of([[0] * count], past=[start], slots=whole.slots)
        found.append(backend.attend(*parts, spec, batch, state))
        start += count
    assert start == 1300
    assert torch.equal(torch.cat(found), expected)


def test_threads_change_no_bit(
    backend: NativeAttention, with_threads: Callable[[int], None]
) -> None:
    case = Case(PLAIN, [2100, 0, 7], [1, 40, 3])
    answers = []
    for count in (1, 2, 3):
        with_threads(count)
        answers.append(case.attend(backend, case.state()))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_what_is_no_number_is_not_hidden(backend: NativeAttention) -> None:
    case = Case(PLAIN, [0], [20])
    case.q[0][3, 1] = float("nan")
    found = case.attend(backend, case.state())
    assert found[3, 1].isnan().all()
    assert found[3, 0].isfinite().all()
    assert found[4:].isfinite().all()


def test_gradients_are_left_to_a_backend_that_has_them() -> None:
    case = Case(PLAIN, [0], [6])
    q, k, v = (items[0].clone().requires_grad_() for items in (case.q, case.k, case.v))
    batch = ForwardBatch.of([[0] * 6])
    backends()["native"].attend(q, k, v, PLAIN, batch, None).square().sum().backward()
    wide = [item.detach().double().requires_grad_() for item in (q, k, v)]
    reference(
        wide[0], wide[1].transpose(0, 1), wide[2].transpose(0, 1), PLAIN
    ).square().sum().backward()
    for item, exact in zip((q, k, v), wide, strict=True):
        assert item.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(item.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_what_would_be_read_out_of_bounds_is_refused(backend: NativeAttention) -> None:
    case = Case(PLAIN, [3], [2])
    state = case.state()
    q, k, v = (items[0][3:] for items in (case.q, case.k, case.v))
    batch = ForwardBatch.of([[0, 0]], past=[3])
    with pytest.raises(ValueError, match="for 2 tokens"):
        backend.attend(q[:1], k, v, PLAIN, batch, state)
    with pytest.raises(ValueError, match="for 2 tokens"):
        backend.attend(q, k[:, :1], v[:, :1], PLAIN, batch, state)
    with pytest.raises(ValueError, match="for 2 tokens"):
        backend.attend(q, k, v[:1], PLAIN, batch, state)
    with pytest.raises(ValueError, match=r"v torch\.bfloat16"):
        backend.attend(q, k, v.bfloat16(), PLAIN, batch, state)
    with pytest.raises(ValueError, match="there is no cache"):
        backend.attend(q, k, v, PLAIN, batch, None)
    with pytest.raises(ValueError, match=r"9 keys in blocks .* of 2 x 7"):
        backend.attend(q, k, v, PLAIN, ForwardBatch.of([[0, 0]], past=[7]), state)
    with pytest.raises(ValueError, match="of 2 x 7"):
        backend.attend(q, k, v, PLAIN, ForwardBatch.of([[0, 0]], past=[3], slots=[2]), state)
    with pytest.raises(ValueError, match="of 2 x 7"):
        backend.attend(q, k, v, PLAIN, ForwardBatch.of([[0, 0]], slots=[-1]), state)
    for heads, size in ((1, 16), (2, 8)):
        narrow = KeysAndValues(num_kv_heads=heads, head_dim=size)
        other = KVCache([narrow], num_sequences=2, capacity=7, dtype=torch.float32, devices=[CPU])
        with pytest.raises(ValueError, match=f"the cache has {heads} heads of {size}"):
            backend.attend(q, k, v, PLAIN, ForwardBatch.of([[0, 0]]), other.states[0])
    with pytest.raises(ValueError, match=r"the queries are torch\.bfloat16"):
        backend.attend(*(item.bfloat16() for item in (q, k, v)), PLAIN, batch, state)


def test_where_it_does_not_fit_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = NativeAttention()
    assert "runs on a CPU (found: cuda)" in str(
        backend.why_not(PLAIN, torch.device("cuda"), torch.float32)
    )
    assert "found: float16" in str(backend.why_not(PLAIN, CPU, torch.float16))
    monkeypatch.setattr(module, "native", lambda: None)
    assert "the kernels are" in str(backend.why_not(PLAIN, CPU, torch.float32))
