"""HyperCLOVA X SEED Think: Granite with norms on both sides, and logits that are multiplied."""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a HyperCLOVA X config.json."""
    config = llama_config(keys)
    keys.ignore("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
    has_bias = keys.flag("attention_bias", False)
    scale = keys.number("attention_multiplier", config.attentions[0].score_scale)
    config = config.with_layers(
        norm_placement="sandwich" if keys.flag("use_post_norm", True) else "pre",
        residual_scale=keys.number("residual_multiplier", 1.0),
    ).with_attention(scale=scale, has_qkv_bias=has_bias, has_output_bias=has_bias)
    return replace(
        config.with_mlp(has_bias=keys.flag("mlp_bias", False)),
        embedding_scale=keys.number("embedding_multiplier", 1.0),
        logit_scale=keys.number("logits_scaling", 1.0),
    )


FAMILY = Family(
    model_types={
        "hyperclovax": "HyperCLOVA X SEED Think 14B",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_norm1",
        "mlp_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_norm2",
    },
)
