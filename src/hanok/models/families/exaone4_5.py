"""EXAONE 4.5: the text part, which is EXAONE 4 with a layer after it that predicts further tokens."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys
from hanok.models.text_part import TEXT_PREFIXES, TOWER, read_text_part


def read_config(keys: Keys) -> ModelConfig:
    """Read the text part of an EXAONE 4.5 config.json."""
    return read_text_part(keys, dict.fromkeys(("exaone4_5_text", "exaone4"), "exaone4"))


FAMILY = Family(
    model_types={
        "exaone4_5": "EXAONE 4.5 33B",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    other_prefixes=TEXT_PREFIXES,
    left_out={**TOWER, "the layers that guess tokens ahead": r"(model\.)?mtp\..+"},
)
