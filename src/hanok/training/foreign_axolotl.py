"""axolotl's keys, as its configuration reference has them, in hanok's options."""

from collections.abc import Mapping
from typing import Any

from hanok.training.foreign_keys import ForeignKeys, source_of

SPEED = "it changes speed or memory, not what is learnt"
PLACES = "a training is one process here"
LEFT = {
    r"model_type|tokenizer_type|is_\w+_derived_model|trust_remote_code|tokenizer_use_fast|"
    r"tokenizer_legacy|strict|type_of_model": "the checkpoint's files say it",
    r"(flash|sdp|xformers|flex|eager|sage)_attention|attn_implementation|flash_attn_\w+": "hanok has "
    "its own kernels",
    r"pad_to_sequence_len|eval_sample_packing|sample_packing_\w+|pretraining_sample_concatenation|"
    r"multipack_real_batches|eval_batch_size|batch_flattening": "there is no padding",
    r"dataset_prepared_path|dataset_processes|dataset_keep_in_memory|dataset_num_proc|dataloader_\w+|"
    r"skip_prepare_dataset|shuffle_merged_datasets": "tokenized documents are kept by themselves",
    r"deepspeed|fsdp|fsdp_config|fsdp_version|ddp\w*|device_map|gpu_memory_limit|world_size|local_rank|"
    r"tensor_parallel_size|context_parallel_size|accelerator_config|use_ray|ray_\w+": PLACES,
    r"logging_steps|wandb_\w+|mlflow_\w+|comet_\w+|use_wandb|use_mlflow|use_comet|swanlab_\w+|debug|"
    r"profiler_\w+|include_tokens_per_second": "log.jsonl has a line for each step",
    r"saves_per_epoch|evals_per_epoch|save_strategy|eval_strategy|save_safetensors|save_only_model|"
    r"load_best_model_at_end|save_first_step|eval_table_size|eval_max_new_tokens|do_bench_eval|"
    r"do_causal_lm_eval": "see save_steps, eval_steps and samples",
    r"plugins|liger_\w+|cut_cross_entropy|torch_compile\w*|unsloth_\w+|gradient_checkpointing_kwargs|"
    r"lora_(mlp|qkv|o|embedding)_kernel|low_cpu_mem_usage|tf32|bnb_config_kwargs|activation_offloading|"
    r"chunked_cross_entropy\w*|fused_\w+": SPEED,
    r"hub_\w+|push_\w+|merge_lora|auto_resume_from_checkpoints|resume_from_checkpoint|"
    r"lora_on_cpu|is_preprocess|axolotl_config_path": "it is another command, or done by itself",
    r"float16|bfloat16": "see dtype",
}
"""Keys that change no result, by patterns, with the reason."""
LORA_KEYS = {
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_modules_to_save": "lora.modules_to_save",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "peft_init_lora_weights": "lora.init_lora_weights",
    "lora_exclude_modules": "lora.exclude_modules",
}
LORA_DEFAULTS = {"lora_r": 8, "lora_alpha": 8}  # PEFT's
DATASET_LEFT = ("ds_type", "name", "trust_remote_code", "revision", "preprocess_shards")


def read_axolotl(keys: ForeignKeys) -> None:
    """Translate a file's keys."""
    keys.pass_on("base_model", "model")
    keys.pass_on("output_dir", "output", "./model-out")
    _read_weights(keys)
    _read_data(keys)
    keys.pass_on("sequence_len", "pack_tokens", 512)
    packs = bool(keys.take("sample_packing", False))
    why = "" if packs else "a pass has one document, as theirs"
    keys.put("sample_packing", "packing", packs, why)
    keys.take_batch("micro_batch_size", 1)
    keys.take_numbers()
    keys.pass_on("num_epochs", "epochs", 1.0)
    keys.take_optimizer("optimizer", "adamw_torch_fused")
    keys.take_schedule("lr_scheduler", "cosine", None)
    keys.pass_on("learning_rate", "learning_rate")
    keys.take_dtype()
    if keys.take("gradient_checkpointing", False):
        keys.put("gradient_checkpointing", "gradient_checkpointing", True)
    keys.take_held_out("val_set_size")
    keys.pass_on("seed", "seed", 42)
    if keys.take("use_tensorboard", False):
        keys.put("use_tensorboard", "report_to", ["tensorboard"])
    keys.take_saving()
    if keys.take("train_on_inputs", False):
        keys.refuse("train_on_inputs", "only answers are learnt")
    special = keys.take("special_tokens", {})
    others = {name: text for name, text in special.items() if name != "pad_token"}
    if others:
        keys.refuse("special_tokens", f"{others} change the tokenizer: see `hanok tokens`")
    elif special:
        keys.leave("special_tokens", "there is no padding")
    keys.leave_all(LEFT)


def _read_weights(keys: ForeignKeys) -> None:
    kind = keys.take("adapter")
    four, eight = keys.take("load_in_4bit", False), keys.take("load_in_8bit", False)
    if kind not in (None, "lora", "qlora"):
        keys.refuse("adapter", f"there is no adapter {kind!r} here")
    elif kind is None:
        keys.put("(adapter)", "lora", None, "all weights learn")
    else:
        _read_lora(keys, kind)
    if kind == "qlora" or four:
        keys.put("adapter" if kind == "qlora" else "load_in_4bit", "quant", "nf4")
    elif eight:
        keys.put("load_in_8bit", "quant", "int8", "without columns kept apart for outliers")


