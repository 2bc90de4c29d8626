"""EXAONE 4: norms after attention and MLP, normed heads, and full layers without positions.

The 32B model has three windowed layers to one full; only the windowed ones are rotated. The small
model has no window, and then every layer is.
"""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read an EXAONE 4 config.json."""
    config = llama_config(keys)
    window, pattern = keys.get("sliding_window"), keys.get("sliding_window_pattern", 4)
    default = (
        _kinds(pattern, config.num_layers) if window else ["full_attention"] * config.num_layers
    )
    kinds = keys.layer_kinds(config.num_layers, default)
    layers = tuple(
        replace(layer, window=window)
        if kind == "sliding_attention"
        else replace(layer, rope=None if window else layer.rope)
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    return replace(config, layers=layers, norm_placement="post", qk_norm="head")


def _kinds(pattern: int | str, num_layers: int) -> list[str]:
    """Spell out "LLLG" or 4: the layers that see a window, and the last of each group that does not."""
    period = len(pattern) if isinstance(pattern, str) else pattern
    return [
        "sliding_attention" if (index + 1) % period else "full_attention"
        for index in range(num_layers)
    ]


FAMILY = Family(
    model_types=("exaone4",),
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
