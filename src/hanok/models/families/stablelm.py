"""StableLM 3B and StableLM 2 1.6B: Llama with LayerNorm and a quarter of a head rotated."""

from dataclasses import replace

from hanok.models.config import ModelConfig, Norm
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a StableLM config.json."""
    head_dim = keys.whole("hidden_size") // keys.whole("num_attention_heads")
    config = llama_config(keys, rope=keys.rope(head_dim, default_partial=0.25))
    keys.demand("qk_layernorm", False)
    keys.demand("rotary_scaling_factor", 1.0)
    is_parallel = keys.flag("use_parallel_residual", False)
    config = config.with_layers(norm_placement="shared" if is_parallel else "pre")
    return replace(
        config.with_attention(has_qkv_bias=keys.flag("use_qkv_bias", False)),
        norm=Norm(kind="layer", eps=keys.number("layer_norm_eps", 1e-5), has_bias=True),
    )


FAMILY = Family(
    model_types={
        "stablelm": "StableLM 3B, StableLM Zephyr 3B, StableLM 2 1.6B",
    },
    read_config=read_config,
)
