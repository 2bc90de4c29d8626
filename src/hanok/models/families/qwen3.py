"""Qwen3: norms on each query and key head instead of biases; Qwen3-MoE adds experts."""

from dataclasses import replace

from hanok.models.config import Experts, ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Qwen3 or Qwen3-MoE config.json."""
    config = llama_config(keys)
    has_bias = keys.flag("attention_bias", False)
    uses_window = keys.flag("use_sliding_window", False)
    window, first = keys.get("sliding_window", 4096), keys.get("max_window_layers", 28)
    config = replace(config, qk_norm="head", has_qkv_bias=has_bias, has_output_bias=has_bias)
    if keys.model_type == "qwen3":
        default = [
            "sliding_attention" if uses_window and index >= first else "full_attention"
            for index in range(config.num_layers)
        ]
        kinds = keys.layer_kinds(config.num_layers, default)
        layers = tuple(
            replace(layer, window=window if uses_window and kind == "sliding_attention" else None)
            for layer, kind in zip(config.layers, kinds, strict=True)
        )
        return replace(config, layers=layers)

    keys.ignore("output_router_logits", "router_aux_loss_coef")
    step, dense = keys.whole("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    return replace(
        config,
        layers=tuple(
            replace(
                layer,
                window=window if uses_window else None,
                has_experts=(index + 1) % step == 0 and index not in dense,
            )
            for index, layer in enumerate(config.layers)
        ),
        experts=Experts(
            num_experts=keys.whole("num_experts", keys.get("num_local_experts", 128)),
            num_experts_per_token=keys.whole("num_experts_per_tok"),
            intermediate_size=keys.whole("moe_intermediate_size"),
            is_renormalised=keys.flag("norm_topk_prob", False),
        ),
    )


FAMILY = Family(
    model_types=("qwen3", "qwen3_moe"),
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "mlp.router": "mlp.gate",
        "mlp.experts.{}.gate_up_proj": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    },
)
