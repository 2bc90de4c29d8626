"""Qwen2 and Qwen2.5: biases on query, key and value; a window on the upper layers when asked for."""

from dataclasses import replace

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Qwen2 config.json."""
    config = llama_config(keys)
    keys.ignore("use_mrope")
    uses_window = keys.flag("use_sliding_window", False)
    window, first = keys.get("sliding_window", 4096), keys.get("max_window_layers", 28)
    default = [
        "sliding_attention" if uses_window and index >= first else "full_attention"
        for index in range(config.num_layers)
    ]
    kinds = keys.layer_kinds(config.num_layers, default)
    layers = tuple(
        replace(layer, window=window if uses_window and kind == "sliding_attention" else None)
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    return replace(config, layers=layers, has_qkv_bias=True)


FAMILY = Family(model_types=("qwen2",), read_config=read_config)
