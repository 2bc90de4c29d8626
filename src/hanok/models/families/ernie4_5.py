"""ERNIE 4.5 (dense): Llama rotated in neighbouring pairs; one key for all biases, and a tied head."""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read an ERNIE 4.5 config.json."""
    heads = keys.whole("num_attention_heads")
    head_dim = keys.whole("head_dim", keys.whole("hidden_size") // heads)
    rope = keys.rope(head_dim, default_theta=5e5, is_interleaved=True)
    config = llama_config(keys, rope=rope, default_eps=1e-5)
    has_bias = keys.flag("use_bias", False)
    config = config.with_attention(has_qkv_bias=has_bias, has_output_bias=has_bias)
    return replace(
        config.with_mlp(has_bias=has_bias),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    model_types={
        "ernie4_5": "ERNIE 4.5 0.3B",
    },
    read_config=read_config,
)
