"""Every attention backend against `reference`, and how one is chosen.

Tolerances: entries are drawn from N(0, 1), so outputs are of the order of 1. In float32 only the order
of sums differs, over at most 24 products and 40 keys: a few 1e-7, and 1e-5 leaves room. In bfloat16
scores and weights are rounded to 8 bits: an error of 2**-9 for scores of the order of 4, twice.
"""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanok.attention import eager, native, sdpa
from hanok.attention.base import (
    AttentionSpec,
    ForwardBatch,
    backends,
    choose,
    reference,
    visible,
    why_not_table,
)
from hanok.attention.cache import KVCache
from hanok.attention.state import KeysAndValues
from hanok.errors import OptionError, UnsupportedError

FLOAT32_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 5e-2
CPU = torch.device("cpu")
PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
FITTING = [name for name, reason in why_not_table(PLAIN, CPU, torch.float32).items() if not reason]
CHUNKED: dict[str, ModuleType] = {"eager": eager, "sdpa": sdpa}

grid = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([8, 16, 24]))
    return AttentionSpec(
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=draw(st.sampled_from([head_dim**-0.5, 0.1])),
        window=draw(st.sampled_from([None, 1, 3, 5, 9, 64])),
        softcap=draw(st.sampled_from([None, None, 1.5])),
    )


# (past, new) tokens of each sequence; lengths cross chunks of 4 more than once.
sequences = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 5, 11]), st.sampled_from([1, 1, 2, 4, 9, 13])),
    min_size=1,
    max_size=3,
)


