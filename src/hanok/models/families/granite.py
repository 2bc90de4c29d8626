"""Granite 3: Llama with four multipliers, on embeddings, residuals, scores and logits."""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Granite config.json."""
    config = llama_config(keys)
    has_bias = keys.flag("attention_bias", False)
    config = config.with_layers(residual_scale=keys.number("residual_multiplier", 1.0))
    config = config.with_attention(
        scale=keys.number("attention_multiplier", 1.0),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    return replace(
        config.with_mlp(has_bias=keys.flag("mlp_bias", False)),
        embedding_scale=keys.number("embedding_multiplier", 1.0),
        logit_scale=1.0 / keys.above_zero("logits_scaling", 1.0),
    )


FAMILY = Family(
    model_types={
        "granite": "Granite 3.0 to 3.3",
    },
    read_config=read_config,
)
