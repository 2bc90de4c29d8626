"""Plain matmul and softmax: runs everywhere, does everything, and shows what faster backends save.

The heads that share a KV head are the rows of one matrix product, so keys and values are never
repeated. Queries go in chunks, which bounds the scores to heads x CHUNK x keys x 4 bytes. What is
compiled scores all tokens of a batch at once, so that one program serves any mix of lengths.
"""

import torch
from torch import Tensor

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

CHUNK = 512


class Eager:
    """Matmul, mask, softmax in float32, matmul."""

    name = "eager"
    summary = "plain matmul and softmax"
    recorded_on = None

    def why_not(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return None: it serves everything."""
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
        if is_traced(k, state):
            keys, values, seen = packed_keys(k, v, spec, batch, state)
            return self._chunk(q, keys, values, spec, seen)
        outputs = []
        for queries, keys, values in split_sequences(q, k, v, batch, state):
            for start in range(0, queries.shape[0], CHUNK):
                end = min(start + CHUNK, queries.shape[0])
                num_keys = keys.shape[1] - (queries.shape[0] - end)
                first = (
                    0 if spec.window is None else max(0, num_keys - (end - start) - spec.window + 1)
                )
                seen = visible(end - start, num_keys - first, spec.window, q.device)
                some = keys[:, first:num_keys], values[:, first:num_keys]
                outputs.append(self._chunk(queries[start:end], *some, spec, seen))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, seen: Tensor
    ) -> Tensor:
        """q: (time, heads, head_dim)   keys, values: (kv_heads, keys, head_dim)   seen: (time, keys)."""
        time, num_keys = q.shape[0], keys.shape[1]
        group = spec.num_heads // spec.num_kv_heads
        grouped = q.view(time, spec.num_kv_heads, group, spec.head_dim).permute(1, 2, 0, 3)
        rows = grouped.reshape(spec.num_kv_heads, group * time, spec.head_dim)
        rows, keys, values = multipliable(rows.shape[1], rows, keys, values)
        scores = (rows @ keys.transpose(1, 2)).float() * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        scores = scores.view(-1, group, time, num_keys).masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1).to(values.dtype).view(-1, group * time, num_keys)
        output = (weights @ values).view(spec.num_kv_heads, group, time, spec.head_dim)
        return output.permute(2, 0, 1, 3).reshape(time, spec.num_heads, spec.head_dim).to(q.dtype)


BACKENDS = (Eager(),)
