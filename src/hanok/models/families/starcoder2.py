"""StarCoder2: Llama's layout with LayerNorm, a plain GELU MLP and biases everywhere."""

from dataclasses import replace

from hanok.models.config import ModelConfig, Norm
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a StarCoder2 config.json."""
    config = llama_config(keys)
    keys.ignore("residual_dropout", "embedding_dropout")
    # Left over from the first StarCoder: `hidden_act` and `norm_epsilon` count.
    keys.ignore("activation_function", "layer_norm_epsilon", "scale_attn_weights")
    keys.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    keys.demand("norm_type", "layer_norm")
    keys.demand("mlp_type", "default")
    has_bias = keys.flag("use_bias", True)
    config = config.with_attention(
        window=keys.whole_or_none("sliding_window"),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    ).with_mlp(
        activation=keys.activation("hidden_act", default="gelu_pytorch_tanh"),
        is_gated=False,
        has_bias=has_bias,
    )
    return replace(
        config,
        norm=Norm(kind="layer", eps=keys.number("norm_epsilon", 1e-5), has_bias=True),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    model_types={
        "starcoder2": "StarCoder2 3B, 7B and 15B",
    },
    read_config=read_config,
    names={**LLAMA_NAMES, "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
)
