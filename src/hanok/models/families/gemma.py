"""Gemma: norms multiply by 1 + weight, embeddings are scaled by sqrt(hidden), GELU gate, tied head."""

from dataclasses import replace

from hanok.errors import CheckpointError
from hanok.models.config import Activation, ModelConfig
from hanok.models.family import Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Gemma config.json."""
    config = llama_config(keys)
    has_bias = keys.flag("attention_bias", False)
    keys.demand("use_bidirectional_attention", False, None)
    activation = _activation(keys)
    config = config.with_attention(has_qkv_bias=has_bias, has_output_bias=has_bias)
    return replace(
        config.with_mlp(activation=activation),
        norm=replace(config.norm, unit_offset=True),
        embedding_scale=config.hidden_size**0.5,
        tie_embeddings=keys.flag("tie_word_embeddings", True),
    )


def _activation(keys: Keys) -> Activation:
    """Return what `hidden_act` and `hidden_activation`, which came later, both say."""
    # Files from before `hidden_activation` say "gelu" and mean its tanh form.
    is_old = keys.get("hidden_act") == "gelu"
    first = "gelu_tanh" if is_old else keys.activation("hidden_act", default="gelu_pytorch_tanh")
    given = keys.get("hidden_activation")
    if given is not None and keys.activation("hidden_activation") != first:
        raise CheckpointError(
            f"{keys.where} contradicts itself: hidden_act is {keys.get('hidden_act')!r}, and "
            f"hidden_activation {given!r}. Keep one of them."
        )
    return first


FAMILY = Family(
    model_types={
        "gemma": "Gemma 2B and 7B, CodeGemma",
    },
    read_config=read_config,
)
