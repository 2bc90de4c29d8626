"""StarCoder and SantaCoder: GPT-2 whose heads share one key and value, with matrices as (out, in)."""

from hanok.models.config import ModelConfig
from hanok.models.family import GPT2_NAMES, Family
from hanok.models.keys import Keys, gpt2_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a GPTBigCode config.json."""
    keys.ignore(*_RUNNER)
    keys.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    keys.demand("add_cross_attention", False)
    keys.demand("multi_query", True)
    keys.ignore("num_key_value_heads")  # what multi_query says
    config = gpt2_config(keys, default_activation="gelu_pytorch_tanh")
    return config.with_attention(num_kv_heads=1)


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
    names=GPT2_NAMES,
    ignored_tensors=(r".*\.attn\.(bias|masked_bias)",),
)
