"""Helium: Llama rotated in neighbouring pairs."""

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Helium config.json."""
    rope = keys.rope(keys.whole("head_dim", 128), default_theta=1e5, is_interleaved=True)
    config = llama_config(keys, rope=rope, head_dim=rope.rotary_dim, default_eps=1e-8)
    config = config.with_attention(has_qkv_bias=keys.flag("attention_bias", False))
    return config.with_mlp(has_bias=keys.flag("mlp_bias", False))


FAMILY = Family(
    model_types={
        "helium": "Helium 1 preview 2B",
    },
    read_config=read_config,
)
