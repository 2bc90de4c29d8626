"""Mixtral: Mistral with a softmax router over experts; the chosen weights sum to one."""

from hanok.models.config import Experts, ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys, llama_config


def read_config(keys: Keys) -> ModelConfig:
    """Read a Mixtral config.json."""
    config = llama_config(keys, default_eps=1e-5)
    keys.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    experts = Experts(
        num_experts=keys.whole("num_local_experts"),
        num_experts_per_token=keys.whole("num_experts_per_tok"),
        intermediate_size=keys.whole("intermediate_size"),
        activation=keys.activation("hidden_act"),
        is_renormalised=True,
    )
    config = config.with_attention(window=keys.whole_or_none("sliding_window"))
    return config.with_layers(mlp=experts)


FAMILY = Family(
    model_types={
        "mixtral": "Mixtral 8x7B and 8x22B",
    },
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "mlp.router": "block_sparse_moe.gate",
        "mlp.experts.{}.gate_up_proj": (
            "block_sparse_moe.experts.{}.w1",
            "block_sparse_moe.experts.{}.w3",
        ),
        "mlp.experts.{}.down_proj": "block_sparse_moe.experts.{}.w2",
    },
)
