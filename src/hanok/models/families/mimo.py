"""MiMo 7B: Qwen2 with a layer after it that predicts further tokens, which is left out."""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config, windows_above


def read_config(keys: Keys) -> ModelConfig:
    """Read a MiMo config.json."""
    config = llama_config(keys)
    keys.ignore("use_mrope", "num_nextn_predict_layers")
    keys.demand("attention_bias", True)
    config = replace(config, layers=windows_above(keys, config.layers))
    return config.with_attention(has_qkv_bias=True)


FAMILY = Family(
    model_types={
        "mimo": "MiMo 7B",
    },
    read_config=read_config,
    left_out={"the layers that guess tokens ahead": r"model\.mtp_layers\..+"},
)
