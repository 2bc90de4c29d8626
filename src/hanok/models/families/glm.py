"""GLM-4-9B and GLM-Edge: Llama with half a head rotated in neighbouring pairs, a fused gate and up."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a GLM config.json."""
    whole_heads = keys.whole("hidden_size") // keys.whole("num_attention_heads")
    head_dim = keys.whole("head_dim", whole_heads)
    rope = keys.rope(head_dim, default_partial=0.5, is_interleaved=True)
    config = llama_config(keys, rope=rope, default_eps=1.5625e-07)
    return config.with_attention(has_qkv_bias=keys.flag("attention_bias", True))


FAMILY = Family(
    model_types={
        "glm": "GLM-4-9B-chat-hf, GLM-Edge 1.5B and 4B",
    },
    read_config=read_config,
    names={**LLAMA_NAMES, "mlp.gate_up_proj": "mlp.gate_up_proj"},
)
