"""Our own CPU kernel: keys are read once for all the heads and queries that share them.

It appends to the cache and attends in one call, for any mix of sequences; long contexts are split among
threads by keys, many queries by queries. A token's result is the same bit for bit whatever else is in
the batch, in one pass or in several. Where a gradient is needed, and there is no cache, it computes
forward, and the next backend that fits backward; with a cache, and under torch.compile, that one takes
over.
"""

from collections.abc import Sequence
from ctypes import Array, addressof, c_int64
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hanok.attention.base import (
    AttentionSpec,
    ForwardBatch,
    HostLengths,
    PartialBackend,
    dense_heads,
)
from hanok.attention.cache import LayerState
from hanok.kernels.native import ITEM_TYPES, AttentionCall, native, native_for, why_not

BLOCK_MULTIPLE = 64  # keys that the kernel transposes at a time (cpp/attention.h), of one block


class NativeAttention(PartialBackend):
    """Online softmax over blocks of keys, in float32."""

    name = "native"
    summary = "our CPU kernel, keys read once for the heads that share them"
    recorded_on = "cpu"

    def why_not(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why our CPU kernel cannot serve such layers."""
        if device.type != "cpu":
            return f"runs on a CPU (found: {device.type})"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"needs float32 or bfloat16 (found: {str(dtype).removeprefix('torch.')})"
        return None if native() is not None else f"the kernels are {why_not()}"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        batch: ForwardBatch,
        state: LayerState | None,
    ) -> Tensor:
        """See `Backend.attend`."""
        kernels = native_for(q, k, v)
        if kernels is None:
            learns = state is None and native_for(q.detach(), k.detach(), v.detach()) is not None
            if learns:
                scored: Tensor = _Attend.apply(q, k, v, self, spec, batch)  # type: ignore[no-untyped-call]  # torch's
                return scored
            return self.other(spec, q).attend(q, k, v, spec, batch, state)
        host = batch.host
        _check(q, k, v, spec, host, state)
        q, k, v = dense_heads(q), dense_heads(k), dense_heads(v)
        output = torch.empty(q.shape, dtype=q.dtype)
        starts = (0, *accumulate(host.query_lengths))
        call = AttentionCall(
            q=q.data_ptr(),
            output=output.data_ptr(),
            num_sequences=len(host.query_lengths),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            q_token_stride=q.stride(0),
            window=spec.window or 0,
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            type=ITEM_TYPES[q.dtype],
        )
        if state is None:  # each token begins a block
            keys, values = k.contiguous(), v.contiguous()
            firsts: Sequence[int] = starts[:-1]
            block_starts: Sequence[int] = range(len(firsts))
            call.block_stride, call.block_keys = keys.stride(0), max(1, q.shape[0])
            call.key_token_stride, call.key_head_stride = keys.stride(0), spec.head_dim
        else:
            keys, values = state.keys, state.values
            firsts = [block for blocks in host.blocks for block in blocks]
            block_starts = (0, *accumulate(map(len, host.blocks)))
            call.block_stride, call.block_keys = keys.stride(0), keys.shape[2]
            call.key_token_stride, call.key_head_stride = keys.stride(2), keys.stride(1)
            call.new_keys, call.new_values = k.data_ptr(), v.data_ptr()
            call.new_key_stride, call.new_value_stride = k.stride(0), v.stride(0)
            if state.key_scale is not None and state.value_scale is not None:
                call.key_scale = state.key_scale.data_ptr()
                call.value_scale = state.value_scale.data_ptr()
        call.keys, call.values = keys.data_ptr(), values.data_ptr()
        call.cache_type = ITEM_TYPES[keys.dtype]
        counts, lengths = _array(host.query_lengths), _array(host.key_lengths)
        blocks, begins = _array(firsts), _array(block_starts)
        call.query_counts, call.key_counts = addressof(counts), addressof(lengths)
        call.blocks, call.block_starts = addressof(blocks), addressof(begins)
        kernels.attend(call, q, k, v, keys, values, counts, lengths, blocks, begins, output)
        return output


class _Attend(torch.autograd.Function):
    """Our kernel forward; backward the next backend, which computes the scores again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: NativeAttention,
        spec: AttentionSpec,
        batch: ForwardBatch,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.backend, ctx.spec, ctx.batch = backend, spec, batch
        return backend.attend(q, k, v, spec, batch, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = [part.detach().requires_grad_() for part in ctx.saved_tensors]
        with torch.enable_grad():
            other = ctx.backend.other(ctx.spec, parts[0])
            scored = other.attend(*parts, ctx.spec, ctx.batch, None)
            # As a sum: given a gradient, torch would import an algebra system.
            total = (scored * gradient).sum()
        return *torch.autograd.grad(total, parts), None, None, None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    batch: HostLengths,
    state: LayerState | None,
) -> None:
    """Raise ValueError where the kernel would read or write out of bounds: it only sees addresses."""
    tokens = sum(batch.query_lengths)
    kv_shape = (tokens, spec.num_kv_heads, spec.head_dim)
    is_shaped = q.shape == (tokens, spec.num_heads, spec.head_dim)
    if not is_shaped or not k.shape == v.shape == kv_shape:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} for {tokens} tokens"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}")
    if state is None:
        if batch.key_lengths != batch.query_lengths:
            raise ValueError("sequences have keys before this batch, but there is no cache")
        return
    num_blocks, num_kv_heads, block_keys, head_dim = state.keys.shape
    if (num_kv_heads, head_dim) != kv_shape[1:]:
        raise ValueError(f"the cache has {num_kv_heads} heads of {head_dim}, k is {tuple(k.shape)}")
    is_there = all(0 <= block < num_blocks for blocks in batch.blocks for block in blocks)
    has_room = all(
        length <= len(blocks) * block_keys
        for length, blocks in zip(batch.key_lengths, batch.blocks, strict=True)
    )
    if not is_there or not has_room:
        raise ValueError(
            f"{max(batch.key_lengths)} keys in blocks {batch.blocks} of {num_blocks} x {block_keys}"
        )
    if block_keys % BLOCK_MULTIPLE and max(map(len, batch.blocks)) > 1:
        raise ValueError(
            f"blocks of {block_keys} keys; the kernel reads {BLOCK_MULTIPLE} at a time"
        )
    if state.keys.dtype not in (q.dtype, torch.int8):
        raise ValueError(f"the cache is {state.keys.dtype}, the queries are {q.dtype}")


def _array(values: Sequence[int]) -> Array[c_int64]:
    return (c_int64 * len(values))(*values)


BACKENDS = (NativeAttention(),)
