"""Granite 4 without Mamba layers and experts (micro, 1B, 350M): Granite 3, perhaps without positions."""

from dataclasses import replace

from hanok.errors import UnsupportedError
from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Granite 4 config.json."""
    config = llama_config(keys)
    keys.ignore("output_router_logits", "router_aux_loss_coef", "num_experts_per_tok")
    keys.ignore("init_method", "time_step_limit", *(f"mamba_{name}" for name in _MAMBA))
    _demand_attention(keys, config.num_layers)
    keys.demand("num_local_experts", 0)
    keys.demand("normalization_function", "rmsnorm")
    # null means what "nope" says.
    keys.demand("position_embedding_type", None, "rope", "nope")
    if keys.get("position_embedding_type") != "rope":
        config = config.with_attention(rope=None)
    has_bias = keys.flag("attention_bias", False)
    config = config.with_layers(residual_scale=keys.number("residual_multiplier", 1.0))
    config = config.with_attention(
        scale=keys.number("attention_multiplier", 1.0),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    return replace(
        config.with_mlp(intermediate_size=keys.whole("shared_intermediate_size", 1024)),
        embedding_scale=keys.number("embedding_multiplier", 1.0),
        logit_scale=1.0 / keys.above_zero("logits_scaling", 1.0),
    )


def _demand_attention(keys: Keys, num_layers: int) -> None:
    """Refuse layers that are no attention, by their kinds."""
    name = "layers_block_type" if keys.get("layers_block_type") is not None else "layer_types"
    kinds = keys.listed(name, ["mamba"] * num_layers, length=num_layers)
    others = sorted({str(kind) for kind in kinds} - {"attention", "full_attention"})
    if others:
        count = sum(str(kind) in others for kind in kinds)
        raise UnsupportedError(
            f"{keys.where}: {count} of {num_layers} layers are {' and '.join(map(repr, others))} "
            f"({name}); hanok's {keys.model_type} computes attention layers only. Granite 4 without "
            "others is micro, 1B and 350M."
        )


_MAMBA = "n_heads n_groups d_state d_head d_conv expand chunk_size conv_bias proj_bias".split()

FAMILY = Family(
    model_types={
        "granitemoehybrid": "Granite 4.0 micro, 1B and 350M",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "mlp.gate_up_proj": "shared_mlp.input_linear",
        "mlp.down_proj": "shared_mlp.output_linear",
    },
)
