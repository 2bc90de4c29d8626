"""A family of the tests: some layers keep a decaying sum instead of keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hanok.attention.state import FixedState
from hanok.models.config import LayerConfig, Mixer, ModelConfig, Norm, Shapes, linear_shapes
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


@dataclass(frozen=True, kw_only=True)
class Decay(Mixer):
    """For each of `size` channels h = a h + (1 - a) v, a = sigmoid(decay); h x sigmoid(g) goes out."""

    size: int

    def parameter_shapes(self, hidden_size: int) -> Shapes:
        shapes = linear_shapes("vg_proj", 2 * self.size, hidden_size)
        return {**shapes, "decay": (self.size,), **linear_shapes("o_proj", hidden_size, self.size)}

    def state(self) -> FixedState:
        return FixedState(shape=(self.size,))

    def flops_per_token(self, context_tokens: int) -> int:
        return 4 * self.size

    def active_size(self, hidden_size: int) -> int:
        return 3 * self.size


@dataclass(frozen=True, kw_only=True)
class ScaledLayer(LayerConfig):
    """A block of its own: what the mixer says is multiplied by a weight for each component."""

    def parameter_shapes(self, hidden_size: int, norm: Norm) -> Shapes:
        shapes = LayerConfig.parameter_shapes(self, hidden_size, norm)
        return {**shapes, "mixer_scale": (hidden_size,)}


def read_config(keys: Keys) -> ModelConfig:
    config = llama_config(keys)
    decay = Decay(size=keys.whole("decay_size"))
    decaying = keys.listed("decay_layers", [])
    has_scale = keys.flag("scales_mixers", False)
    kind = ScaledLayer if has_scale else LayerConfig
    layers = tuple(
        kind(mixer=decay if index in decaying else layer.mixer, mlp=layer.mlp)
        for index, layer in enumerate(config.layers)
    )
    return replace(config, layers=layers)


NAMES: Mapping[str, str | tuple[str, ...]] = {
    **LLAMA_NAMES,
    "self_attn.vg_proj": ("self_attn.v_proj", "self_attn.g_proj"),
}
FAMILY = Family(model_types={"decayed": "nothing"}, read_config=read_config, names=NAMES)
