"""Our GPU kernels for decoding: every sequence has one new token, keys are read once and split up.

They find keys through the batch's `block_table`, one block for each sequence or several. Nothing waits
for the GPU, so that a CUDA graph can record it. Batches with more tokens, a cache in int8 and what needs
gradients go to the next backend that fits.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from hanok.attention.base import AttentionSpec, ForwardBatch, PartialBackend, dense_heads
from hanok.attention.cache import LayerState

MAX_HEAD_DIM = 256  # a tile of keys and values has to fit into a program along with its sums


class TritonAttention(PartialBackend):
    """Paged attention of single tokens, split over keys."""

    name = "triton"
    summary = "our GPU kernels for single tokens, split over keys; torch's attention for many"
    recorded_on = "cuda"

    def why_not(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why our GPU kernels cannot serve such layers."""
        if device.type != "cuda":
            return f"needs a CUDA device (found: {device.type})"
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            return f"needs float16, bfloat16 or float32 (found: {name})"
        if spec.head_dim > MAX_HEAD_DIM:
            return f"serves heads of up to {MAX_HEAD_DIM} (found: {spec.head_dim})"
        if find_spec("triton") is None:
            return "triton is not installed: pip install triton (torch for CUDA brings it)"
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
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        is_decode = len(batch.key_lengths) == len(q)
        if state is None or not is_decode or needs_grad or state.keys.dtype is not q.dtype:
            return self.other(spec, q).attend(q, k, v, spec, batch, state)
        from hanok.kernels.triton_attention import append, attend

        append(
            dense_heads(k),
            dense_heads(v),
            state.keys,
            state.values,
            batch.key_lengths,
            batch.block_table,
        )
        return attend(
            dense_heads(q),
            state.keys,
            state.values,
            batch.key_lengths,
            batch.block_table,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )


BACKENDS = (TritonAttention(),)