def _read_lora(keys: ForeignKeys, kind: str) -> None:
    keys.leave("adapter", f"{kind} is an adapter's options")
    for key, ours in LORA_KEYS.items():
        keys.pass_on(key, ours, LORA_DEFAULTS.get(key))
    modules = keys.take("lora_target_modules")
    if keys.take("lora_target_linear", False):
        keys.put("lora_target_linear", "lora.target_modules", "all-linear")
    elif modules:
        keys.put("lora_target_modules", "lora.target_modules", modules)


def _read_data(keys: ForeignKeys) -> None:
    sources: list[str] = []
    templates: list[str] = []
    for item in keys.take("datasets", []):
        sources += _sources(keys, dict(item), templates)
    keys.put("datasets", "data", sources)
    given = keys.take("chat_template")
    text = keys.take("chat_template_jinja")
    if given == "jinja" or (given is None and text):
        keys.put("chat_template_jinja", "chat_template", text)
    elif given is not None and not str(given).startswith("tokenizer_default"):
        keys.refuse(
            "chat_template",
            f"{given} is a template of axolotl's; without it the checkpoint's own is used. Give the "
            "same one with --chat-template, a file or its text",
        )
    elif given is not None:
        keys.leave("chat_template", "the checkpoint's own is used")
    elif templates:
        keys.put("datasets.conversation", "chat_template", templates[0])


def _sources(keys: ForeignKeys, item: dict[str, Any], templates: list[str]) -> list[str]:
    """Return the sources that one entry of `datasets` is."""
    path, files = item.pop("path", ""), item.pop("data_files", None)
    split = item.pop("split", "train")
    if split not in (None, "train"):
        keys.refuse("datasets.split", f"{split} of {path}: files are read whole")
    settings = _settings(keys, item, templates)
    for name in DATASET_LEFT:
        item.pop(name, None)
    for name, value in item.items():
        if value not in (None, False, 0, "", [], {}):
            keys.refuse(f"datasets.{name}", f"{value!r} is nothing that hanok knows of")
    names = [path] if files is None else [files] if isinstance(files, str) else files
    return [source_of(name, settings) for name in names]


def _settings(keys: ForeignKeys, item: dict[str, Any], templates: list[str]) -> Mapping[str, Any]:
    kind = item.pop("type", None)
    cap = item.pop("max_samples", None)
    if isinstance(kind, Mapping):
        return {"format": "alpaca", **_columns(keys, dict(kind)), "cap": cap}
    if kind in ("alpaca", "alpaca:chat", "alpaca:instruct"):
        keys.refuse(
            "datasets.type",
            "alpaca is written with headings of its own there; without them the rows are rendered by "
            "the chat template",
        )
        return {"format": "alpaca", "cap": cap}
    if kind in ("completion", "pretraining", "pretrain"):
        return {"format": "text", "text": item.pop("field", None), "cap": cap}
    if kind == "sharegpt":
        conversation = item.pop("conversation", "vicuna_v1.1")
        if conversation == "vicuna_v1.1":
            templates.append(conversation)
        else:
            keys.refuse("datasets.conversation", f"there is no conversation {conversation!r} here")
        return {"format": "sharegpt", "messages": item.pop("field", None), "cap": cap}
    if kind == "chat_template":
        return {**_turns(keys, item), "cap": cap}
    keys.refuse("datasets.type", f"{kind!r} is no format here; without it the format is detected")
    return {"cap": cap}


def _columns(keys: ForeignKeys, kind: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a format that an entry describes itself."""
    names = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    found = {ours: kind.pop(theirs, None) for theirs, ours in names.items()}
    rest = {name: value for name, value in kind.items() if value}
    if rest:
        keys.refuse(
            "datasets.type",
            f"{rest} write rows in a way of their own; without it, the chat template does",
        )
    return found


def _turns(keys: ForeignKeys, item: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of conversations; their columns have names of their own perhaps."""
    roles = item.pop("roles_to_train", ["assistant"])
    if set(roles) - {"assistant", "gpt"}:
        keys.refuse("datasets.roles_to_train", f"{roles}: only answers of the assistant are learnt")
    ends = item.pop("train_on_eos", "turn")
    if ends != "turn":
        keys.refuse("datasets.train_on_eos", f"{ends}: the end of every answer is learnt")
    names = item.pop("message_property_mappings", None) or {}
    spelled = (
        item.pop("message_field_role", None) or names.get("role", "role"),
        item.pop("message_field_content", None) or names.get("content", "content"),
    )
    if spelled not in (("role", "content"), ("from", "value")):
        keys.refuse("datasets.message_property_mappings", f"{spelled} are no names of turns here")
    item.pop("roles", None)  # the usual names of roles are known
    if str(item.get("chat_template", "tokenizer_default")).startswith("tokenizer_default"):
        item.pop("chat_template", None)
    return {"messages": item.pop("field_messages", None)}
