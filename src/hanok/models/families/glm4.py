"""GLM-4 (0414): norms on both sides, interleaved rotation of half a head, a fused gate and up."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a GLM-4 config.json."""
    whole_heads = keys.whole("hidden_size") // keys.whole("num_attention_heads")
    head_dim = keys.whole("head_dim", whole_heads)
    rope = keys.rope(head_dim, default_partial=0.5, is_interleaved=True)
    config = llama_config(keys, rope=rope, default_eps=1.5625e-07)
    config = config.with_layers(norm_placement="sandwich")
    return config.with_attention(has_qkv_bias=keys.flag("attention_bias", True))


FAMILY = Family(
    model_types={
        "glm4": "GLM-4 9B and 32B of 0414",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "mlp.gate_up_proj": "mlp.gate_up_proj",
        "attention_post_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
    },
)
