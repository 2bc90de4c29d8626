"""Which keys of a `config.json` say nothing about the forward pass, judged by name and value.

The rule, for a key that a family did not read:
1. null and empty values ("", [], {}) say nothing: their writer left something out.
2. Names in `ANY_VALUE`, names that begin with an underscore, dropouts, and names with one of
   `FREE_PREFIXES` say nothing at any value: provenance, training, generation, how a library runs the
   model, or its own notes. Inference drops nothing.
3. Names in `NEUTRAL_VALUES` say nothing at the values listed there, which are what hanok computes in
   every family: the defaults that a full dump of a transformers config writes out.
Everything else may change the model and is refused. `false` and 0 are no exception: `rms_norm: false`
would be another model. Imports no torch.
"""

import re
from collections.abc import Mapping
from typing import Any

ANY_VALUE: Mapping[str, str] = {
    "classes and versions": """
        architectures auto_map model_type tokenizer_class transformers_version custom_pipelines
        transformers.js_config is_composition is_decoder""",
    "dtypes and implementations": """
        torch_dtype dtype torchscript use_bfloat16 attn_implementation xla_device
        chunk_size_feed_forward use_flash_attn use_flash_attention use_flash_attention_2
        flash_attention""",
    "what a call returns": """
        output_attentions output_hidden_states output_past return_dict use_return_dict use_cache
        output_scores output_logits return_dict_in_generate keys_to_ignore_at_inference
        output_router_logits""",
    "other tasks": """
        problem_type id2label label2id num_labels finetuning_task task_specific_params""",
    "training": """
        initializer_range initializer_factor gradient_checkpointing gradient_checkpointing_kwargs
        pretraining_tp router_aux_loss_coef router_jitter_noise label_smoothing fuse_cross_entropy
        tf_legacy_loss tie_last_hidden_states""",
    "special tokens": """
        bos_token_id eos_token_id eos_token_ids pad_token_id unk_token_id sep_token_id cls_token_id
        mask_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id prefix
        token_healing""",
    "lengths and ends of what is generated": """
        model_max_length max_length min_length max_new_tokens min_new_tokens max_time stop_strings
        early_stopping""",
    "sampling": """
        do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff
        penalty_alpha guidance_scale remove_invalid_values renormalize_logits watermarking_config""",
    "beams": """
        num_beams num_beam_groups num_return_sequences diversity_penalty length_penalty constraints""",
    "penalties and words": """
        repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids force_words_ids sequence_bias suppress_tokens
        begin_suppress_tokens exponential_decay_length_penalty""",
    "caches and drafts of a generation": """
        cache_implementation cache_config max_cache_len low_memory compile_config disable_compile
        prompt_lookup_num_tokens num_assistant_tokens dola_layers""",
    "how MLC runs a model": """
        prefill_chunk_size context_window_size tensor_parallel_shards max_batch_size""",
    "provenance": """
        name model_name base_model base_model_name base_model_name_or_path author authors
        organization license license_link license_name created_date created_at date version
        language languages tags description summary citation homepage url git_hash commit_hash""",
}
"""Keys that say nothing at any value, by their subject."""

_ANY_VALUE = frozenset(" ".join(ANY_VALUE.values()).split())
FREE_PREFIXES = ("_", "unsloth_")
DROPOUT = re.compile(r"(.*_)?(dropout|pdrop|layerdrop)(_(prob|p|rate|ratio))?")
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    # A bias that is there shows among the tensors as well.
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    # Switches of what is off in every family that does not read them.
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
    "use_bidirectional_attention": (False,),
}


def says_nothing(name: str, value: Any) -> bool:
    """Return whether a key that no family reads does not affect the forward pass."""
    if value is None or value in ("", [], {}):
        return True
    if name in _ANY_VALUE or name.startswith(FREE_PREFIXES) or DROPOUT.fullmatch(name):
        return True
    return any(type(value) is type(item) and value == item for item in NEUTRAL_VALUES.get(name, ()))
