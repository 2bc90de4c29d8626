"""Ministral 3 and Devstral 2 (text): Mistral with YaRN and queries that grow with their position."""

from hanok.models.config import ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Ministral 3 config.json."""
    config = llama_config(keys, default_eps=1e-5)
    return config.with_attention(window=keys.whole_or_none("sliding_window"))


FAMILY = Family(
    model_types={
        "ministral3": "text files of Ministral 3 and Devstral 2",
    },
    read_config=read_config,
)
