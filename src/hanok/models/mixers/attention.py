"""Softmax attention: projections, norms on heads, rotation, and one call of a backend."""

from typing import Literal

import torch
from torch import Tensor

from hanok.attention.base import AttentionSpec, Backend, ForwardBatch, choose
from hanok.attention.cache import LayerState
from hanok.models.config import ModelConfig, SoftmaxAttention
from hanok.models.layers import NormLayer
from hanok.models.linear import Linear
from hanok.models.mixers.base import MixerModule, attention_spec
from hanok.models.rotary import Rotary


class Attention(MixerModule):
    """Projections, norms on heads, rotation, and one call of a backend."""

    spec: AttentionSpec

    def __init__(self, config: ModelConfig, mixer: SoftmaxAttention, rotary: Rotary | None) -> None:
        super().__init__()
        self.spec = attention_spec(mixer)
        self.rotary = rotary
        self.grows = rotary is not None and rotary.rope.query_growth != 0
        self.qk_norm = mixer.qk_norm
        self.backend: Backend = choose("eager", self.spec, torch.device("cpu"), torch.float32)
        hidden, rows = config.hidden_size, sum(mixer.qkv_sizes)
        self.qkv_proj = Linear(hidden, rows, has_bias=mixer.has_qkv_bias)
        self.o_proj = Linear(mixer.qkv_sizes[0], hidden, has_bias=mixer.has_output_bias)
        if mixer.qk_norm is not None:
            sizes = mixer.qk_norm_sizes
            self.q_norm, self.k_norm = (NormLayer(config.norm, n, has_bias=False) for n in sizes)

    def why_not_recorded(self, device: Literal["cpu", "cuda"]) -> str | None:
        """See `MixerModule`."""
        if self.backend.recorded_on == device:
            return None
        if device == "cpu":
            return f"attention {self.backend.name} is not one of our kernels"
        return f"attention {self.backend.name} takes lengths from the CPU"

    def forward(
        self, x: Tensor, batch: ForwardBatch, cos_sin: Tensor | None, state: LayerState | None
    ) -> Tensor:
        """See `MixerModule`; the keys and values of the batch's tokens are appended to `state`."""
        spec, num_tokens = self.spec, x.shape[0]
        packed: Tensor = self.qkv_proj(x, batch)
        heads = packed.view(num_tokens, -1, spec.head_dim)
        num_qk = spec.num_heads + spec.num_kv_heads
        qk, v = heads[:, :num_qk], heads[:, num_qk:]
        if self.qk_norm is None and not self.grows:
            # Query and key heads are neighbours, so they are rotated in one call.
            qk = self._rotated(qk, cos_sin)
            q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
        else:
            q, k = self._normed(qk[:, : spec.num_heads], qk[:, spec.num_heads :], batch)
            if self.grows and cos_sin is not None:
                q, k = self._rotated(q, cos_sin[2:]), self._rotated(k, cos_sin[:2])
            else:
                q, k = self._rotated(q, cos_sin), self._rotated(k, cos_sin)
        scored = self.backend.attend(q, k, v, spec, batch, state)
        output: Tensor = self.o_proj(scored.reshape(num_tokens, -1), batch)
        return output

    def _normed(self, q: Tensor, k: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if self.qk_norm is None:
            return q, k
        shapes = q.shape, k.shape
        if self.qk_norm == "full":
            q, k = q.reshape(q.shape[0], -1), k.reshape(k.shape[0], -1)
        return self.q_norm(q, batch).view(shapes[0]), self.k_norm(k, batch).view(shapes[1])

    def _rotated(self, heads: Tensor, cos_sin: Tensor | None) -> Tensor:
        if self.rotary is None or cos_sin is None:
            return heads
        return self.rotary.rotate(heads, cos_sin)


MODULES = {SoftmaxAttention: Attention}
