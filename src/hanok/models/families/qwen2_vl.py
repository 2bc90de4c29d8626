"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the text part, which is Qwen2 and Qwen3."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys
from hanok.models.text_part import TEXT_PREFIXES, TOWER, read_text_part

_TEXT_TYPES = {
    "qwen2_vl": {"qwen2_vl_text": "qwen2"},
    "qwen2_5_vl": {"qwen2_5_vl_text": "qwen2"},
    "qwen3_vl": {"qwen3_vl_text": "qwen3"},
}


def read_config(keys: Keys) -> ModelConfig:
    """Read the text part of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL config.json."""
    return read_text_part(keys, _TEXT_TYPES[keys.model_type])


FAMILY = Family(
    model_types={
        "qwen2_vl": "Qwen2-VL 2B, 7B and 72B",
        "qwen2_5_vl": "Qwen2.5-VL 3B, 7B, 32B and 72B",
        "qwen3_vl": "Qwen3-VL 2B, 4B, 8B and 32B",
    },
    read_config=read_config,
    names=LLAMA_NAMES,
    other_prefixes=TEXT_PREFIXES,
    left_out=TOWER,
)
