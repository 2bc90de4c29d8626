"""Seed-OSS: Llama with biases on query, key and value alone."""

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Seed-OSS config.json."""
    config = llama_config(keys)
    keys.ignore("residual_dropout")
    return config.with_mlp(has_bias=keys.flag("mlp_bias", False)).with_attention(
        has_qkv_bias=keys.flag("attention_bias", True),
        has_output_bias=keys.flag("attention_out_bias", False),
    )


FAMILY = Family(
    model_types={
        "seed_oss": "Seed-OSS 36B",
    },
    read_config=read_config,
)
