"""GPT-NeoX, Pythia, Polyglot-ko: LayerNorm, attention and MLP side by side, rotation of a part.

The file's qkv matrix is ordered head by head, each head with its query, key and value.
"""

from hanok.models.config import (
    LayerConfig,
    Mlp,
    ModelConfig,
    Norm,
    NormPlacement,
    Rope,
    SoftmaxAttention,
)
from hanok.models.family import Family
from hanok.models.keys import Keys, declared_dtype


def read_config(keys: Keys) -> ModelConfig:
    """Read a GPT-NeoX config.json."""
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    head_dim = keys.even_head_dim(hidden, heads)
    keys.ignore("hidden_dropout", "classifier_dropout", "use_cache")
    keys.ignore("attention_probs_dropout_prob", "hidden_dropout_prob")
    has_bias = keys.flag("attention_bias", True)
    rope: Rope = keys.rope(
        head_dim,
        default_theta=keys.agreed("rotary_emb_base", "rope_theta", default=10000.0),
        default_partial=keys.agreed("rotary_pct", "partial_rotary_factor", default=0.25),
    )
    attention = SoftmaxAttention(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        rope=rope,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    mlp = Mlp(
        intermediate_size=keys.whole("intermediate_size"),
        activation=keys.activation("hidden_act", default="gelu"),
        is_gated=False,
        has_bias=True,
    )
    placement: NormPlacement = "parallel" if keys.flag("use_parallel_residual", True) else "pre"
    layer = LayerConfig(mixer=attention, mlp=mlp, norm_placement=placement)
    return ModelConfig(
        model_type=keys.model_type,
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        max_positions=keys.whole("max_position_embeddings"),
        norm=Norm(kind="layer", eps=keys.number("layer_norm_eps", 1e-5), has_bias=True),
        layers=(layer,) * keys.whole("num_hidden_layers"),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        dtype=declared_dtype(keys),
    )


FAMILY = Family(
    model_types={
        "gpt_neox": "Pythia, GPT-NeoX-20B, Polyglot-ko, KoAlpaca, RedPajama-INCITE",
    },
    read_config=read_config,
    names={
        "embed_tokens": "gpt_neox.embed_in",
        "layers": "gpt_neox.layers",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "self_attn.qkv_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    layouts={"self_attn.qkv_proj": "heads"},
    ignored_tensors=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
