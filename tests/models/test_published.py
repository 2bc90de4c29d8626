"""Published config.json files, key by key: each opens, and says what transformers makes of it.

They are files of the Hugging Face hub; long lists of layers are written as what they repeat. Where
transformers has the family it builds the model on `meta`, with fewer layers: the same names and shapes.
"""

from typing import Any

import pytest
import torch
import transformers

from hanok.errors import UnsupportedError
from hanok.models.config import LayerConfig, ModelConfig
from hanok.models.family import families, read_config, sources

EVERYWHERE: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}
WINDOWS = ["sliding_attention"] * 3 + ["full_attention"]

PUBLISHED: dict[str, dict[str, Any]] = {
    "EXAONE-3.0-7.8B": {
        "activation_function": "silu",
        "architectures": ["ExaoneForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_exaone.ExaoneConfig"},
        "embed_dropout": 0.0,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 4096,
        "model_type": "exaone",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_layers": 32,
        "pad_token_id": 0,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 102400,
    },
    "EXAONE-3.5-2.4B": {
        "activation_function": "silu",
        "architectures": ["ExaoneForCausalLM"],
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "head_dim": 80,
        "hidden_size": 2560,
        "intermediate_size": 7168,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 32768,
        "model_type": "exaone",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_layers": 30,
        "pad_token_id": 0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "vocab_size": 102400,
    },
    "HyperCLOVAX-SEED-Think-14B": {
        "architectures": ["HyperCLOVAXForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 0.0078125,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "embedding_multiplier": 10.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "intermediate_size": 14336,
        "logits_scaling": 0.125,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "hyperclovax",
        "num_attention_heads": 48,
        "num_hidden_layers": 38,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "resid_pdrop": 0.0,
        "residual_multiplier": 1.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000000,
        "summary_first_dropout": 0.0,
        "use_post_norm": True,
        "vocab_size": 110592,
    },
    "aya-23-8B": {
        "architectures": ["CohereForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "layer_norm_eps": 1e-05,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "model_type": "cohere",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "rope_theta": 10000,
        "use_qk_norm": False,
        "vocab_size": 256000,
    },
    "c4ai-command-r-v01": {
        "architectures": ["CohereForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "layer_norm_eps": 1e-05,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "model_max_length": 131072,
        "model_type": "cohere",
        "num_attention_heads": 64,
        "num_hidden_layers": 40,
        "num_key_value_heads": 64,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_theta": 8000000.0,
        "vocab_size": 256000,
    },
    "c4ai-command-r7b-12-2024": {
        "architectures": ["Cohere2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "cache_implementation": "hybrid",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "layer_norm_eps": 1e-05,
        "layer_switch": 4,
        "logit_scale": 0.25,
        "max_position_embeddings": 132096,
        "model_type": "cohere2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "order_of_interleaved_layers": "local_attn_first",
        "pad_token_id": 0,
        "position_embedding_type": "rope_gptj",
        "rope_scaling": None,
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": False,
        "vocab_size": 256000,
    },
    "Olmo-3-7B": {
        "architectures": ["Olmo3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "layer_types": WINDOWS * 8,
        "max_position_embeddings": 65536,
        "model_type": "olmo3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 100278,
    },
    "Seed-OSS-36B": {
        "architectures": ["SeedOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.1,
        "attention_out_bias": False,
        "pad_token_id": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_position_embeddings": 524288,
        "mlp_bias": False,
        "model_type": "seed_oss",
        "num_attention_heads": 80,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "residual_dropout": 0.1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 155136,
    },
    "ERNIE-4.5-0.3B": {
        "architectures": ["Ernie4_5_ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_ernie4_5.Ernie4_5_Config"},
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 131072,
        "model_type": "ernie4_5",
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_hidden_layers": 18,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "vocab_size": 103424,
        "rope_theta": 500000,
        "use_bias": False,
        "tie_word_embeddings": True,
    },
    "glm-4-9b-chat-hf": {
        "architectures": ["GlmForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "max_position_embeddings": 131072,
        "model_type": "glm",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-07,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 151552,
    },
    "stablelm-2-1_6b": {
        "architectures": ["StableLmForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 4096,
        "model_type": "stablelm",
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "use_qkv_bias": True,
        "vocab_size": 100352,
    },
    "granite-4.0-micro": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "init_method": "mup",
        "intermediate_size": 8192,
        "layer_types": ["attention"] * 40,
        "logits_scaling": 10,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 40,
        "mamba_d_state": 256,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 128,
        "mamba_proj_bias": False,
        "max_position_embeddings": 131072,
        "model_type": "granitemoehybrid",
        "normalization_function": "rmsnorm",
        "num_attention_heads": 40,
        "num_experts_per_tok": 0,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "num_local_experts": 0,
        "output_router_logits": False,
        "pad_token_id": 100256,
        "position_embedding_type": "rope",
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.01,
        "shared_intermediate_size": 8192,
        "tie_word_embeddings": True,
        "vocab_size": 100352,
    },
    "starcoderbase-1b": {
        "activation_function": "gelu_pytorch_tanh",
        "architectures": ["GPTBigCodeForCausalLM"],
        "attention_softmax_in_fp32": True,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "inference_runner": 0,
        "layer_norm_epsilon": 1e-05,
        "max_batch_size": None,
        "max_sequence_length": None,
        "model_type": "gpt_bigcode",
        "multi_query": True,
        "n_embd": 2048,
        "n_head": 16,
        "n_inner": 8192,
        "n_layer": 24,
        "n_positions": 8192,
        "pad_key_length": True,
        "pre_allocate_kv_cache": False,
        "resid_pdrop": 0.1,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "validate_runner_input": True,
        "vocab_size": 49152,
    },
    "falcon-7b": {
        "alibi": False,
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["FalconForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
        "bias": False,
        "hidden_dropout": 0.0,
        "hidden_size": 4544,
        "layer_norm_epsilon": 1e-05,
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "helium-1-preview-2b": {
        "architectures": ["HeliumForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "helium",
        "num_attention_heads": 20,
        "num_hidden_layers": 24,
        "num_key_value_heads": 20,
        "pad_token_id": 3,
        "rms_norm_eps": 1e-08,
        "rope_theta": 100000.0,
        "tie_word_embeddings": False,
        "vocab_size": 48000,
    },
    "MiMo-7B": {
        "architectures": ["MiMoForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 32768,
        "max_window_layers": 36,
        "model_type": "mimo",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 640000,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151680,
    },
    "Ministral-3-3B": {
        "architectures": ["Ministral3ForCausalLM"],
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_hidden_layers": 26,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
        "vocab_size": 131072,
    },
    "starcoder2-7b": {
        "activation_function": "gelu",
        "architectures": ["Starcoder2ForCausalLM"],
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "embedding_dropout": 0.1,
        "attention_softmax_in_fp32": True,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 18432,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "model_type": "starcoder2",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "num_attention_heads": 36,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "rope_theta": 1000000,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "sliding_window": 4096,
        "use_bias": True,
        "vocab_size": 49152,
    },
    "Qwen3-Coder-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5472,
        "max_position_embeddings": 262144,
        "max_window_layers": 28,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "qkv_bias": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.0,
        "shared_expert_intermediate_size": 0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "distilgpt2": {
        "_num_labels": 1,
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 6,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "kogpt2-base-v2": {
        "_num_labels": 1,
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "author": "somebody",
        "created_date": "2021-04-28",
        "embd_pdrop": 0.1,
        "gradient_checkpointing": False,
        "layer_norm_epsilon": 1e-05,
        "license": "CC-BY-NC-SA 4.0",
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": None,
        "n_layer": 12,
        "n_positions": 1024,
        "pad_token_id": 3,
        "resid_pdrop": 0.1,
        "vocab_size": 51200,
    },
    "Megrez-3B": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "max_position_embeddings": 4096,
        "max_sequence_length": 4096,
        "model_type": "llama",
        "num_attention_heads": 40,
        "num_hidden_layers": 32,
        "num_key_value_heads": 10,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 5000000,
        "tie_word_embeddings": False,
        "vocab_size": 122880,
    },
    "gpt-neox-20b": {
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_probs_dropout_prob": 0,
        "hidden_act": "gelu_fast",
        "hidden_dropout_prob": 0,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "vocab_size": 50432,
    },
}
# Tied heads counted once: what transformers counts, and for EXAONE what its sizes add up to.
PARAMETERS = {
    "EXAONE-3.0-7.8B": 7_818_448_896,
    "EXAONE-3.5-2.4B": 2_405_327_360,
    "aya-23-8B": 8_028_033_024,
    "ERNIE-4.5-0.3B": 360_748_032,
    "stablelm-2-1_6b": 1_644_515_328,
    "starcoder2-7b": 7_173_923_840,
    "falcon-7b": 6_921_720_704,
    "distilgpt2": 81_912_576,
    "kogpt2-base-v2": 125_164_032,
    "gpt-neox-20b": 20_554_567_680,
    "Qwen3-Coder-30B-A3B": 30_532_122_624,
}


def read(config: dict[str, Any]) -> ModelConfig:
    return read_config({**EVERYWHERE, **config}, "a/config.json")[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_file_is_accounted_for(name: str) -> None:
    found = read(PUBLISHED[name])
    assert found.model_type == PUBLISHED[name]["model_type"]
    if name in PARAMETERS:
        assert found.num_parameters() == PARAMETERS[name]


def shortened(config: dict[str, Any], num_layers: int = 4) -> dict[str, Any]:
    depth = "n_layer" if "n_layer" in config else "num_hidden_layers"
    shorter = {**EVERYWHERE, **config, depth: num_layers}
    if "layer_types" in config:
        shorter["layer_types"] = config["layer_types"][:num_layers]
    if "num_experts" in config:  # experts are one tensor in transformers' memory
        shorter["mlp_only_layers"] = list(range(num_layers))
    return shorter


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, config in PUBLISHED.items()
        # transformers calls the head of GPT-NeoX otherwise in memory than in files.
        if config["model_type"] in transformers.CONFIG_MAPPING and name != "gpt-neox-20b"
    ],
)
def test_tensors_are_those_that_transformers_makes_of_the_file(name: str) -> None:
    config = shortened(PUBLISHED[name])
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind.from_dict(config))
    family, found = read_config(config, "a/config.json")
    named = {name: tuple(value.shape) for name, value in model.named_parameters()}
    expected = {
        name: shape
        for source in sources(family, found, named).values()
        for name, shape in zip(source.names, source.file_shapes(), strict=True)
    }
    assert expected == named


def kinds(layers: tuple[LayerConfig, ...]) -> list[tuple[int | None, bool, bool]]:
    return [
        (item.window, item.rope is not None, bool(item.rope and item.rope.scaling))
        for item in (layer.attention for layer in layers)
    ]


def test_layers_of_three_kinds_follow_the_published_order() -> None:
    cohere2 = read(PUBLISHED["c4ai-command-r7b-12-2024"])
    turned, everything = (4096, True, False), (None, False, False)
    assert kinds(cohere2.layers) == [turned, turned, turned, everything] * 8
    olmo3 = read(PUBLISHED["Olmo-3-7B"])
    assert kinds(olmo3.layers) == [turned, turned, turned, (None, True, True)] * 8


def test_a_context_is_what_the_model_was_trained_for() -> None:
    assert read(PUBLISHED["c4ai-command-r-v01"]).max_context_tokens == 131_072
    assert read(PUBLISHED["aya-23-8B"]).max_context_tokens == 8192
    assert read(PUBLISHED["falcon-7b"]).max_context_tokens == 2048
    assert read(PUBLISHED["Ministral-3-3B"]).max_context_tokens == 262_144


GRANITE = PUBLISHED["granite-4.0-micro"]


@pytest.mark.parametrize(
    ("name", "key", "value", "part"),
    [
        ("falcon-7b", "alibi", True, "alibi is True"),
        ("falcon-7b", "new_decoder_architecture", True, "new_decoder_architecture is True"),
        ("falcon-7b", "multi_query", False, "multi_query is False"),
        ("starcoderbase-1b", "multi_query", False, "multi_query is False"),
        ("aya-23-8B", "use_qk_norm", True, "use_qk_norm is True"),
        ("stablelm-2-1_6b", "qk_layernorm", True, "qk_layernorm is True"),
        ("stablelm-2-1_6b", "rotary_scaling_factor", 4.0, "rotary_scaling_factor is 4.0"),
        ("Qwen3-Coder-30B-A3B", "shared_expert_intermediate_size", 512, "is 512"),
        ("Qwen3-Coder-30B-A3B", "use_qk_norm", False, "use_qk_norm is False"),
        ("Qwen3-Coder-30B-A3B", "qkv_bias", True, "qkv_bias is True"),
        ("granite-4.0-micro", "num_local_experts", 62, "num_local_experts is 62"),
        ("granite-4.0-micro", "position_embedding_type", "alibi", "'alibi'"),
        (
            "granite-4.0-micro",
            "layer_types",
            ["mamba", "attention"] * 20,
            "20 of 40 layers are 'mamba' (layer_types)",
        ),
        ("Ministral-3-3B", "partial_rotary_factor", 0.5, "rotates whole heads"),
        ("c4ai-command-r7b-12-2024", "use_parallel_block", False, "use_parallel_block is False"),
        ("c4ai-command-r7b-12-2024", "layer_types", ["mamba"] * 32, "layer_types has 'mamba'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    name: str, key: str, value: object, part: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read({**PUBLISHED[name], key: value})
    assert part in str(caught.value)


def test_growing_queries_need_the_rotation_they_belong_to() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1}
    with pytest.raises(UnsupportedError, match="llama_4_scaling_beta"):
        read({**PUBLISHED["Ministral-3-3B"], "rope_parameters": rope})


def test_each_new_spelling_of_a_family_is_a_published_one() -> None:
    assert {config["model_type"] for config in PUBLISHED.values()} <= set(families())
