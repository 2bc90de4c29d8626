"""Command R, Command A, Aya: attention and MLP read one LayerNorm, and logits are scaled.

Heads are rotated in neighbouring pairs. Of Cohere 2's layers every fourth sees everything and is not
rotated; the others have a window.
"""

from dataclasses import replace

from hanok.models.config import LayerConfig, ModelConfig, Norm
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Cohere or Cohere 2 config.json."""
    is_second = keys.model_type == "cohere2"
    head_dim = keys.whole("hidden_size") // keys.whole("num_attention_heads")
    rope = keys.rope(
        keys.whole("head_dim", head_dim),
        default_theta=10000.0 if is_second else 5e5,
        is_interleaved=True,
    )
    config = llama_config(keys, rope=rope)
    keys.demand("use_qk_norm", False)
    _demand_block(keys)
    has_bias = keys.flag("attention_bias", False)
    if is_second:
        config = replace(config, layers=_layers(keys, config.layers))
    config = config.with_layers(norm_placement="shared")
    return replace(
        config.with_attention(has_qkv_bias=has_bias, has_output_bias=has_bias),
        # Command R was trained for more positions than its file wants tables for.
        max_positions=keys.whole("model_max_length", config.max_positions),
        norm=Norm(kind="layer", eps=keys.number("layer_norm_eps", 1e-5)),
        logit_scale=keys.number("logit_scale", 0.0625),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
    )


def _demand_block(keys: Keys) -> None:
    """Demand what published files say of the block, and transformers has no choice of either."""
    keys.demand("use_parallel_block", True)
    keys.demand("use_gated_activation", True)
    keys.demand("use_parallel_embedding", False)
    keys.demand("use_embedding_sharing", True)
    keys.demand("position_embedding_type", "rope_gptj")
    keys.demand("rotary_pct", 1.0)


def _layers(keys: Keys, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    keys.ignore("cache_implementation")
    keys.demand("order_of_interleaved_layers", "local_attn_first")
    period = keys.whole("sliding_window_pattern", keys.get("layer_switch", 4))
    default = [
        "sliding_attention" if (index + 1) % period else "full_attention"
        for index in range(len(layers))
    ]
    window = keys.whole("sliding_window", 4096)
    return tuple(
        layer.with_attention(window=window)
        if kind == "sliding_attention"
        else layer.with_attention(rope=None)
        for layer, kind in zip(layers, keys.layer_kinds(len(layers), default), strict=True)
    )


FAMILY = Family(
    model_types={
        "cohere": "Command R, Aya 23, Aya Expanse",
        "cohere2": "Command R7B, Command A",
    },
    read_config=read_config,
    names=LLAMA_NAMES,
)