def draw_heads(spec: AttentionSpec, tokens: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return [torch.randn(tokens, n, spec.head_dim, generator=generator).to(dtype) for n in heads]


def batch_of(lengths: list[int], past: list[int] | None = None) -> ForwardBatch:
    return ForwardBatch.of([[0] * length for length in lengths], past=past)


def one_cache(spec: AttentionSpec, num_sequences: int, dtype: torch.dtype) -> KVCache:
    """A cache of one layer, full of NaN: what is read without having been written shows."""
    layer = KeysAndValues(num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
    cache = KVCache([layer], num_sequences=num_sequences, capacity=32, dtype=dtype, devices=[CPU])
    cache.states[0].keys.fill_(float("nan"))
    cache.states[0].values.fill_(float("nan"))
    return cache


def expected_of(parts: list[list[Tensor]], past: list[int], spec: AttentionSpec) -> Tensor:
    """`reference` for the tokens after `past` of each whole sequence, packed."""
    outputs = []
    for (q, k, v), start in zip(parts, past, strict=True):
        outputs.append(reference(q[start:], k.transpose(0, 1), v.transpose(0, 1), spec))
    return torch.cat(outputs)


def run_cached(
    name: str, spec: AttentionSpec, shape: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what a backend answers after `past` tokens went into a cache, and the right answer."""
    past, new = [p for p, _ in shape], [n for _, n in shape]
    parts = [draw_heads(spec, p + n, seed, dtype) for seed, (p, n) in enumerate(shape)]
    cache = one_cache(spec, len(shape), dtype)
    for slot, (part, start) in enumerate(zip(parts, past, strict=True)):
        _, k, v = part
        cache.states[0].extend((slot,), 0, k[:start].transpose(0, 1), v[:start].transpose(0, 1))
    packed = [
        torch.cat([part[i][start:] for part, start in zip(parts, past, strict=True)])
        for i in range(3)
    ]
    answer = backends()[name].attend(*packed, spec, batch_of(new, past), cache.states[0])
    return answer, expected_of(parts, past, spec)


def served(name: str, spec: AttentionSpec) -> AttentionSpec:
    """The spec, without its softcap where the backend cannot serve one."""
    return (
        spec
        if backends()[name].why_not(spec, CPU, torch.float32) is None
        else replace(spec, softcap=None)
    )


def test_each_visible_key_is_a_position_not_after_the_query_and_inside_the_window() -> None:
    seen = visible(3, 5, 2, CPU)
    assert seen.tolist() == [
        [False, True, True, False, False],
        [False, False, True, True, False],
        [False, False, False, True, True],
    ]
    assert visible(2, 3, None, CPU).tolist() == [[True, True, False], [True, True, True]]


def test_the_reference_is_a_weighted_mean_written_out_in_loops() -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=3, scale=0.7, window=3, softcap=1.2)
    q, k, v = (item.double() for item in draw_heads(spec, 6, 1, torch.float32))
    rows = torch.zeros(4, 4, 3, dtype=torch.float64)
    for token in range(4):
        position = token + 2
        for head in range(4):
            group = head // 2
            keys = [key for key in range(6) if key <= position and position - key < 3]
            scores = [
                torch.exp(1.2 * torch.tanh(q[position, head] @ k[key, group] * 0.7 / 1.2))
                for key in keys
            ]
            for key, score in zip(keys, scores, strict=True):
                rows[token, head] += score / sum(scores) * v[key, group]
    answer = reference(q[2:], k.transpose(0, 1), v.transpose(0, 1), spec)
    torch.testing.assert_close(answer.double(), rows, atol=FLOAT32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("name", FITTING)
@grid
@given(spec=specs(), shape=sequences)
def test_a_backend_with_a_cache_is_the_reference(
    name: str,
    chunk: int | None,
    monkeypatch: pytest.MonkeyPatch,
    spec: AttentionSpec,
    shape: list[tuple[int, int]],
) -> None:
    if chunk is not None:
        for module in CHUNKED.values():
            monkeypatch.setattr(module, "CHUNK", chunk)
    answer, expected = run_cached(name, served(name, spec), shape, torch.float32)
    torch.testing.assert_close(answer, expected, atol=FLOAT32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("name", FITTING)
@grid
@given(spec=specs(), lengths=st.lists(st.sampled_from([1, 2, 7, 13]), min_size=1, max_size=3))
def test_a_backend_without_a_cache_is_the_reference(
    name: str,
    chunk: int | None,
    monkeypatch: pytest.MonkeyPatch,
    spec: AttentionSpec,
    lengths: list[int],
) -> None:
    if chunk is not None:
        for module in CHUNKED.values():
            monkeypatch.setattr(module, "CHUNK", chunk)
    spec = served(name, spec)
    for shape in (lengths, lengths[:1] * 2):  # of unequal and of equal length
        parts = [draw_heads(spec, n, seed, torch.float32) for seed, n in enumerate(shape)]
        packed = [torch.cat([part[i] for part in parts]) for i in range(3)]
        answer = backends()[name].attend(*packed, spec, batch_of(shape), None)
        expected = expected_of(parts, [0] * len(shape), spec)
        torch.testing.assert_close(answer, expected, atol=FLOAT32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FITTING)
@grid
@given(spec=specs(), lengths=st.lists(st.sampled_from([1, 3, 7, 13]), min_size=1, max_size=6))
def test_a_document_in_a_pack_is_trained_as_alone(
    name: str, spec: AttentionSpec, lengths: list[int]
) -> None:
    """Its outputs and gradients, whatever lies beside it: of other lengths, of the same, between."""
    spec = served(name, spec)
    parts = [draw_heads(spec, n, seed, torch.float32) for seed, n in enumerate(lengths)]
    packed = [torch.cat([part[i] for part in parts]).requires_grad_() for i in range(3)]
    upstream = draw_heads(spec, sum(lengths), 99, torch.float32)[0]
    answer = backends()[name].attend(*packed, spec, batch_of(lengths), None)
    answer.backward(upstream)
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        here = slice(start, start + length)
        alone = [item.double().requires_grad_() for item in part]
        q, k, v = alone
        expected = reference(q, k.transpose(0, 1), v.transpose(0, 1), spec, torch.float64)
        expected.backward(upstream[here].double())
        torch.testing.assert_close(answer[here].double(), expected, atol=FLOAT32_TOLERANCE, rtol=0)
        for whole, mine in zip(packed, alone, strict=True):
            assert whole.grad is not None
            assert mine.grad is not None
            torch.testing.assert_close(
                whole.grad[here].double(), mine.grad, atol=4 * FLOAT32_TOLERANCE, rtol=0
            )
        start += length


@pytest.mark.parametrize("name", FITTING)
@grid
@given(spec=specs(), shape=sequences)
def test_a_backend_in_bfloat16_is_close_and_answers_in_bfloat16(
    name: str, spec: AttentionSpec, shape: list[tuple[int, int]]
) -> None:
    answer, expected = run_cached(name, served(name, spec), shape, torch.bfloat16)
    assert answer.dtype is torch.bfloat16
    torch.testing.assert_close(answer.float(), expected, atol=BFLOAT16_TOLERANCE, rtol=2**-7)


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("num_tokens", [3, 4, 5])
def test_a_window_as_long_as_the_sequence_hides_nothing_and_a_shorter_one_does(
    name: str, num_tokens: int
) -> None:
    heads = draw_heads(PLAIN, num_tokens, 3, torch.float32)
    full = backends()[name].attend(*heads, PLAIN, batch_of([num_tokens]), None)
    limited = replace(PLAIN, window=4)
    windowed = backends()[name].attend(*heads, limited, batch_of([num_tokens]), None)
    assert torch.allclose(full, windowed, atol=FLOAT32_TOLERANCE) is (num_tokens <= 4)


def test_one_token_attends_whatever_the_order_of_bytes_that_torch_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def strided(*args: Tensor, **kwargs: float) -> Tensor:  # as a kernel for GPUs does
        output = torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)  # type: ignore[arg-type]  # only scale
        return output.transpose(1, 2).contiguous().transpose(1, 2)

    q, k, v = (torch.randn(1, heads, 16) for heads in (4, 2, 2))
    backend, batch = backends()["sdpa"], ForwardBatch.of([[0]], past=[0])
    cache = KVCache(
        [KeysAndValues(num_kv_heads=2, head_dim=16)],
        num_sequences=1,
        capacity=4,
        dtype=torch.float32,
        devices=[CPU],
    )
    expected = backend.attend(q, k, v, PLAIN, batch, cache.states[0])
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", strided)
    found = backend.attend(q, k, v, PLAIN, batch, cache.states[0])
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", FITTING)
def test_the_batch_is_written_to_its_own_slots_and_nowhere_else(name: str) -> None:
    cache = one_cache(PLAIN, 4, torch.float32)
    q, k, v = draw_heads(PLAIN, 5, 4, torch.float32)
    batch = ForwardBatch.of([[0] * 2, [0] * 3], slots=[3, 1])
    backends()[name].attend(q, k, v, PLAIN, batch, cache.states[0])
    state = cache.states[0]
    assert torch.equal(state.keys[3, :, :2], k[:2].transpose(0, 1))
    assert torch.equal(state.values[1, :, :3], v[2:].transpose(0, 1))
    assert state.keys[[0, 2]].isnan().all()
    assert state.values[3, :, 2:].isnan().all()


@pytest.mark.parametrize("new", [1, 3])
def test_shared_heads_read_the_cache_itself_and_no_copy(
    new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    real = sdpa.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        seen.append((key, value))
        return real(query, key, value, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", spy)
    cache = one_cache(PLAIN, 1, torch.float32)
    q, k, v = draw_heads(PLAIN, 6 + new, 5, torch.float32)
    state = cache.states[0]
    state.extend((0,), 0, k[:6].transpose(0, 1), v[:6].transpose(0, 1))
    backends()["sdpa"].attend(q[6:], k[6:], v[6:], PLAIN, batch_of([new], [6]), state)
    assert seen
    for key, value in seen:
        assert key.untyped_storage().data_ptr() == state.keys.untyped_storage().data_ptr()
        assert value.untyped_storage().data_ptr() == state.values.untyped_storage().data_ptr()


def test_auto_takes_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    capped = replace(PLAIN, softcap=30.0)
    if native.native() is not None:
        assert choose("auto", PLAIN, CPU, torch.float32).name == "native"
        assert choose("auto", capped, CPU, torch.bfloat16).name == "native"
    monkeypatch.setattr(native, "native", lambda: None)
    assert choose("auto", PLAIN, CPU, torch.float32).name == "sdpa"
    assert choose("auto", capped, CPU, torch.float32).name == "eager"


def test_an_unknown_name_is_an_option_error_that_lists_the_names_nearest_first() -> None:
    with pytest.raises(OptionError, match="attention 'eagre' is unknown") as caught:
        choose("eagre", PLAIN, CPU, torch.float32)
    message = str(caught.value)
    assert "Choose one of: auto, eager, " in message
    for name in backends():
        assert name in message


def test_where_the_chosen_backend_does_not_fit_the_error_has_every_reason() -> None:
    capped = replace(PLAIN, softcap=30.0)
    with pytest.raises(UnsupportedError) as caught:
        choose("sdpa", capped, CPU, torch.bfloat16)
    message = str(caught.value)
    assert "4 heads / 2 KV x 16, bfloat16, cpu" in message
    rows = {line.split()[0]: line for line in message.splitlines() if line.startswith("  ")}
    assert set(rows) == set(backends())
    for name, reason in why_not_table(capped, CPU, torch.bfloat16).items():
        assert (reason or "fits; it was excluded by attention=sdpa") in rows[name]


@pytest.mark.parametrize(
    ("name", "spec", "device", "dtype", "part"),
    [
        ("sdpa_efficient", PLAIN, "cpu", torch.float32, "needs a CUDA device (found: cpu)"),
        ("sdpa_flash", PLAIN, "cuda", torch.float32, "float16 or bfloat16 on a GPU"),
        ("sdpa_flash", replace(PLAIN, window=7), "cuda", torch.bfloat16, "window of 7"),
        ("sdpa_math", replace(PLAIN, softcap=2.5), "cpu", torch.float32, "softcap 2.5"),
        ("varlen", PLAIN, "cpu", torch.bfloat16, "needs a CUDA device (found: cpu)"),
        ("varlen", PLAIN, "cuda", torch.float32, "needs float16 or bfloat16 (found: float32)"),
        ("varlen", replace(PLAIN, softcap=2.5), "cuda", torch.bfloat16, "softcap 2.5"),
        ("varlen", replace(PLAIN, head_dim=20), "cuda", torch.bfloat16, "multiples of 8 up to 256"),
    ],
)
def test_a_backend_says_why_it_does_not_fit(
    name: str, spec: AttentionSpec, device: str, dtype: torch.dtype, part: str
) -> None:
    reason = backends()[name].why_not(spec, torch.device(device), dtype)
    assert reason is not None
    assert part in reason
