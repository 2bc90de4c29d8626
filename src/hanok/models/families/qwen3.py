"""Qwen3: norms on each query and key head instead of biases; Qwen3-MoE adds experts."""

from dataclasses import replace

from hanok.models.config import Experts, ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config, windows_above


def read_config(keys: Keys) -> ModelConfig:
    """Read a Qwen3 or Qwen3-MoE config.json."""
    config = llama_config(keys)
    has_bias = keys.flag("attention_bias", False)
    config = config.with_attention(qk_norm="head", has_qkv_bias=has_bias, has_output_bias=has_bias)
    if keys.model_type == "qwen3":
        return replace(config, layers=windows_above(keys, config.layers))

    keys.ignore("max_window_layers")
    window = keys.whole_or_none("sliding_window", 4096)
    if not keys.flag("use_sliding_window", False):
        window = None
    keys.ignore("output_router_logits", "router_aux_loss_coef")
    # Qwen3-Coder says what the other files leave out.
    keys.demand("qkv_bias", False)
    keys.demand("use_qk_norm", True)
    keys.demand("shared_expert_intermediate_size", 0)
    step, dense = keys.whole("decoder_sparse_step", 1), keys.listed("mlp_only_layers", [])
    experts = Experts(
        num_experts=keys.whole("num_experts", keys.get("num_local_experts", 128)),
        num_experts_per_token=keys.whole("num_experts_per_tok"),
        intermediate_size=keys.whole("moe_intermediate_size"),
        activation=keys.activation("hidden_act"),
        is_renormalised=keys.flag("norm_topk_prob", False),
    )
    layers = tuple(
        replace(layer, mlp=experts) if (index + 1) % step == 0 and index not in dense else layer
        for index, layer in enumerate(config.layers)
    )
    return replace(config, layers=layers).with_attention(window=window)


FAMILY = Family(
    model_types={
        "qwen3": "Qwen3 0.6B to 32B",
        "qwen3_moe": "Qwen3 30B-A3B and 235B-A22B, Qwen3-Coder 30B-A3B and 480B-A35B",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "mlp.router": "mlp.gate",
        "mlp.experts.{}.gate_up_proj": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    },
)
