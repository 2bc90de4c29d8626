"""SmolLM3: Llama without position information in every fourth layer."""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a SmolLM3 config.json."""
    whole_heads = keys.whole("hidden_size") // keys.whole("num_attention_heads")
    head_dim = keys.whole("head_dim", whole_heads)
    config = llama_config(keys, rope=keys.rope(head_dim, default_theta=2e6))
    period = keys.whole("no_rope_layer_interval", 4)
    default = [int((index + 1) % period != 0) for index in range(config.num_layers)]
    # 1: this layer is rotated.
    rotated = keys.listed("no_rope_layers", default, length=config.num_layers)
    window = keys.whole_or_none("sliding_window")
    if not keys.flag("use_sliding_window", False):
        window = None
    default_kinds = [
        "sliding_attention" if window is not None and not is_rotated else "full_attention"
        for is_rotated in rotated
    ]
    kinds = keys.layer_kinds(config.num_layers, default_kinds)
    keys.ignore("max_window_layers")
    layers = tuple(
        layer.with_attention(
            rope=layer.attention.rope if is_rotated else None,
            window=window if kind == "sliding_attention" else None,
        )
        for layer, is_rotated, kind in zip(config.layers, rotated, kinds, strict=True)
    )
    has_bias = keys.flag("attention_bias", False)
    config = replace(config, layers=layers).with_mlp(has_bias=keys.flag("mlp_bias", False))
    return replace(
        config.with_attention(has_qkv_bias=has_bias, has_output_bias=has_bias),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    model_types={
        "smollm3": "SmolLM3 3B",
    },
    read_config=read_config,
)
