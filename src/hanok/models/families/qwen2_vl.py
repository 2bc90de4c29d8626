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
    model_types=tuple(_TEXT_TYPES),
    read_config=read_config,
    names=LLAMA_NAMES,
    other_prefixes=TEXT_PREFIXES,
    left_out=TOWER,
)
