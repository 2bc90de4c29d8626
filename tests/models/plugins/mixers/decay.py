"""The modules of tests/models/plugins/families/decayed.py."""

import torch
from hanok.models.families.decayed import Decay, ScaledLayer
from torch import Tensor, nn

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import SequenceState
from hanok.models.config import LayerConfig, ModelConfig
from hanok.models.layers import NormLayer, mlp_of
from hanok.models.linear import Linear
from hanok.models.mixers.base import MixerModule, State, mixer_of
from hanok.models.rotary import Rotary


class DecayModule(MixerModule):
    def __init__(self, config: ModelConfig, mixer: Decay, rotary: Rotary | None) -> None:
        super().__init__()
        self.vg_proj = Linear(config.hidden_size, 2 * mixer.size)
        self.decay = nn.Parameter(torch.empty(mixer.size))
        self.o_proj = Linear(mixer.size, config.hidden_size)

    def forward(
        self, x: Tensor, batch: ForwardBatch, cos_sin: Tensor | None, state: SequenceState | None
    ) -> Tensor:
        v, g = self.vg_proj(x, batch).float().chunk(2, dim=-1)
        kept, rows, start = torch.sigmoid(self.decay.float()), [], 0
        for length, slot in zip(batch.host.query_lengths, batch.host.slots, strict=True):
            h = torch.zeros_like(kept) if state is None else state.values[slot].clone()
            for row in v[start : start + length]:
                h = kept * h + (1 - kept) * row
                rows.append(h)
            if state is not None:
                state.values[slot] = h
            start += length
        output: Tensor = self.o_proj((torch.stack(rows) * torch.sigmoid(g)).to(x.dtype), batch)
        return output


class ScaledBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig, rotary: Rotary | None) -> None:
        super().__init__()
        self.self_attn = mixer_of(config, layer.mixer, rotary)
        self.mlp = mlp_of(config.hidden_size, layer.mlp)
        self.mixer_scale = nn.Parameter(torch.empty(config.hidden_size))
        self.attention_norm, self.mlp_norm = (
            NormLayer(config.norm, config.hidden_size) for _ in range(2)
        )

    def forward(
        self, x: Tensor, batch: ForwardBatch, cos_sin: Tensor | None, state: State
    ) -> Tensor:
        mixed = self.self_attn(self.attention_norm(x), batch, cos_sin, state)
        x = x + self.mixer_scale * mixed
        output: Tensor = x + self.mlp(self.mlp_norm(x), batch)
        return output


MODULES = {Decay: DecayModule, ScaledLayer: ScaledBlock}
