"""Gemma 2 and 3: Gemma with norms on both sides, windows on most layers, its own attention scale.

Gemma 2 soft-caps scores and logits and alternates window and full; Gemma 3 norms query and key heads,
has five windowed layers to one full, and rotates them with another base.
"""

from dataclasses import replace

from hanok.errors import CheckpointError
from hanok.models.config import ModelConfig, Rope
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Gemma 2 or Gemma 3 (text) config.json."""
    is_third = keys.model_type == "gemma3_text"
    head_dim = keys.whole("head_dim", 256)
    full = keys.rope(head_dim, default_theta=1e6 if is_third else 1e4)
    config = llama_config(keys, rope=full, head_dim=head_dim)
    keys.demand("use_bidirectional_attention", False, None)
    keys.ignore("cache_implementation", "sliding_window_size")
    if is_third:
        keys.demand("attn_logit_softcapping", None)
    windowed = _local_rope(keys, head_dim) if is_third else full
    period = 2
    if is_third:
        period = keys.whole("sliding_window_pattern", keys.get("_sliding_window_pattern", 6))
    default = [
        "sliding_attention" if (index + 1) % period else "full_attention"
        for index in range(config.num_layers)
    ]
    window = keys.whole("sliding_window", 4096)
    kinds = keys.layer_kinds(config.num_layers, default)
    layers = tuple(
        layer.with_attention(rope=windowed, window=window) if kind == "sliding_attention" else layer
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    has_bias = keys.flag("attention_bias", False)
    activation = keys.activation("hidden_activation", default="gelu_pytorch_tanh")
    config = replace(config, layers=layers).with_layers(norm_placement="sandwich")
    config = config.with_mlp(activation=activation).with_attention(
        scale=keys.above_zero("query_pre_attn_scalar", 256) ** -0.5,
        softcap=keys.above_zero_or_none("attn_logit_softcapping", None if is_third else 50.0),
        qk_norm="head" if is_third else None,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    return replace(
        config,
        norm=replace(config.norm, unit_offset=True),
        embedding_scale=config.hidden_size**0.5,
        logit_softcap=keys.above_zero_or_none(
            "final_logit_softcapping", None if is_third else 30.0
        ),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
    )


def _local_rope(keys: Keys, head_dim: int) -> Rope:
    """Return the windowed layers' rope; `rope_scaling` speaks of the full layers only."""
    theta = keys.above_zero("rope_local_base_freq", 10000.0)
    if parameters := keys.object("rope_parameters"):
        if not isinstance(parameters.get("sliding_attention"), dict):
            raise CheckpointError(
                f"{keys.where}: rope_parameters is {parameters!r}; {keys.model_type} rotates windowed "
                "layers with a base of their own, so it needs an object for sliding_attention and one "
                "for full_attention."
            )
        return keys.rope(head_dim, kind="sliding_attention", default_theta=theta)
    return Rope(theta=theta, rotary_dim=head_dim)


FAMILY = Family(
    model_types={
        "gemma2": "Gemma 2 2B, 9B and 27B",
        "gemma3_text": "Gemma 3 270M and 1B",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
