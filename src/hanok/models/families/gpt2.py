"""GPT-2: learned positions, LayerNorm, biases everywhere, matrices stored as (in, out)."""

from hanok.models.config import ModelConfig
from hanok.models.family import GPT2_NAMES, Family
from hanok.models.keys import Keys, gpt2_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a GPT-2 config.json."""
    keys.ignore("n_ctx", "reorder_and_upcast_attn")
    keys.ignore("n_special", "predict_special_tokens")
    keys.demand("add_cross_attention", False)
    keys.demand("scale_attn_by_inverse_layer_idx", False)
    return gpt2_config(keys, default_activation="gelu_new")


_MATRICES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")

FAMILY = Family(
    model_types={
        "gpt2": "GPT-2 (all sizes), distilgpt2, KoGPT2",
    },
    read_config=read_config,
    names=GPT2_NAMES,
    layouts=dict.fromkeys(_MATRICES, "columns"),
    ignored_tensors=(r".*\.attn\.(bias|masked_bias)",),
)
