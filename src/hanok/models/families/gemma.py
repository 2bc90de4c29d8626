"""Gemma: norms multiply by 1 + weight, embeddings are scaled by sqrt(hidden), GELU gate, tied head."""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Gemma config.json."""
    config = llama_config(keys)
    has_bias = keys.flag("attention_bias", False)
    keys.demand("use_bidirectional_attention", False, None)
    # Files from before `hidden_activation` say "gelu" in hidden_act and mean its tanh form.
    activation = keys.activation("hidden_activation", default="gelu_pytorch_tanh")
    keys.ignore("hidden_act")
    return replace(
        config,
        norm=replace(config.norm, unit_offset=True),
        mlp=replace(config.mlp, activation=activation),
        embedding_scale=config.hidden_size**0.5,
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )


FAMILY = Family(
    model_types={
        "gemma": "Gemma 2B and 7B, CodeGemma",
    },
    read_config=read_config,
)
