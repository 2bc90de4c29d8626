"""Falcon 7B: attention and MLP read one LayerNorm, and all heads share one key and value."""

from hanok.models.config import LayerConfig, Mlp, ModelConfig, Norm, NormPlacement, SoftmaxAttention
from hanok.models.family import Family
from hanok.models.keys import Keys, declared_dtype


def read_config(keys: Keys) -> ModelConfig:
    """Read a Falcon config.json."""
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    head_dim = keys.even_head_dim(hidden, heads)
    keys.ignore("hidden_dropout", "num_kv_heads", "num_ln_in_parallel_attn")
    keys.demand("alibi", False)
    keys.demand("new_decoder_architecture", False)  # 40B, 180B and Falcon 2
    keys.demand("multi_query", True)
    keys.demand("apply_residual_connection_post_layernorm", False)
    has_bias = keys.flag("bias", False)
    rope = keys.rope(head_dim, default_positions=2048)
    attention = SoftmaxAttention(
        num_heads=heads,
        num_kv_heads=1,
        head_dim=head_dim,
        rope=rope,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    mlp = Mlp(
        intermediate_size=keys.whole("ffn_hidden_size", 4 * hidden),
        activation=keys.activation("activation", default="gelu"),
        is_gated=False,
        has_bias=has_bias,
    )
    placement: NormPlacement = "shared" if keys.flag("parallel_attn", True) else "pre"
    layer = LayerConfig(mixer=attention, mlp=mlp, norm_placement=placement)
    return ModelConfig(
        model_type=keys.model_type,
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        max_positions=keys.whole("max_position_embeddings", 2048),
        norm=Norm(kind="layer", eps=keys.number("layer_norm_epsilon", 1e-5), has_bias=True),
        layers=(layer,) * keys.whole("num_hidden_layers"),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        dtype=declared_dtype(keys),
    )


FAMILY = Family(
    model_types={
        "falcon": "Falcon 7B",
    },
    read_config=read_config,
    names={
        "embed_tokens": "transformer.word_embeddings",
        "layers": "transformer.h",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "self_attn.qkv_proj": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    ignored_tensors=(r".*\.rotary_emb\.inv_freq", r".*\.maybe_rotary\.inv_freq"),
)
