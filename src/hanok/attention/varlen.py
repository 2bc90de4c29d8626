"""torch's flash attention over packed sequences on a GPU: one call for sequences of any lengths.

It trains, and reads from the batch's tensors where sequences begin, so that a compiled program serves
any mix of lengths. Keys of a cache are written to their blocks at once, and packed where a sequence has
some from before. A cache in int8 goes to the next backend that fits.
"""

from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from hanok.attention.base import AttentionSpec, ForwardBatch, PartialBackend
from hanok.attention.cache import LayerState

MAX_HEAD_DIM = 256
LEAST_CAPABILITY = (8, 0)  # of a GPU that torch's flash attention is compiled for


class Varlen(PartialBackend):
    """Flash attention without padding and without a loop."""

    name = "varlen"
    summary = "torch's flash attention over packed sequences, one call for all of them"
    recorded_on = None

    def __init__(self) -> None:
        # Looked for once: what compiles this code cannot look.
        self._missing: str | None = None
        self._options: dict[str, Any] = {}

    def why_not(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why torch's packed attention cannot serve such layers."""
        if device.type != "cuda":
            return f"needs a CUDA device (found: {device.type})"
        if dtype not in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            return f"needs float16 or bfloat16 (found: {name})"
        if spec.softcap is not None:
            return f"cannot soft-cap scores (softcap {spec.softcap})"
        if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
            return f"serves heads of multiples of 8 up to {MAX_HEAD_DIM} (found: {spec.head_dim})"
        if self._missing is None:
            self._missing = self._look()
        return self._missing or None

    def _look(self) -> str:
        """Return what this torch or a GPU lacks, nothing where it is all there; note what it takes."""
        if find_spec("torch.nn.attention.varlen") is None:
            return f"torch {torch.__version__} does not have it"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no flash attention"
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        if not found or min(found) < LEAST_CAPABILITY:
            return f"needs compute capability {LEAST_CAPABILITY} (found: {found})"
        from torch.nn.attention.varlen import varlen_attn

        # Before torch 2.12 fewer KV heads than heads were taken without being announced.
        if "enable_gqa" in signature(varlen_attn).parameters:
            self._options = {"enable_gqa": True}
        return ""

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
        # What is compiled knows no lengths; the number of all tokens is a bound that costs little.
        is_compiling = torch.compiler.is_compiling()
        if state is not None and (is_compiling or state.keys.dtype is not q.dtype):
            return self.other(spec, q).attend(q, k, v, spec, batch, state)
        from torch.nn.attention.varlen import varlen_attn

        longest = q.shape[0] if is_compiling else max(batch.host.query_lengths)
        key_starts, longest_keys = batch.query_starts, longest
        if state is not None:
            places = batch.key_places(state.keys.shape[2])
            for kept, new in ((state.keys, k), (state.values, v)):
                kept[places.new_blocks, :, places.new_positions] = new
            if batch.host.key_lengths != batch.host.query_lengths:
                k, v = (
                    kept[places.blocks, :, places.positions] for kept in (state.keys, state.values)
                )
                key_starts, longest_keys = places.starts, max(batch.host.key_lengths)
        output = varlen_attn(
            q,
            k,
            v,
            batch.query_starts,
            key_starts,
            longest,
            longest_keys,
            scale=spec.scale,
            window_size=(-1 if spec.window is None else spec.window - 1, 0),
            **self._options,
        )
        assert isinstance(output, Tensor)  # a tuple where more was asked for
        return output


BACKENDS = (Varlen(),)
