"""StarCoder and SantaCoder: GPT-2 whose heads share one key and value, with matrices as (out, in)."""

from hanok.models.config import LayerConfig, Mlp, ModelConfig, Norm
from hanok.models.family import Family
from hanok.models.keys import Keys, declared_dtype


def read_config(keys: Keys) -> ModelConfig:
    """Read a GPTBigCode config.json."""
    hidden, heads = keys.whole("n_embd"), keys.whole("n_head")
    head_dim = keys.even_head_dim(hidden, heads)
    keys.ignore("resid_pdrop", "embd_pdrop", "attn_pdrop", *_RUNNER)
    keys.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    keys.ignore(*(f"summary_{name}" for name in _SUMMARY))
    keys.demand("add_cross_attention", False)
    keys.demand("multi_query", True)
    keys.ignore("num_key_value_heads")  # what multi_query says
    scales = keys.flag("scale_attn_weights", True)
    return ModelConfig(
        model_type=keys.model_type,
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=1,
        head_dim=head_dim,
        max_positions=keys.whole("n_positions", 1024),
        norm=Norm(kind="layer", eps=keys.number("layer_norm_epsilon", 1e-5), has_bias=True),
        mlp=Mlp(
            intermediate_size=keys.whole("n_inner", 4 * hidden),
            activation=keys.activation("activation_function", default="gelu_pytorch_tanh"),
            is_gated=False,
            has_bias=True,
        ),
        layers=(LayerConfig(rope=None),) * keys.whole("n_layer"),
        has_learned_positions=True,
        has_qkv_bias=True,
        has_output_bias=True,
        attention_scale=head_dim**-0.5 if scales else 1.0,
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        dtype=declared_dtype(keys),
    )


_SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")
# How the program that trained it ran it.
_RUNNER = (
    "inference_runner validate_runner_input pre_allocate_kv_cache max_sequence_length max_batch_size"
    " runner_max_sequence_length pad_key_length"
).split()

FAMILY = Family(
    model_types={
        "gpt_bigcode": "StarCoder, StarCoderBase 1B to 15B",
    },
    read_config=read_config,
    names={
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "layers": "transformer.h",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "self_attn.qkv_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    ignored_tensors=(r".*\.attn\.(bias|masked_bias)",),
)
