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
    config = llama_config(keys, default_eps=1e-5)
    keys.demand("reorder_qk_norm", True)
    keys.ignore("max_window_layers", "num_kv_heads")
    keys.ignore("num_nextn_predict_layers", "mtp_loss_scaling_factor", "mtp_share_layers")
    window = keys.whole_or_none("sliding_window", 4096)
    default = ["full_attention"] * config.num_layers
    if window:
        default = _kinds(_period(keys), config.num_layers)
    else:
        keys.ignore("sliding_window_pattern")
    kinds = keys.layer_kinds(config.num_layers, default)
    layers = tuple(
        layer.with_attention(window=window)
        if kind == "sliding_attention" or not window
        else layer.with_attention(rope=None)
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    config = replace(config, layers=layers).with_layers(norm_placement="post")
    return config.with_attention(qk_norm="head")


def _period(keys: Keys) -> int:
    """Return how many layers make a group, written as "LLLG" or 4."""
    pattern = keys.get("sliding_window_pattern")
    is_spelt_out = isinstance(pattern, str) and bool(pattern)
    return len(pattern) if is_spelt_out else keys.whole("sliding_window_pattern", 4)


def _kinds(period: int, num_layers: int) -> list[str]:
    """Return a window for all layers but the last of each group."""
    return [
        "sliding_attention" if (index + 1) % period else "full_attention"
        for index in range(num_layers)
    ]


FAMILY = Family(
    model_types={
        "exaone4": "EXAONE 4.0 1.2B and 32B",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
