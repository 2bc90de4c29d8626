"""EXAONE 3.0, 3.5 and Deep: Llama's computation under names of GPT-2's kind."""

from hanok.models.config import LayerConfig, Mlp, ModelConfig, Norm, SoftmaxAttention
from hanok.models.family import Family
from hanok.models.keys import Keys, declared_dtype


def read_config(keys: Keys) -> ModelConfig:
    """Read an EXAONE 3 config.json."""
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    head_dim = keys.whole("head_dim", hidden // heads)
    num_layers = keys.whole("num_layers", keys.get("num_hidden_layers"))
    keys.ignore("embed_dropout")
    attention = SoftmaxAttention(
        num_heads=heads,
        num_kv_heads=keys.kv_heads(heads),
        head_dim=head_dim,
        rope=keys.rope(head_dim),
    )
    mlp = Mlp(
        intermediate_size=keys.whole("intermediate_size", 4 * hidden),
        activation=keys.activation("activation_function", default="silu"),
    )
    return ModelConfig(
        model_type=keys.model_type,
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        max_positions=keys.whole("max_position_embeddings"),
        norm=Norm(kind="rms", eps=keys.number("layer_norm_epsilon", 1e-5)),
        layers=(LayerConfig(mixer=attention, mlp=mlp),) * num_layers,
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        dtype=declared_dtype(keys),
    )


FAMILY = Family(
    model_types={
        "exaone": "EXAONE 3.0 7.8B, EXAONE 3.5 and EXAONE Deep 2.4B, 7.8B and 32B",
    },
    read_config=read_config,
    names={
        "embed_tokens": "transformer.wte",
        "layers": "transformer.h",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "self_attn.qkv_proj": tuple(f"attn.attention.{part}_proj" for part in "qkv"),
        "self_attn.o_proj": "attn.attention.out_proj",
        "mlp.gate_up_proj": ("mlp.c_fc_0", "mlp.c_fc_1"),
        "mlp.down_proj": "mlp.c_proj",
    },
    ignored_tensors=(r".*\.rotary(_emb)?\.inv_freq",),
)
