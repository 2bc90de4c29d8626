"""Gemma 3 with 4, 12 and 27 billion parameters: the text part, which is `gemma3_text`."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys
from hanok.models.text_part import TEXT_PREFIXES, TOWER, read_text_part

# Published files leave out what transformers' class has as its defaults.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


def read_config(keys: Keys) -> ModelConfig:
    """Read the text part of a Gemma 3 config.json."""
    text_type = "gemma3_text"
    defaults = {text_type: _DEFAULTS}
    return read_text_part(keys, {text_type: text_type}, defaults=defaults, is_tied=True)


FAMILY = Family(
    model_types={
        "gemma3": "Gemma 3 4B, 12B and 27B",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    other_prefixes=TEXT_PREFIXES,
    left_out=TOWER,
)
