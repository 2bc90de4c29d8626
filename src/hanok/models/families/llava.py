"""LLaVA and the models built like it: the text part, which is a family with Llama's tensor names."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys
from hanok.models.text_part import TEXT_PREFIXES, TOWER, read_text_part

_TEXT_TYPES = {
    "llava": ("llama", "mistral", "qwen2"),
    "llava_next": ("llama", "mistral", "qwen2"),
    "llava_onevision": ("qwen2",),
    "internvl": ("qwen2", "qwen3", "llama"),
    "mistral3": ("mistral", "ministral3"),
}

# Published files leave out what transformers' classes have as their defaults.
_DEFAULTS = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
}


def read_config(keys: Keys) -> ModelConfig:
    """Read the text part of a config.json."""
    text_types = {name: name for name in _TEXT_TYPES[keys.model_type]}
    return read_text_part(keys, text_types, defaults=_DEFAULTS)


FAMILY = Family(
    model_types={
        "llava": "LLaVA 1.5 7B and 13B",
        "llava_next": "LLaVA 1.6 (Vicuna, Mistral)",
        "llava_onevision": "LLaVA OneVision 0.5B and 7B",
        "internvl": "InternVL3 in the form of transformers (-hf)",
        "mistral3": "Mistral Small 3.1 and 3.2, Ministral 3 3B, 8B and 14B",
    },
    read_config=read_config,
    names=LLAMA_NAMES,
    other_prefixes=TEXT_PREFIXES,
    left_out=TOWER,
    tied_without_head=("internvl", "mistral3"),
)
