"""The text part of a checkpoint that sees or hears as well: hanok reads it and leaves the rest out.

Such a `config.json` keeps the text model's keys in `text_config`, with a `model_type` of its own (old
files of Qwen2-VL keep them with the others), and its tensors carry another prefix in each generation
of files.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanok.errors import UnsupportedError
from hanok.models.config import ModelConfig
from hanok.models.family import families
from hanok.models.keys import Keys, declared_dtype

TEXT_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.language_model.model.",
)
"""What published files put before the names of the text model, where it is not "model."."""

TOWER: Mapping[str, str] = {
    "the vision tower and its projector": (
        r"(model\.)?((visual|vision_tower|vision_model|(multi_modal_|vision_)?projector)\..+"
        r"|image_newline)"
    )
}
"""What they contain besides the text model."""

# What speaks of the tower, its projector, or the tokens that stand for images.
_VISION_KEYS = """
    vision_config vision_feature_layer vision_feature_select_strategy vision_aspect_ratio
    projector_hidden_act multimodal_projector_bias spatial_merge_size downsample_ratio
    image_seq_length mm_tokens_per_image image_grid_pinpoints use_image_newline_parameter
    image_token_id image_token_index video_token_id video_token_index vision_token_id
    vision_start_token_id vision_end_token_id boi_token_id boi_token_index eoi_token_id eoi_token_index
    img_start_id video_start_id ignore_index
""".split()


def read_text_part(
    keys: Keys,
    text_types: Mapping[str, str],
    *,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    is_tied: bool = False,
) -> ModelConfig:
    """Read the text model of a config.json.

    `text_types` are the model types that its `text_config` may have, and the one whose family reads
    each; the first is that of a file which says none. `defaults` are, for each of these, the values of
    keys that `text_config` leaves out. `is_tied` holds where neither the file nor its `text_config` says
    whether the head is the embedding.
    """
    keys.ignore(*_VISION_KEYS)
    given = keys.object("text_config")
    text_type = given.get("model_type")
    family_type = text_types.get(text_type or next(iter(text_types)))
    if family_type is None:
        raise UnsupportedError(
            f"{keys.where}: text_config has model_type {text_type!r}; hanok's {keys.model_type} "
            f"supports {', '.join(text_types)}."
        )
    read = families()[family_type].read_config
    if not given:
        return read(keys)
    beneath = dict((defaults or {}).get(family_type, {}))
    if "vocab_size" in beneath:  # LLaVA's older files say it outside as well
        beneath["vocab_size"] = keys.whole("vocab_size", beneath["vocab_size"])
    inner = keys.inside("text_config", beneath, model_type=family_type)
    config = read(inner)
    # Some files name the image's tokens here too, or repeat outside what this object says: it counts.
    inner.ignore(*_VISION_KEYS)
    inner.refuse_unread()
    keys.ignore(*given)
    is_tied = inner.flag("tie_word_embeddings", is_tied)
    return replace(
        config,
        model_type=keys.model_type,
        tie_embeddings=keys.flag("tie_word_embeddings", is_tied),
        dtype=config.dtype or declared_dtype(keys),
    )
