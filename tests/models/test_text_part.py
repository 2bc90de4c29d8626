"""Published configs of models that see as well: what they leave out is what transformers fills in."""

from typing import Any

import pytest
import transformers

from hanok.errors import UnsupportedError
from hanok.models.config import ModelConfig
from hanok.models.family import read_config

PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "num_attention_heads": 16,
        },
    },
    "llava-1.5-7b": {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 16},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    },
    "llava-v1.6-mistral-7b": {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "image_token_index": 32000,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
            "architectures": ["MistralForCausalLM"],
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.39.0.dev0",
        "use_image_newline_parameter": True,
        "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 16},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    },
    "exaone-4.5-33b": {
        "architectures": ["Exaone4_5_ForConditionalGeneration"],
        "image_token_id": 67,
        "model_type": "exaone4_5",
        "text_config": {
            "architectures": ["Exaone4ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 53,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "image_token_id": 67,
            "initializer_range": 0.02,
            "intermediate_size": 27392,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
            "max_position_embeddings": 131072,
            "max_window_layers": 64,
            "model_type": "exaone4_5_text",
            "num_attention_heads": 40,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
            "num_kv_heads": 8,
            "reorder_qk_norm": True,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 16.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 1000000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": "LLLG",
            "use_cache": True,
            "video_token_id": None,
            "vision_end_token_id": 74,
            "vision_start_token_id": 73,
            "vision_token_id": 67,
            "vocab_size": 153600,
        },
        "sliding_window": None,
        "num_hidden_layers": 64,
        "reorder_qk_norm": True,
        "tie_word_embeddings": False,
        "video_token_id": 68,
        "vision_config": {"model_type": "exaone4_5_vision", "depth": 28},
        "vocab_size": 153600,
    },
    "qwen2.5-vl-7b": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {"depth": 32, "hidden_size": 1280, "model_type": "qwen2_5_vl"},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
    },
    "mistral-small-3.1": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "use_cache": True,
            "vocab_size": 131072,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
        "vision_feature_layer": -1,
    },
}


def read(config: dict[str, Any]) -> ModelConfig:
    return read_config(config, "a/config.json")[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_published_file_leaves_out_is_what_transformers_fills_in(name: str) -> None:
    published = PUBLISHED[name]
    kind = transformers.CONFIG_MAPPING[published["model_type"]]
    filled = kind.from_dict(dict(published)).to_diff_dict()
    # The reader of a file that says everything needs none of the defaults.
    assert read(published) == read(filled)


def test_text_parts_have_their_published_sizes() -> None:
    # 4,300,079,472 less the 419,816,304 of SigLIP's 27 layers and the projector.
    assert read(PUBLISHED["gemma-3-4b"]).num_parameters() == 3_880_263_168
    assert read(PUBLISHED["llava-1.5-7b"]).num_parameters() == 6_738_939_904
    assert read(PUBLISHED["llava-v1.6-mistral-7b"]).num_parameters() == 7_242_256_384
    assert read(PUBLISHED["qwen2.5-vl-7b"]).num_parameters() == 7_615_616_512


def test_a_head_is_tied_where_the_file_or_its_text_part_says_so() -> None:
    published = PUBLISHED["mistral-small-3.1"]
    assert not read(published).tie_embeddings
    inner = {**published, "text_config": {**published["text_config"], "tie_word_embeddings": True}}
    assert not read(inner).tie_embeddings  # what stands outside counts
    del inner["tie_word_embeddings"]
    assert read(inner).tie_embeddings


def test_an_unread_key_of_the_text_part_is_refused_where_it_stands() -> None:
    published = PUBLISHED["llava-1.5-7b"]
    text = {**published["text_config"], "attention_twist": 3}
    with pytest.raises(UnsupportedError, match=r"json: text_config: .* attention_twist = 3"):
        read({**published, "text_config": text})


def test_a_text_part_of_another_kind_is_refused() -> None:
    published = PUBLISHED["llava-1.5-7b"]
    text = {**published["text_config"], "model_type": "opt"}
    with pytest.raises(UnsupportedError, match="model_type 'opt'; hanok's llava supports llama, "):
        read({**published, "text_config": text})


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_mrope_with_yarn_keeps_the_yarn(name: str) -> None:
    published = {**PUBLISHED["qwen2.5-vl-7b"]}
    del published["rope_scaling"]
    scaling = {
        "type": "yarn",
        "mrope_section": [16, 24, 24],
        "factor": 4,
        "original_max_position_embeddings": 32768,
    }
    with_sections = read({**published, name: {**scaling, "rope_theta": 1e6}})
    del scaling["mrope_section"]
    assert with_sections == read({**published, "rope_scaling": scaling})
    assert with_sections != read(published)
