"""Every family against transformers: tiny random checkpoints, the same logits.

A case is a transformers config; its weights are random, norms and biases too, so that each one matters.
`without` switches the family's distinguishing rules off, one at a time, and the logits must then differ:
a rule that could be lost without a test noticing is not implemented.

Tolerance: all is float32, so only the order of sums differs. Logits here are of the order of 1, and
sums over at most 128 products differ by a few 1e-6; 1e-4 leaves room for four layers of them.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.golden import Golden, goldens
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.checkpoint.files import open_checkpoint
from hanok.memory.account import understand
from hanok.memory.load import load_decoder
from hanok.memory.options import LoadOptions
from hanok.memory.planning import describe, plan_load
from hanok.memory.save import save_weights
from hanok.models.config import Experts, ModelConfig, Norm, Rope
from hanok.models.decoder import Decoder
from hanok.models.family import families

TOLERANCE = 1e-4
# What a switched-off rule must change the logits by, at the least: far above the tolerance.
VISIBLE = 1e-2

Change = Callable[[ModelConfig], ModelConfig]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Files of a model whose computation transformers has under another name."""

    model_type: str
    config_names: Mapping[str, str] = field(default_factory=dict)
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions and what is put in the place of what they match."""
    dropped: tuple[str, ...] = ()
    """Keys of transformers' config that the published files do not have."""
    turned: str = "nothing"
    """A regular expression of the tensors whose last two axes are the other way about."""
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensors that the file has beside the model's, with their shapes."""

    def rewrite(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config = {
            self.config_names.get(name, name): value
            for name, value in config.items()
            if name not in self.dropped
        }
        config |= {"model_type": self.model_type, "architectures": ["Other"]}
        (folder / "config.json").write_text(json.dumps(config))
        rename_tensors(folder, self._renamed)
        tensors = load_file(folder / "model.safetensors")
        for name in filter(re.compile(self.turned).fullmatch, tensors):
            tensors[name] = tensors[name].mT.contiguous()
        tensors |= {name: torch.ones(shape) for name, shape in self.added.items()}
        save_file(tensors, folder / "model.safetensors")

    def _renamed(self, name: str) -> str:
        for pattern, new in self.tensor_names.items():
            name = re.sub(pattern, new, name)
        return name


@dataclass(frozen=True, kw_only=True)
class Case:
    config: str
    options: Mapping[str, Any]
    num_tokens: int = 24
    without: Mapping[str, Change] = field(default_factory=dict)
    depends_on_length: bool = False
    drop_prefix: str = ""
    vision: Mapping[str, Any] | None = None
    """The config of a tower; the other options are then those of its text part, `text_config`."""
    published: "Published | None" = None
    """How the files are written that transformers does not know; None: as it writes them."""


BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(**scaling: Any) -> dict[str, Any]:
    return {"rope_theta": 10000.0, **scaling}


def ropes(change: Callable[[Rope], Rope | None]) -> Change:
    def changed(config: ModelConfig) -> ModelConfig:
        layers = [
            layer.with_attention(rope=change(rope)) if (rope := layer.attention.rope) else layer
            for layer in config.layers
        ]
        return replace(config, layers=tuple(layers))

    return changed


def with_fields(**values: Any) -> Change:
    return lambda config: replace(config, **values)


def each_layer(**values: Any) -> Change:
    return lambda config: config.with_layers(**values)


def attention(**values: Any) -> Change:
    return lambda config: config.with_attention(**values)


def rotated_everywhere(config: ModelConfig) -> ModelConfig:
    rotated = next(item.rope for item in config.attentions if item.rope)
    return config.with_attention(rope=rotated)


def with_mlp(**values: Any) -> Change:
    return lambda config: config.with_mlp(**values)


def with_norm(**values: Any) -> Change:
    def changed(config: ModelConfig) -> ModelConfig:
        norm: Norm = replace(config.norm, **values)
        return replace(config, norm=norm)

    return changed


def with_experts(**values: Any) -> Change:
    def changed(config: ModelConfig) -> ModelConfig:
        layers = [
            layer.with_mlp(**values) if isinstance(layer.mlp, Experts) else layer
            for layer in config.layers
        ]
        return replace(config, layers=tuple(layers))

    return changed


no_scaling = ropes(lambda rope: replace(rope, scaling=None))
whole_rotary = ropes(lambda rope: replace(rope, scaling=None, rotary_dim=16))
halves = ropes(lambda rope: replace(rope, is_interleaved=False))

no_growth = ropes(lambda rope: replace(rope, scaling=replace(rope.scaling, query_growth=0.0)))

LLAMA3 = rope(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MINISTRAL3 = rope(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.4,
)
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [0],
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}

# EXAONE 3's own names of what Llama computes (modeling_exaone.py, published beside its weights).
EXAONE = Published(
    model_type="exaone",
    config_names={
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    tensor_names={
        r"^model\.embed_tokens": "transformer.wte",
        r"^model\.norm": "transformer.ln_f",
        r"^model\.layers": "transformer.h",
        r"input_layernorm": "ln_1",
        r"post_attention_layernorm": "ln_2",
        r"self_attn\.o_proj": "attn.attention.out_proj",
        r"self_attn\.": "attn.attention.",
        r"gate_proj": "c_fc_0",
        r"up_proj": "c_fc_1",
        r"down_proj": "c_proj",
    },
    dropped=("attention_bias", "mlp_bias"),
    added={"transformer.rotary.inv_freq": (8,)},
)
MIMO = Published(
    model_type="mimo",
    added={
        "model.mtp_layers.0.input_proj.weight": (64, 128),
        "model.mtp_layers.0.final_layernorm.weight": (64,),
    },
)

CASES = {
    "llama-mha": Case(
        config="LlamaConfig",
        options={"num_key_value_heads": 4},
        without={"rope": attention(rope=None), "eps": with_norm(eps=1e-1)},
    ),
    "llama-tied-llama3-rope": Case(
        config="LlamaConfig",
        options={"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        num_tokens=40,
        without={"llama3 scaling": no_scaling},
    ),
    "llama-biases": Case(
        config="LlamaConfig",
        options={"attention_bias": True, "mlp_bias": True},
        without={
            "qkv bias": attention(has_qkv_bias=False),
            "output bias": attention(has_output_bias=False),
            "mlp bias": with_mlp(has_bias=False),
        },
    ),
    "llama-linear": Case(
        config="LlamaConfig",
        options={"rope_parameters": rope(rope_type="linear", factor=4.0)},
        num_tokens=40,
        without={"linear scaling": no_scaling},
    ),
    "llama-dynamic": Case(
        config="LlamaConfig",
        options={
            "rope_parameters": rope(rope_type="dynamic", factor=4.0),
            "max_position_embeddings": 16,
        },
        num_tokens=28,
        without={"dynamic scaling": no_scaling},
        depends_on_length=True,
    ),
    "llama-yarn": Case(
        config="LlamaConfig",
        options={
            "rope_parameters": rope(
                rope_type="yarn", factor=4.0, original_max_position_embeddings=16
            )
        },
        num_tokens=40,
        without={"yarn scaling": no_scaling},
    ),
    "llama-yarn-mscale": Case(
        config="LlamaConfig",
        options={
            "rope_parameters": rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                mscale=0.7,
                mscale_all_dim=1.0,
                beta_fast=16.0,
                beta_slow=2.0,
                truncate=False,
            )
        },
        num_tokens=40,
        without={"yarn scaling": no_scaling},
    ),
    "mistral": Case(
        config="MistralConfig",
        options={"sliding_window": 8, "head_dim": 24},
        without={"window": attention(window=None), "one less": attention(window=7)},
    ),
    "mixtral": Case(
        config="MixtralConfig",
        options={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        without={
            "renormalised": with_experts(is_renormalised=False),
            "two experts": with_experts(num_experts_per_token=1),
        },
    ),
    "qwen2": Case(
        config="Qwen2Config",
        options={"tie_word_embeddings": True},
        without={"qkv bias": attention(has_qkv_bias=False)},
    ),
    "qwen2-window": Case(
        config="Qwen2Config",
        options={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        without={"window above": attention(window=None), "full below": attention(window=6)},
    ),
    "qwen3": Case(
        config="Qwen3Config",
        options={"head_dim": 24},
        without={"norms on heads": attention(qk_norm=None)},
    ),
    "qwen3_moe": Case(
        config="Qwen3MoeConfig",
        options={
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        without={"renormalised": with_experts(is_renormalised=False)},
    ),
    "qwen3_moe-not-renormalised": Case(
        config="Qwen3MoeConfig",
        options={
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
        },
        without={"not renormalised": with_experts(is_renormalised=True)},
    ),
    "gemma": Case(
        config="GemmaConfig",
        options={"head_dim": 24, "num_key_value_heads": 1},
        without={
            "1 + weight": with_norm(unit_offset=False),
            "scaled embedding": with_fields(embedding_scale=1.0),
            "gelu": with_mlp(activation="silu"),
        },
    ),
    "gemma2": Case(
        config="Gemma2Config",
        options={
            "head_dim": 24,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        without={
            "score cap": attention(softcap=None),
            "logit cap": with_fields(logit_softcap=None),
            "query scale": attention(scale=24**-0.5),
            "window": attention(window=None),
            "full": attention(window=6),
            "norms on both sides": each_layer(norm_placement="pre"),
        },
    ),
    "gemma3_text": Case(
        config="Gemma3TextConfig",
        options={
            "head_dim": 24,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        without={
            "local base": rotated_everywhere,
            "full scaling": no_scaling,
            "window": attention(window=None),
            "norms on heads": attention(qk_norm=None),
            "norms on both sides": each_layer(norm_placement="pre"),
        },
    ),
    "phi3": Case(
        config="Phi3Config",
        options={"sliding_window": 8},
        without={"window": attention(window=None)},
    ),
    "phi3-longrope": Case(
        config="Phi3Config",
        options={
            "rope_parameters": rope(rope_type="longrope", **LONG),
            "original_max_position_embeddings": 16,
        },
        num_tokens=28,
        without={"longrope": no_scaling},
        depends_on_length=True,
    ),
    "phi3-partial": Case(
        config="Phi3Config",
        options={"rope_parameters": rope(rope_type="default", partial_rotary_factor=0.75)},
        without={"partial rotary": whole_rotary},
    ),
    "olmo2": Case(
        config="Olmo2Config",
        options={},
        without={
            "norms after": each_layer(norm_placement="pre"),
            "norms on query and key": attention(qk_norm=None),
        },
    ),
    "smollm3": Case(
        config="SmolLM3Config",
        options={"no_rope_layer_interval": 2},
        without={"layers without rope": rotated_everywhere},
    ),
    "granite": Case(
        config="GraniteConfig",
        options={
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
        },
        without={
            "embedding": with_fields(embedding_scale=1.0),
            "residual": each_layer(residual_scale=1.0),
            "attention": attention(scale=16**-0.5),
            "logits": with_fields(logit_scale=1.0),
        },
    ),
    "glm4": Case(
        config="Glm4Config",
        options={"head_dim": 24},
        without={
            "interleaved": halves,
            "norms on both sides": each_layer(norm_placement="pre"),
            "half a head": ropes(lambda rope: replace(rope, rotary_dim=24)),
        },
    ),
    "gpt_neox": Case(
        config="GPTNeoXConfig",
        options={"rope_parameters": rope(rope_type="default", partial_rotary_factor=0.25)},
        without={
            "parallel": each_layer(norm_placement="pre"),
            "partial rotary": whole_rotary,
            "exact gelu": with_mlp(activation="silu"),
            "layer norm": with_norm(kind="rms"),
        },
    ),
    "gpt_neox-sequential": Case(
        config="GPTNeoXConfig",
        options={"use_parallel_residual": False},
        without={"sequential": each_layer(norm_placement="parallel")},
    ),
    "exaone4": Case(
        config="Exaone4Config",
        options={"sliding_window": 6, "sliding_window_pattern": 4},
        without={
            "full without rope": rotated_everywhere,
            "window": attention(window=None),
            "norms after": each_layer(norm_placement="pre"),
            "norms on heads": attention(qk_norm=None),
        },
    ),
    "exaone4-no-window": Case(
        config="Exaone4Config",
        options={"sliding_window": None, "layer_types": ["full_attention"] * 4},
        without={"rope": attention(rope=None)},
    ),
    "gpt2": Case(
        config="GPT2Config",
        options={"n_inner": 96},
        without={
            "learned positions": with_fields(has_learned_positions=False),
            "gelu": with_mlp(activation="relu"),
            "layer norm": with_norm(kind="rms"),
        },
    ),
    "gpt2-without-prefix": Case(
        config="GPT2Config", options={"n_inner": 96}, drop_prefix="transformer."
    ),
    "starcoder2": Case(
        config="Starcoder2Config",
        options={"sliding_window": 8},
        without={
            "window": attention(window=None),
            "gelu": with_mlp(activation="silu"),
            "layer norm": with_norm(kind="rms"),
            "biases": attention(has_qkv_bias=False, has_output_bias=False),
        },
    ),
    "qwen2_vl": Case(
        config="Qwen2VLConfig",
        options={"model_type": "qwen2_vl_text", "rope_parameters": MROPE},
        vision={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        without={"qkv bias": attention(has_qkv_bias=False)},
    ),
    "qwen2_5_vl": Case(
        config="Qwen2_5_VLConfig",
        options={
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": MROPE,
            "tie_word_embeddings": True,
        },
        vision=QWEN_VISION,
        without={"qkv bias": attention(has_qkv_bias=False)},
    ),
    "qwen3_vl": Case(
        config="Qwen3VLConfig",
        options={
            "model_type": "qwen3_vl_text",
            "head_dim": 24,
            "rope_parameters": {**MROPE, "mrope_section": [4, 4, 4], "mrope_interleaved": True},
        },
        vision={**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        without={"norms on heads": attention(qk_norm=None)},
    ),
    "qwen3_vl_moe": Case(
        config="Qwen3VLMoeConfig",
        options={
            "model_type": "qwen3_vl_moe_text",
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision={**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        published=Published(model_type="qwen3_vl_moe", turned=r".*\.experts\.(gate_up|down)_proj"),
        without={
            "norms on heads": attention(qk_norm=None),
            "renormalised": with_experts(is_renormalised=False),
            "three experts": with_experts(num_experts_per_token=1),
        },
    ),
    "gemma3": Case(
        config="Gemma3Config",
        options={
            "model_type": "gemma3_text",
            "head_dim": 24,
            "sliding_window": 6,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": True,
        },
        vision={**TOWER, "model_type": "siglip_vision_model"},
        without={
            "local base": rotated_everywhere,
            "window": attention(window=None),
            "norms on both sides": each_layer(norm_placement="pre"),
        },
    ),
    "mistral3": Case(
        config="Mistral3Config",
        options={"model_type": "mistral", "head_dim": 24, "sliding_window": None},
        vision={**TOWER, "model_type": "pixtral", "head_dim": 16},
        without={"rope": attention(rope=None)},
    ),
    "mistral3-ministral3": Case(
        config="Mistral3Config",
        options={"model_type": "ministral3", "head_dim": 16, "rope_parameters": MINISTRAL3},
        vision={**TOWER, "model_type": "pixtral", "head_dim": 16},
        num_tokens=40,
        without={"yarn scaling": no_scaling, "growing queries": no_growth},
    ),
    "ministral3": Case(
        config="Ministral3Config",
        options={"head_dim": 16, "rope_parameters": MINISTRAL3, "tie_word_embeddings": True},
        num_tokens=40,
        without={"yarn scaling": no_scaling, "growing queries": no_growth},
    ),
    "llava": Case(
        config="LlavaConfig",
        options={"model_type": "llama"},
        vision={**TOWER, "model_type": "clip_vision_model"},
        without={"rope": attention(rope=None)},
    ),
    "llava-mistral": Case(
        config="LlavaConfig",
        options={"model_type": "mistral", "sliding_window": 6},
        vision={**TOWER, "model_type": "clip_vision_model"},
        without={"window": attention(window=None)},
    ),
    "llava_next": Case(
        config="LlavaNextConfig",
        options={"model_type": "mistral", "sliding_window": None},
        vision={**TOWER, "model_type": "clip_vision_model"},
        without={"rope": attention(rope=None)},
    ),
    "llava_onevision": Case(
        config="LlavaOnevisionConfig",
        options={"model_type": "qwen2"},
        vision={**TOWER, "model_type": "siglip_vision_model"},
        without={"qkv bias": attention(has_qkv_bias=False)},
    ),
    "internvl": Case(
        config="InternVLConfig",
        options={"model_type": "qwen3", "head_dim": 24},
        vision={**TOWER, "model_type": "internvl_vision", "image_size": [56, 56]},
        without={"norms on heads": attention(qk_norm=None)},
    ),
    "hyperclovax_vision_v2": Case(
        config="HyperCLOVAXVisionV2Config",
        options={"model_type": "hyperclovax", "logits_scaling": 0.5},
        vision={**QWEN_VISION, "model_type": "qwen2_5_vl_vision"},
        without={
            "norms on both sides": each_layer(norm_placement="pre"),
            "logits": with_fields(logit_scale=1.0),
        },
    ),
    "vlm": Case(
        config="HyperCLOVAXVisionV2Config",
        options={"model_type": "hyperclovax", "attention_multiplier": 0.1},
        vision={**QWEN_VISION, "model_type": "qwen2_5_vl_vision"},
        published=Published(model_type="vlm"),
        without={"attention": attention(scale=16**-0.5)},
    ),
    "exaone4_5": Case(
        config="Exaone4_5_Config",
        options={"model_type": "exaone4", "sliding_window": 6, "sliding_window_pattern": 4},
        vision={**QWEN_VISION, "num_key_value_heads": 2},
        without={
            "full without rope": rotated_everywhere,
            "window": attention(window=None),
            "norms on heads": attention(qk_norm=None),
        },
    ),
    "exaone": Case(
        config="LlamaConfig",
        options={"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
        published=EXAONE,
        num_tokens=40,
        without={"llama3 scaling": no_scaling, "eps": with_norm(eps=1e-1)},
    ),
    "exaone-tied": Case(
        config="LlamaConfig",
        options={"tie_word_embeddings": True, "head_dim": 24},
        published=EXAONE,
        without={"rope": attention(rope=None)},
    ),
    "hyperclovax": Case(
        config="HyperCLOVAXConfig",
        options={
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
        },
        without={
            "norms on both sides": each_layer(norm_placement="pre"),
            "embedding": with_fields(embedding_scale=1.0),
            "residual": each_layer(residual_scale=1.0),
            "attention": attention(scale=16**-0.5),
            "logits": with_fields(logit_scale=1.0),
        },
    ),
    "hyperclovax-pre": Case(
        config="HyperCLOVAXConfig",
        options={"use_post_norm": False, "attention_bias": True, "mlp_bias": True},
        without={
            "norms before": each_layer(norm_placement="post"),
            "qkv bias": attention(has_qkv_bias=False),
        },
    ),
    "olmo3": Case(
        config="Olmo3Config",
        options={
            "sliding_window": 6,
            "rope_parameters": {
                "full_attention": rope(
                    rope_type="yarn", factor=4.0, original_max_position_embeddings=16
                ),
                "sliding_attention": rope(rope_type="default"),
            },
        },
        num_tokens=40,
        without={
            "window": attention(window=None),
            "full": attention(window=6),
            "scaling of full layers": no_scaling,
            "no scaling of windowed ones": lambda config: config.with_attention(
                rope=config.layers[3].attention.rope
            ),
            "norms after": each_layer(norm_placement="pre"),
            "norms on query and key": attention(qk_norm=None),
        },
    ),
    "cohere": Case(
        config="CohereConfig",
        options={"logit_scale": 0.5},
        without={
            "in pairs": halves,
            "side by side": each_layer(norm_placement="pre"),
            "layer norm": with_norm(kind="rms"),
            "logits": with_fields(logit_scale=1.0),
        },
    ),
    "cohere-untied-biases": Case(
        config="CohereConfig",
        options={"tie_word_embeddings": False, "attention_bias": True, "logit_scale": 2.0},
        without={
            "qkv bias": attention(has_qkv_bias=False),
            "output bias": attention(has_output_bias=False),
        },
    ),
    "cohere2": Case(
        config="Cohere2Config",
        options={"sliding_window": 6, "logit_scale": 0.5},
        without={
            "window": attention(window=None),
            "full without rope": rotated_everywhere,
            "in pairs": halves,
            "side by side": each_layer(norm_placement="pre"),
        },
    ),
    "seed_oss": Case(
        config="SeedOssConfig",
        options={"head_dim": 24},
        without={"qkv bias": attention(has_qkv_bias=False)},
    ),
    "seed_oss-biases": Case(
        config="SeedOssConfig",
        options={"head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
        without={
            "output bias": attention(has_output_bias=False),
            "mlp bias": with_mlp(has_bias=False),
        },
    ),
    "ernie4_5": Case(
        config="Ernie4_5Config",
        options={"head_dim": 24, "use_bias": True, "rope_parameters": rope(rope_type="default")},
        without={
            "in pairs": halves,
            "qkv bias": attention(has_qkv_bias=False),
            "output bias": attention(has_output_bias=False),
            "mlp bias": with_mlp(has_bias=False),
        },
    ),
    "helium": Case(
        config="HeliumConfig",
        options={"head_dim": 16, "rope_parameters": rope(rope_type="default")},
        without={"in pairs": halves},
    ),
    "glm": Case(
        config="GlmConfig",
        options={"head_dim": 24},
        without={
            "in pairs": halves,
            "half a head": ropes(lambda rope: replace(rope, rotary_dim=24)),
            "qkv bias": attention(has_qkv_bias=False),
        },
    ),
    "stablelm": Case(
        config="StableLmConfig",
        options={"use_qkv_bias": True},
        without={
            "quarter of a head": whole_rotary,
            "layer norm": with_norm(kind="rms"),
            "norm biases": with_norm(has_bias=False),
            "qkv bias": attention(has_qkv_bias=False),
        },
    ),
    "stablelm-parallel": Case(
        config="StableLmConfig",
        options={"use_parallel_residual": True},
        without={"side by side": each_layer(norm_placement="pre")},
    ),
    "granitemoehybrid": Case(
        config="GraniteMoeHybridConfig",
        options={
            "layer_types": ["attention"] * 4,
            "num_local_experts": 0,
            "shared_intermediate_size": 80,
            "position_embedding_type": "rope",
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
            "mamba_n_heads": 2,
        },
        without={
            "rope": attention(rope=None),
            "embedding": with_fields(embedding_scale=1.0),
            "residual": each_layer(residual_scale=1.0),
            "attention": attention(scale=16**-0.5),
            "logits": with_fields(logit_scale=1.0),
        },
    ),
    "granitemoehybrid-nope": Case(
        config="GraniteMoeHybridConfig",
        options={
            "layer_types": ["attention"] * 4,
            "num_local_experts": 0,
            "shared_intermediate_size": 80,
            "position_embedding_type": "nope",
            "mamba_n_heads": 2,
        },
        without={"no rope": attention(rope=Rope(theta=1e4, rotary_dim=16))},
    ),
    "gpt_bigcode": Case(
        config="GPTBigCodeConfig",
        options={"n_inner": 96},
        without={
            "learned positions": with_fields(has_learned_positions=False),
            "gelu": with_mlp(activation="relu"),
            "layer norm": with_norm(kind="rms"),
        },
    ),
    "falcon": Case(
        config="FalconConfig",
        options={},
        without={
            "side by side": each_layer(norm_placement="pre"),
            "rope": attention(rope=None),
            "layer norm": with_norm(kind="rms"),
            "norm biases": with_norm(has_bias=False),
            "gelu": with_mlp(activation="silu"),
        },
    ),
    "falcon-sequential-biases": Case(
        config="FalconConfig",
        options={"parallel_attn": False, "bias": True, "ffn_hidden_size": 96},
        without={
            "qkv bias": attention(has_qkv_bias=False),
            "output bias": attention(has_output_bias=False),
            "mlp bias": with_mlp(has_bias=False),
        },
    ),
    "mimo": Case(
        config="Qwen2Config",
        options={},
        published=MIMO,
        without={"qkv bias": attention(has_qkv_bias=False)},
    ),
}

# Config classes that spell the shared sizes otherwise, or have no such size.
RENAMED: Mapping[str, Mapping[str, str | None]] = {
    "GPTNeoXConfig": {"num_key_value_heads": None},
    "FalconConfig": {"num_key_value_heads": None, "intermediate_size": None},
    "GPTBigCodeConfig": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": None,
        "num_key_value_heads": None,
    },
    "GPT2Config": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": None,
        "num_key_value_heads": None,
    },
}


@dataclass(frozen=True)
class Built:
    folder: Path
    model: Any
    tokens: list[int]


def hf_config(case: Case) -> Any:
    options = {}
    names = RENAMED.get(case.config, {})
    for name, value in BASE.items():
        new_name = names.get(name, name)
        if new_name is not None:
            options[new_name] = value
    options |= case.options
    if case.vision is not None:
        # Text alone decides here, so the head is tied where the text part says it.
        tied = options.get("tie_word_embeddings", False)
        text = {"text_config": options, "vision_config": dict(case.vision)}
        return getattr(transformers, case.config)(**text, tie_word_embeddings=tied)
    return getattr(transformers, case.config)(**options)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    made: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in made:
            made[name] = save_random(CASES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return build


def save_random(case: Case, folder: Path) -> Built:
    config = hf_config(case)
    config._attn_implementation = "eager"
    kind = "AutoModelForCausalLM" if case.vision is None else "AutoModelForImageTextToText"
    model = getattr(transformers, kind).from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                scale = 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    if case.published:
        case.published.rewrite(folder)
    if case.drop_prefix:
        rename_tensors(folder, lambda name: name.removeprefix(case.drop_prefix))
    tokens = torch.randint(3, 97, (case.num_tokens,), generator=generator).tolist()
    return Built(folder=folder, model=model, tokens=tokens)


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


def hanok_decoder(folder: Path, attention: str = "auto") -> Decoder:
    return load_decoder(
        describe(folder),
        LoadOptions(dtype="float32", attn_implementation=attention),
    ).decoder


@torch.inference_mode()
def oracle(built: Built, tokens: list[int]) -> Tensor:
    logits: Tensor = built.model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits


@torch.inference_mode()
def prefill(decoder: Decoder, tokens: list[int]) -> Tensor:
    return decoder.logits(decoder(ForwardBatch.of([tokens])))


def types_with_a_case() -> set[str]:
    """The model types that are compared with transformers."""
    return {
        case.published.model_type if case.published else hf_config(case).model_type
        for case in CASES.values()
    }


def untested(model_types: Collection[str], frozen: Mapping[str, Golden]) -> set[str]:
    """Those that are compared neither with transformers nor with frozen logits."""
    return (
        set(model_types) - types_with_a_case() - {golden.model_type for golden in frozen.values()}
    )


def test_every_known_model_type_has_a_case_or_a_golden() -> None:
    assert untested(families(), goldens()) == set()
    assert types_with_a_case() <= set(families())


@pytest.mark.parametrize("name", CASES)
def test_prefill_is_transformers(name: str, built: Callable[[str], Built]) -> None:
    made = built(name)
    expected = oracle(made, made.tokens)
    torch.testing.assert_close(
        prefill(hanok_decoder(made.folder), made.tokens), expected, atol=TOLERANCE, rtol=0
    )
    assert expected.std() > 0.1  # logits that say something


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_token_by_token_is_transformers(
    name: str, attention: str, built: Callable[[str], Built]
) -> None:
    made, case = built(name), CASES[name]
    if attention == "sdpa" and "attn_logit_softcapping" in case.options:
        pytest.skip("sdpa cannot soft-cap scores")
    decoder = hanok_decoder(made.folder, attention)
    cache = decoder.new_cache(1, len(made.tokens))
    rows = []
    for end in range(1, len(made.tokens) + 1):
        # What was computed for other angles is computed again, as generation does.
        if not decoder.config.shares_angles(cache.computed_for[0], end):
            cache.truncate(0, 0)
        past = cache.lengths[0]
        hidden = decoder(ForwardBatch.of([made.tokens[past:end]], past=[past]), cache)
        rows.append(decoder.logits(hidden[-1:])[0])
    if case.depends_on_length:
        # Each length has its own angles, so each step is compared with a prefill of its own.
        expected = torch.stack(
            [oracle(made, made.tokens[: end + 1])[-1] for end in range(len(made.tokens))]
        )
    else:
        expected = oracle(made, made.tokens)
    torch.testing.assert_close(torch.stack(rows), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_packed_sequences_and_chunks_are_each_alone(
    name: str, built: Callable[[str], Built]
) -> None:
    """Three sequences of unequal length in one batch, then more tokens of each in another."""
    made = built(name)
    decoder = hanok_decoder(made.folder)
    whole = [made.tokens, made.tokens[3:14], made.tokens[::-1][:17]]
    first = [made.tokens[:20], made.tokens[3:4], made.tokens[::-1][:9]]
    lengths = [len(tokens) for tokens in whole]
    cache = decoder.new_cache(3, len(made.tokens))
    decoder(ForwardBatch.of(first, sequence_lengths=lengths), cache)
    rest = [tokens[len(start) :] for tokens, start in zip(whole, first, strict=True)]
    batch = ForwardBatch.of(rest, past=[len(start) for start in first])
    together = decoder.logits(decoder(batch, cache))[batch.last_tokens()]
    uncached = ForwardBatch.of(whole)
    packed = decoder.logits(decoder(uncached))[uncached.last_tokens()]
    for index, tokens in enumerate(whole):
        expected = oracle(made, tokens)[-1]
        torch.testing.assert_close(together[index], expected, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(packed[index], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name, case in CASES.items() for rule in case.without]
)
def test_a_switched_off_rule_is_noticed(
    name: str, rule: str, built: Callable[[str], Built]
) -> None:
    made = built(name)
    right = hanok_decoder(made.folder)
    wrong = Decoder(CASES[name].without[rule](right.config))
    wrong.initialise(0.02, torch.Generator().manual_seed(0))  # norms that `right` has not are ones
    wrong.load_state_dict(right.state_dict(), strict=False)
    wrong.use_attention("auto")
    difference = (prefill(wrong, made.tokens) - oracle(made, made.tokens)).abs().max()
    assert difference > VISIBLE


WITH_A_TOWER = [name for name, case in CASES.items() if case.vision is not None]
# What files of each generation put before the text part, its head and the tower.
SPELLINGS = {
    "flat": ("model.", "lm_head.", ""),
    "inner": ("model.language_model.", "lm_head.", "model."),
    "outer": ("language_model.model.", "language_model.lm_head.", ""),
    "both": ("model.language_model.model.", "model.language_model.lm_head.", "model."),
}


def respelt(name: str, spelling: str) -> str:
    text, head, tower = SPELLINGS[spelling]
    for pattern, new in (
        (r"(model\.)?(language_model\.)?(model\.)?(?=layers|norm|embed_tokens)", text),
        (r"(model\.)?(language_model\.)?lm_head\.", head),
        (r"(model\.)?(?=visual|vision_|multi_modal_projector|projector|image_newline)", tower),
    ):
        if match := re.match(pattern, name):
            return new + name[match.end() :]
    raise AssertionError(name)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", WITH_A_TOWER)
def test_a_tower_is_left_out_however_its_files_are_spelt(
    name: str, spelling: str, built: Callable[[str], Built], tmp_path: Path
) -> None:
    made = built(name)
    folder = Path(shutil.copytree(made.folder, tmp_path / "respelt"))
    rename_tensors(folder, lambda name: respelt(name, spelling))
    checkpoint = open_checkpoint(folder)
    loaded = load_decoder(understand(checkpoint), LoadOptions(dtype="float32"))
    torch.testing.assert_close(
        prefill(loaded.decoder, made.tokens), oracle(made, made.tokens), atol=TOLERANCE, rtol=0
    )
    used = {name for source in loaded.sources.values() for name in (*source.names, source.stack)}
    beside = {name for name in checkpoint.tensors if name not in used}
    num_bytes = sum(checkpoint.tensors[name].size_bytes for name in beside)
    assert {ref.name for ref in loaded.left_out} == beside
    assert loaded.report.notes[0] == (
        f"left out: the vision tower and its projector, {len(beside)} tensors of {num_bytes:,} bytes"
    )
    assert not [note for note in loaded.report.notes if note.startswith("tensor names")]
    save_weights(tmp_path, loaded.decoder, loaded.sources, left_out=loaded.left_out)
    saved, original = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)


def test_stacked_experts_are_read_in_either_order(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    """Published files have (experts, in, out); transformers 5 writes (experts, out, in)."""
    made = built("qwen3_vl_moe")
    made.model.save_pretrained(tmp_path)
    folders = (made.folder, tmp_path)
    published, written = (
        load_decoder(describe(path), LoadOptions(dtype="float32")) for path in folders
    )
    stack = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    shapes = [load_file(path / "model.safetensors")[stack].shape for path in folders]
    assert shapes == [(6, 64, 48), (6, 48, 64)]
    torch.testing.assert_close(
        written.decoder.state_dict(), published.decoder.state_dict(), atol=0, rtol=0
    )
    assert written.report.mapped_bytes > published.report.mapped_bytes
    first, second = (
        load_decoder(describe(path), LoadOptions(dtype="float32", quant="int8")).decoder
        for path in folders
    )
    assert torch.equal(prefill(first, made.tokens), prefill(second, made.tokens))
    for loaded, folder in zip((published, written), folders, strict=True):
        plan = plan_load(folder, dtype="float32", may_measure=False)
        report = load_decoder(describe(folder), LoadOptions(dtype="float32"), plan=plan).report
        units = plan.needs.units
        held = report.mapped_bytes + report.copied_bytes
        assert held == sum(unit.weight_bytes for unit in units)
        assert report.mapped_bytes == sum(unit.mapped_bytes for unit in units)
        saved = tmp_path / folder.name / "saved"
        saved.mkdir(parents=True)
        save_weights(saved, loaded.decoder, loaded.sources, left_out=loaded.left_out)
        original, again = (load_file(path / "model.safetensors") for path in (folder, saved))
        assert original.keys() == again.keys()
        assert all(torch.equal(original[name], again[name]) for name in original)


def test_layers_that_guess_ahead_are_left_out(built: Callable[[str], Built]) -> None:
    loaded = load_decoder(describe(built("mimo").folder), LoadOptions(dtype="float32"))
    num_bytes = 4 * (64 * 128 + 64)
    assert loaded.report.notes[0] == (
        f"left out: the layers that guess tokens ahead, 2 tensors of {num_bytes:,} bytes"
    )


@pytest.mark.parametrize("name", ["mistral3", "internvl"])
def test_a_head_that_nothing_is_said_of_is_the_embedding_where_files_hold_none(
    name: str, built: Callable[[str], Built], tmp_path: Path
) -> None:
    made = built(name)
    folder = Path(shutil.copytree(made.folder, tmp_path / "unsaid"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    decoder = hanok_decoder(folder)
    assert not decoder.config.tie_embeddings
    torch.testing.assert_close(
        prefill(decoder, made.tokens), oracle(made, made.tokens), atol=TOLERANCE, rtol=0
    )
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(key for key in tensors if "lm_head" in key))
    save_file(tensors, folder / "model.safetensors")
    tied = transformers.AutoModelForImageTextToText.from_pretrained(folder).float().eval()
    expected = tied(torch.tensor([made.tokens]), use_cache=False).logits[0]
    with torch.inference_mode():
        found = prefill(hanok_decoder(folder), made.tokens)
    torch.testing.assert_close(found, expected.detach(), atol=TOLERANCE, rtol=0)
