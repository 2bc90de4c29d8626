"""LLaVA, Mistral Small 3.1 and 3.2, Ministral 3: the text part, which is Llama, Mistral or Qwen2."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys
from hanok.models.text_part import TEXT_PREFIXES, TOWER, read_text_part

_TEXT_TYPES = {
    "llava": ("llama", "mistral", "qwen2"),
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
    """Read the text part of a LLaVA or Mistral 3 config.json."""
    text_types = {name: name for name in _TEXT_TYPES[keys.model_type]}
    return read_text_part(keys, text_types, defaults=_DEFAULTS)


FAMILY = Family(
    model_types=tuple(_TEXT_TYPES),
    read_config=read_config,
    names=LLAMA_NAMES,
    other_prefixes=TEXT_PREFIXES,
    left_out=TOWER,
)
