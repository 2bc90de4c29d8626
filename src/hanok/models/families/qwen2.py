"""Qwen2 and Qwen2.5: biases on query, key and value; a window on the upper layers when asked for."""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config, windows_above


def read_config(keys: Keys) -> ModelConfig:
    """Read a Qwen2 config.json."""
    config = llama_config(keys)
    keys.ignore("use_mrope")
    return replace(config, layers=windows_above(keys, config.layers), has_qkv_bias=True)


FAMILY = Family(
    model_types={
        "qwen2": "Qwen2, Qwen2.5, Qwen2.5-Coder, QwQ 32B, DeepSeek-R1-Distill-Qwen, A.X 4.0",
    },
    read_config=read_config,
)
