"""Which keys of a `config.json` say nothing: what transformers writes out is the oracle."""

import json
from typing import Any

import pytest
import transformers

from hanok.errors import CheckpointError, UnsupportedError
from hanok.models.family import families, read_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# What `PretrainedConfig.to_dict()` of transformers 4.x wrote beside a family's own keys, at its
# defaults.
OLD_DUMP: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "",
    "_num_labels": 2,
    "add_cross_attention": False,
    "architectures": ["LlamaForCausalLM"],
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": 1,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": 2,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": None,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "quantization_config": None,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.40.0",
    "typical_p": 1.0,
    "use_bfloat16": False,
    "use_cache": True,
    "xla_device": None,
}


# Where the default is what hanok refuses.
OPTIONS = {"granitemoehybrid": {"layer_types": ["attention"] * 32, "num_local_experts": 0}}


@pytest.fixture(
    scope="module", params=sorted(set(families()) & set(transformers.CONFIG_MAPPING.keys()))
)
def dump(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every key that transformers knows of a family, as it lies in a file."""
    config = transformers.CONFIG_MAPPING[request.param](**OPTIONS.get(request.param, {}))
    written = config.to_json_string(use_diff=False)
    found: dict[str, Any] = json.loads(written)
    return found


def test_what_transformers_writes_out_is_read_as_what_it_leaves_out(dump: dict[str, Any]) -> None:
    full = read_config(dump, "config.json")[1]
    assert read_config(OLD_DUMP | dump, "config.json")[1] == full
    assert {"is_encoder_decoder", "return_dict"} <= set(dump)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("cross_attention_hidden_size", 64),
        ("pruned_heads", {"0": [1]}),
        ("use_sliding_window", True),
        # Off is not neutral where nobody knows the name, and 0 is not false.
        ("rms_norm", False),
        ("num_shared_experts", 0),
        ("is_encoder_decoder", 0),
        ("dropout_kind", "always"),
    ],
)
def test_a_value_that_may_change_the_model_is_refused(name: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=f"does not account for {name} = "):
        read_config(LLAMA | OLD_DUMP | {name: value}, "config.json")


@pytest.mark.parametrize(
    "keys",
    [
        {"attention_twist": None, "attention_turns": [], "attention_kind": ""},
        {"num_beams": 5, "bad_words_ids": [[3]], "stop_strings": ["x"], "prefix": "Q: "},
        {"attn_pdrop": 0.1, "hidden_dropout_prob": 0.1, "dropout": 0.5, "layerdrop": 0.2},
        {"author": "A", "license": "mit", "created_date": "2020-04-28", "_saved_by": "me"},
        {"custom_pipelines": {"text-generation": {"impl": "a.B"}}, "is_composition": True},
        {"unsloth_version": "2025.1", "quantization_config": {}},
    ],
)
def test_what_says_nothing_about_the_forward_pass_is_no_matter(keys: dict[str, Any]) -> None:
    assert read_config(LLAMA | keys, "config.json") == read_config(LLAMA, "config.json")


def test_the_old_name_of_the_length_is_read_where_the_new_one_is_absent() -> None:
    renamed = {name: value for name, value in LLAMA.items() if name != "max_position_embeddings"}
    old = {"max_sequence_length": 32}
    assert read_config(renamed | old, "config.json")[1].max_positions == 32
    assert read_config(LLAMA | old, "config.json")[1].max_positions == 64


def test_two_spellings_of_the_rope_agree_or_are_refused() -> None:
    linear = {"rope_type": "linear", "factor": 4.0}
    new = LLAMA | {"rope_parameters": {"rope_theta": 1e6, **linear}}
    both = read_config(new | {"rope_scaling": linear}, "config.json")
    assert both == read_config(new, "config.json")
    with pytest.raises(CheckpointError, match="in contradiction to them, rope_scaling"):
        read_config(new | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "config.json")
