"""torch's `scaled_dot_product_attention`, with its kernel left to torch or picked by the user.

One token of a sequence: the heads that share a KV head become the queries of that head, which needs no
mask and reads the cache once. On CPUs this is 10 to 20 times faster than `enable_gqa=True` with one
query (benchmarks/attention.py). Many tokens: KV heads are broadcast over their group by a stride of
zero. A window or cached keys need a mask, so queries then go in chunks and a mask never exceeds
CHUNK x (window + CHUNK), or CHUNK x keys without a window.

Without a cache, sequences of equal length go in one call; the others go one after another, as one call
with a mask of all tokens takes eight times as long on a CPU. Only what is compiled makes that call, so
that one program serves any mix of lengths.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hanok.attention.base import (
    AttentionSpec,
    ForwardBatch,
    is_traced,
    multipliable,
    packed_keys,
    split_sequences,
    visible,
)
from hanok.attention.cache import LayerState

CHUNK = 1024


class Sdpa:
    """torch's fused attention; `kernel` forces one of its kernels."""

    recorded_on = None

    def __init__(self, name: str, summary: str, kernel: SDPBackend | None = None) -> None:
        self.name = name
        self.summary = summary
        self.kernel = kernel

    def why_not(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why torch's attention cannot serve such layers."""
        if spec.softcap is not None:
            return f"cannot soft-cap scores (softcap {spec.softcap})"
        if self.kernel is SDPBackend.EFFICIENT_ATTENTION and device.type != "cuda":
            return f"needs a CUDA device (found: {device.type})"
        if self.kernel is SDPBackend.FLASH_ATTENTION and device.type == "cuda":
            if dtype not in (torch.float16, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                return f"needs float16 or bfloat16 on a GPU (found: {name})"
            if spec.window is not None:
                return f"takes no mask on a GPU, which a window of {spec.window} needs"
        return None

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
        with self._forced():
            if is_traced(k, state):
                return self._packed(q, k, v, spec, batch, state)
            if state is None:
                return self._by_length(q, k, v, spec, batch.host.query_lengths)
            outputs = [
                self._one(queries, keys, values, spec)
                for queries, keys, values in split_sequences(q, k, v, batch, state)
            ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _forced(self) -> AbstractContextManager[None]:
        return nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        batch: ForwardBatch,
        state: LayerState | None,
    ) -> Tensor:
        """Attend over all sequences of a batch in one call."""
        keys, values, seen = packed_keys(k, v, spec, batch, state)
        output = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=seen,
            scale=spec.scale,
            enable_gqa=spec.num_heads > spec.num_kv_heads,
        )
        return output[0].transpose(0, 1)

    def _by_length(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, lengths: Sequence[int]
    ) -> Tensor:
        """Attend within each sequence of a batch without a cache, those of equal length at once."""
        starts: dict[int, list[int]] = {}
        for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
            starts.setdefault(length, []).append(start)
        if len(starts) == 1:
            return self._alike((q, k, v), spec, len(lengths))
        if len(starts) == len(lengths):
            each = zip(*(item.split_with_sizes(list(lengths)) for item in (q, k, v)), strict=True)
            return torch.cat([self._alike(part, spec, 1) for part in each])
        groups = [
            torch.cat([torch.arange(start, start + length) for start in group])
            for length, group in starts.items()
        ]
        rows = [group.to(q.device) for group in groups]
        outputs = [
            self._alike([item.index_select(0, mine) for item in (q, k, v)], spec, len(group))
            for mine, group in zip(rows, starts.values(), strict=True)
        ]
        return torch.cat(outputs).index_select(0, torch.cat(rows).argsort())

    def _alike(self, packed: Sequence[Tensor], spec: AttentionSpec, count: int) -> Tensor:
        """Attend within each of `count` equally long sequences; `packed`: queries, keys, values."""
        length = len(packed[0]) // count
        if not _limits(spec.window, length):
            q, k, v = packed
            return self._dense(q, k, v, spec, count)
        each = zip(*(item.view(count, length, *item.shape[1:]) for item in packed), strict=True)
        return torch.cat(
            [self._one(a, b.transpose(0, 1), c.transpose(0, 1), spec) for a, b, c in each]
        )

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, batch: int) -> Tensor:
        """Attend over equally long sequences at once, as views (batch, heads, time, head_dim)."""
        time, group = q.shape[0] // batch, spec.num_heads // spec.num_kv_heads
        shape, dtype = (batch, time, -1, spec.head_dim), q.dtype
        q, k, v = multipliable(time * group, q, k, v)
        output = scaled_dot_product_attention(
            q.view(shape).transpose(1, 2),
            k.view(shape).transpose(1, 2),
            v.view(shape).transpose(1, 2),
            is_causal=True,
            scale=spec.scale,
            enable_gqa=group > 1,
        )
        return output.transpose(1, 2).reshape(q.shape).to(dtype)

    def _one(self, q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
        """q: (time, heads, head_dim)   keys, values: (kv_heads, keys, head_dim), q's are the last."""
        time, num_keys = q.shape[0], keys.shape[1]
        kv_heads, group = spec.num_kv_heads, spec.num_heads // spec.num_kv_heads
        dtype = q.dtype
        if time == 1 and spec.window is not None:
            keys, values = keys[:, -spec.window :], values[:, -spec.window :]
        q, keys, values = multipliable(time * group, q, keys, values)
        if time == 1:
            output = scaled_dot_product_attention(
                q.view(1, kv_heads, group, spec.head_dim),
                keys[None],
                values[None],
                scale=spec.scale,
            )
            # Some of torch's GPU kernels return heads that are not contiguous.
            return output.reshape(1, spec.num_heads, spec.head_dim).to(dtype)
        # (kv_heads, group, time, head_dim), the KV heads broadcast over their group.
        grouped = q.view(time, kv_heads, group, spec.head_dim).permute(1, 2, 0, 3)
        keys = keys[:, None].expand(kv_heads, group, num_keys, spec.head_dim)
        values = values[:, None].expand(kv_heads, group, num_keys, spec.head_dim)
        if time == num_keys and not _limits(spec.window, num_keys):
            output = scaled_dot_product_attention(
                grouped, keys, values, is_causal=True, scale=spec.scale
            )
        else:
            output = torch.cat(
                [
                    self._chunk(grouped, keys, values, spec, start)
                    for start in range(0, time, CHUNK)
                ],
                dim=2,
            )
        return output.permute(2, 0, 1, 3).reshape(time, spec.num_heads, spec.head_dim).to(dtype)

    def _chunk(
        self, grouped: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, start: int
    ) -> Tensor:
        time, num_keys = grouped.shape[2], keys.shape[2]
        end = min(start + CHUNK, time)
        last = num_keys - (time - end)
        first = 0 if spec.window is None else max(0, last - (end - start) - spec.window + 1)
        return scaled_dot_product_attention(
            grouped[:, :, start:end],
            keys[:, :, first:last],
            values[:, :, first:last],
            attn_mask=visible(end - start, last - first, spec.window, grouped.device),
            scale=spec.scale,
        )


def _limits(window: int | None, num_keys: int) -> bool:
    return window is not None and window < num_keys


BACKENDS = (
    Sdpa("sdpa", "torch's fused attention, torch picks the kernel"),
    Sdpa("sdpa_math", "torch's fused attention, its plain kernel", SDPBackend.MATH),
    Sdpa("sdpa_flash", "torch's fused attention, its flash kernel", SDPBackend.FLASH_ATTENTION),
    Sdpa(
        "sdpa_efficient",
        "torch's fused attention, its memory-efficient kernel",
        SDPBackend.EFFICIENT_ATTENTION,
    ),
)
