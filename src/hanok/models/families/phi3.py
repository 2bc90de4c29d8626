"""Phi-3, 3.5, 4 and 4-mini: fused projections in the file, longrope, perhaps a partial rotary."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Phi-3 config.json."""
    head_dim = keys.whole(
        "head_dim", keys.whole("hidden_size") // keys.whole("num_attention_heads")
    )
    rope = keys.rope(head_dim, default_partial=1.0)
    config = llama_config(keys, rope=rope, default_eps=1e-5)
    keys.ignore("resid_pdrop", "embd_pdrop")
    keys.demand("attention_bias", False)
    keys.demand("mlp_bias", False)
    keys.demand("lm_head_bias", False)
    keys.demand("full_attn_mod", 1)
    keys.ignore("interpolate_factor")
    return config.with_attention(window=keys.whole_or_none("sliding_window"))


FAMILY = Family(
    model_types={
        "phi3": "Phi-3, Phi-3.5 mini, Phi-4, Phi-4 mini",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "self_attn.qkv_proj": "self_attn.qkv_proj",
        "mlp.gate_up_proj": "mlp.gate_up_proj",
    },
)
