"""Qwen3-VL with experts: the text part, which is Qwen3-MoE with all experts' matrices in one tensor."""

from hanok.models.config import ModelConfig
from hanok.models.family import LLAMA_NAMES, Family
from hanok.models.keys import Keys
from hanok.models.text_part import TEXT_PREFIXES, TOWER, read_text_part


def read_config(keys: Keys) -> ModelConfig:
    """Read the text part of a Qwen3-VL-MoE config.json."""
    return read_text_part(
        keys,
        {"qwen3_vl_moe_text": "qwen3_moe"},
        # transformers leaves it out, and renormalises whatever a file says.
        defaults={"qwen3_moe": {"norm_topk_prob": True}},
    )


_EXPERTS = ("mlp.experts.{}.gate_up_proj", "mlp.experts.{}.down_proj")

FAMILY = Family(
    model_types={"qwen3_vl_moe": "Qwen3-VL 30B-A3B and 235B-A22B"},
    read_config=read_config,
    names={
        **LLAMA_NAMES,
        "mlp.router": "mlp.gate",
        "mlp.experts.{}.gate_up_proj": "mlp.experts.gate_up_proj.{}",
        "mlp.experts.{}.down_proj": "mlp.experts.down_proj.{}",
    },
    layouts=dict.fromkeys(_EXPERTS, "columns"),
    stacked=_EXPERTS,
    other_prefixes=TEXT_PREFIXES,
    left_out=TOWER,
)
