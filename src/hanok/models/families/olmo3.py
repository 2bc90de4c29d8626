"""OLMo 3: OLMo 2 with windows on three layers of four; only the full ones stretch their rotation."""

from collections.abc import Mapping
from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read an OLMo 3 config.json."""
    heads = keys.whole("num_attention_heads")
    head_dim = keys.whole("head_dim", keys.whole("hidden_size") // heads)
    full = keys.rope(head_dim, default_theta=5e5)
    windowed = replace(full, scaling=None)
    if isinstance(keys.object("rope_parameters").get("sliding_attention"), Mapping):
        windowed = keys.rope(head_dim, kind="sliding_attention", default_theta=5e5)
    config = llama_config(keys, rope=full, default_eps=1e-5)
    window = keys.whole_or_none("sliding_window", 4096)
    default = [
        "sliding_attention" if (index + 1) % 4 else "full_attention"
        for index in range(config.num_layers)
    ]
    has_bias = keys.flag("attention_bias", False)
    kinds = keys.layer_kinds(config.num_layers, default)
    layers = tuple(
        layer.with_attention(rope=windowed, window=window) if kind == "sliding_attention" else layer
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    config = replace(config, layers=layers).with_layers(norm_placement="post")
    return config.with_attention(qk_norm="full", has_qkv_bias=has_bias, has_output_bias=has_bias)


FAMILY = Family(
    model_types={
        "olmo3": "Olmo 3 7B and 32B, Olmo 3.1",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
