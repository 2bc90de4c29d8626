"""Llama 2 and 3.x, Mistral, and the many models that are Llama with other sizes.

Llama may have biases (`attention_bias`, `mlp_bias`); Mistral may see a sliding window.
"""

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Llama or Mistral config.json."""
    config = llama_config(keys)
    if keys.model_type == "mistral":
        return config.with_attention(window=keys.whole_or_none("sliding_window", 4096))
    keys.ignore("is_llama_config", "transformers.js_config")
    keys.demand("rope_interleaved", False)
    has_bias = keys.flag("attention_bias", False)
    config = config.with_attention(has_qkv_bias=has_bias, has_output_bias=has_bias)
    return config.with_mlp(has_bias=keys.flag("mlp_bias", False))


FAMILY = Family(
    model_types={
        "llama": (
            "Llama 2, 3, 3.1, 3.2 (1B, 3B) and 3.3, Code Llama, TinyLlama, "
            "SmolLM 1 and 2, Yi, SOLAR 10.7B, Kanana, DeepSeek-R1-Distill-Llama"
        ),
        "mistral": "Mistral 7B v0.1 to v0.3, Mistral Nemo, Mistral Small (24B)",
    },
    read_config=read_config,
)
