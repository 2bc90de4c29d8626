"""OLMo 2: norms after attention and MLP only; query and key are normed whole, before the heads."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read an OLMo 2 config.json."""
    has_bias = keys.flag("attention_bias", False)
    config = llama_config(keys, default_eps=1e-5).with_layers(norm_placement="post")
    return config.with_attention(qk_norm="full", has_qkv_bias=has_bias, has_output_bias=has_bias)


FAMILY = Family(
    model_types={
        "olmo2": "OLMo 2 1B to 32B",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
