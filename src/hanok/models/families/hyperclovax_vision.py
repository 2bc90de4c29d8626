"""HyperCLOVA X SEED Think 32B: the text part, which is `hyperclovax`."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys
from hanok.models.text_part import TEXT_PREFIXES, TOWER, read_text_part


def read_config(keys: Keys) -> ModelConfig:
    """Read the text part of a HyperCLOVA X Vision config.json."""
    return read_text_part(keys, {"hyperclovax": "hyperclovax"})


FAMILY = Family(
    model_types={
        "hyperclovax_vision_v2": "HyperCLOVA X SEED Think 32B as transformers writes it",
        "vlm": "HyperCLOVA X SEED Think 32B as published",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_norm1",
        "mlp_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_norm2",
    },
    other_prefixes=TEXT_PREFIXES,
    left_out=TOWER,
)
