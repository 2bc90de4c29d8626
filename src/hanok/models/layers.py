"""The parts of a block. Axis words: tokens, heads, kv_heads, head_dim, hidden, vocab, out, in.

All activations are packed, (tokens, …); none of these parts knows where a sequence ends. The batch only
passes through, for products that look at it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanok.attention.base import ForwardBatch
from hanok.kernels.fused import fused_for
from hanok.kernels.native import GATE_ACTIVATIONS, native_for
from hanok.models.config import Activation, Experts, Mlp, Norm
from hanok.models.linear import Chosen, Linear
from hanok.models.lora import Lora

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def added(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b, both of one shape and dtype.

    By our kernel where it can: between products of ours torch's threads, which look for work for
    milliseconds after each sum, would keep a core from the pool's.
    """
    kernels = native_for(a, b)
    return a + b if kernels is None else kernels.add(a, b)


class NormLayer(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last axis, computed in float32."""

    bias: nn.Parameter | None
    lora: Lora | None

    def __init__(self, norm: Norm, size: int, *, has_bias: bool | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(size))
        with_bias = norm.has_bias if has_bias is None else has_bias
        self.bias = nn.Parameter(torch.empty(size)) if with_bias else None
        self.lora = None

    def forward(self, x: Tensor, batch: Chosen | None = None) -> Tensor:
        """(tokens, …, size) -> (tokens, …, size); `batch` is what the tokens are part of."""
        found = self.computed(x, self.weight, self.bias)
        if self.lora is not None:
            found = self.lora(x, found, None if batch is None else batch.adapters, self)
        return found

    def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the norm gives with these weights."""
        shape, eps = (x.shape[-1],), self.norm.eps
        if self.norm.kind == "layer":
            return F.layer_norm(x, shape, weight, bias, eps)
        kernels = fused_for(x, weight)
        if kernels is not None:
            return kernels.rms_norm(x, weight, eps, unit_offset=self.norm.unit_offset)
        if self.norm.unit_offset:  # 1 + weight is rounded away in bfloat16
            return F.rms_norm(x.float(), shape, 1.0 + weight.float(), eps).type_as(x)
        return F.rms_norm(x, shape, weight, eps)


class NoNorm(nn.Module):
    """Stands where a block has no norm."""

    def forward(self, x: Tensor, batch: Chosen | None = None) -> Tensor:
        """Return x."""
        return x


class MlpLayer(nn.Module):
    """down(activation(gate(x)) * up(x)); without a gate down(activation(up(x)))."""

    def __init__(self, hidden_size: int, mlp: Mlp) -> None:
        super().__init__()
        size, bias = mlp.intermediate_size, mlp.has_bias
        self.activation = ACTIVATIONS[mlp.activation]
        self.fused_activation = mlp.activation if mlp.activation in GATE_ACTIVATIONS else None
        self.is_gated = mlp.is_gated
        if mlp.is_gated:
            self.gate_up_proj = Linear(hidden_size, 2 * size, has_bias=bias)
        else:
            self.up_proj = Linear(hidden_size, size, has_bias=bias)
        self.down_proj = Linear(size, hidden_size, has_bias=bias)

    def forward(self, x: Tensor, batch: ForwardBatch | None = None) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        inner = self._gated(x, batch) if self.is_gated else self.activation(self.up_proj(x, batch))
        output: Tensor = self.down_proj(inner, batch)
        return output

    def _gated(self, x: Tensor, batch: ForwardBatch | None) -> Tensor:
        gate_up: Tensor = self.gate_up_proj(x, batch)
        kernels = fused_for(gate_up)
        if kernels is not None and self.fused_activation is not None:
            return kernels.gate(gate_up, self.fused_activation)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up


class ExpertsLayer(nn.Module):
    """A router's softmax picks experts for each token; their outputs are added, weighted.

    Each expert multiplies only the tokens that chose it.
    """

    def __init__(self, hidden_size: int, experts: Experts) -> None:
        super().__init__()
        self.num_chosen = experts.num_experts_per_token
        self.is_renormalised = experts.is_renormalised
        self.router = Linear(hidden_size, experts.num_experts)
        self.experts = nn.ModuleList(
            MlpLayer(hidden_size, experts.expert) for _ in range(experts.num_experts)
        )

    def forward(self, x: Tensor, batch: ForwardBatch | None = None) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        weights, chosen = self.router(x).float().softmax(-1).topk(self.num_chosen, dim=-1)
        if self.is_renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        output = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, rank = (chosen == expert).nonzero(as_tuple=True)
            part = self.experts[expert](x[tokens], batch) * weights[tokens, rank, None]
            output = output.index_add(0, tokens, part)
        return output


def mlp_of(hidden_size: int, mlp: Mlp | Experts) -> nn.Module:
    """Make the module of an MLP."""
    return (
        ExpertsLayer(hidden_size, mlp) if isinstance(mlp, Experts) else MlpLayer(hidden_size, mlp)
    )
