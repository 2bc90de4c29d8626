"""LLaMA-Factory's keys, and its dataset_info.json, in hanok's options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hanok.checkpoint.safetensors import parse_json_object
from hanok.errors import CheckpointError, OptionError
from hanok.training.foreign_keys import ForeignKeys, source_of

INFO = "dataset_info.json"
SPEED = "it changes speed or memory, not what is learnt"
LEFT = {
    r"do_train|do_eval|do_predict|predict_with_generate|eval_strategy|evaluation_strategy|"
    r"per_device_eval_batch_size|eval_on_start|eval_accumulation_steps": "see eval_steps and held_out",
    r"flash_attn|use_unsloth\w*|enable_liger_kernel|use_kv_cache|torch_compile\w*|low_cpu_mem_usage|"
    r"upcast_\w+|use_reentrant_gc|double_quantization|quantization_device_map|compute_dtype|tf32|"
    r"bnb_4bit_\w+|disable_gradient_checkpointing|infer_\w+|use_cache": SPEED,
    r"overwrite_cache|overwrite_output_dir|preprocessing_\w+|dataloader_\w+|tokenized_path|"
    r"data_shared_file_system|remove_unused_columns|streaming|buffer_size": "tokenized documents are "
    "kept by themselves, and a training in the output folder is gone on with",
    r"logging_\w+|plot_loss|run_name|include_num_input_tokens_seen|include_effective_tokens_per_second|"
    r"use_swanlab|swanlab_\w+|disable_tqdm|trackio_\w+": "log.jsonl has a line for each step, and "
    "loss.html a plot",
    r"save_strategy|save_only_model|save_safetensors|resume_from_checkpoint|load_best_model_at_end|"
    r"export_\w+|hub_\w+|push_to_hub|hf_hub_token|cache_dir|model_revision": "it is another command, or "
    "done by itself",
    r"deepspeed|ddp_\w+|fsdp\w*|local_rank|ray_\w+|use_ray": "a training is one process here",
    r"trust_remote_code|use_fast_tokenizer|split_special_tokens|neat_packing|"
    r"eval_num_beams|ignore_pad_token_for_loss|group_by_modality_length": "the checkpoint's files say "
    "it, or it is done by itself",
    r"(image|video|audio)_\w+|freeze_vision_tower|freeze_multi_modal_projector|"
    r"freeze_language_model|max_new_tokens|temperature|top_p|top_k|do_sample": "nothing of it is learnt",
}
"""Keys that change no result, by patterns, with the reason."""
LORA_KEYS = {
    "lora_rank": "lora.r",
    "lora_dropout": "lora.lora_dropout",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
}
GENERIC = ("default", "empty", "alpaca", "fewshot")
"""Templates that belong to no model."""
USUAL_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}


def read_llama_factory(keys: ForeignKeys) -> None:
    """Translate a file's keys."""
    keys.pass_on("model_name_or_path", "model")
    keys.pass_on("output_dir", "output")
    stage = keys.take("stage", "sft")
    if stage not in ("sft", "pt"):
        keys.refuse("stage", f"{stage} learns in another way than from texts")
    else:
        keys.leave("stage", "data says itself what of it is learnt")
    _read_weights(keys)
    _read_data(keys)
    _read_template(keys)
    keys.pass_on("cutoff_len", "pack_tokens", 2048)
    packs = keys.take("packing", stage == "pt") or keys.take("neat_packing", False)
    why = "" if packs else "a pass has one document, as theirs"
    keys.put("packing", "packing", bool(packs), why)
    keys.take_batch("per_device_train_batch_size", 8)
    keys.take_numbers()
    keys.pass_on("num_train_epochs", "epochs", 3.0)
    keys.take_optimizer("optim", "adamw_torch")
    keys.take_schedule("lr_scheduler_type", "linear", 0.0)
    keys.pass_on("learning_rate", "learning_rate", 5e-5)
    if keys.take("pure_bf16", False):
        keys.put("pure_bf16", "dtype", "bfloat16")
    keys.take_dtype()
    if keys.take("gradient_checkpointing", False):
        keys.put("gradient_checkpointing", "gradient_checkpointing", True)
    keys.take_held_out("val_size")
    keys.pass_on("seed", "seed", 42)
    keys.take_saving()
    for key in ("train_on_prompt", "mask_history"):
        if keys.take(key, False):
            keys.refuse(key, "every answer is learnt, and nothing else")
    keys.leave_all(LEFT)


def _read_weights(keys: ForeignKeys) -> None:
    kind = keys.take("finetuning_type", "lora")
    rank = keys.take("lora_rank", 8)
    if kind == "full":
        keys.put("finetuning_type", "lora", None, "all weights learn")
    elif kind != "lora":
        keys.refuse("finetuning_type", f"there is no {kind!r} here; without it an adapter learns")
    if kind != "full":
        keys.put("lora_rank", "lora.r", rank)
        keys.pass_on("lora_alpha", "lora.lora_alpha", 2 * rank)
        for key, ours in LORA_KEYS.items():
            keys.pass_on(key, ours)
        target = keys.take("lora_target", "all")
        names = target.split(",") if isinstance(target, str) else list(target)
        modules = "all-linear" if names == ["all"] else [name.strip() for name in names]
        keys.put("lora_target", "lora.target_modules", modules)
        saved = keys.take("additional_target")
        if saved:
            listed = saved.split(",") if isinstance(saved, str) else list(saved)
            keys.put("additional_target", "lora.modules_to_save", listed)
        if keys.take("pissa_init", False):
            keys.put("pissa_init", "lora.init_lora_weights", "pissa")
    bits, method = keys.take("quantization_bit"), keys.take("quantization_method", "bnb")
    kinds = {4: "nf4", 8: "int8"}
    if bits is not None and (bits not in kinds or method not in ("bnb", "bitsandbytes")):
        keys.refuse("quantization_bit", f"{bits} bits of {method} are none of hanok's")
    elif bits is not None:
        keys.put("quantization_bit", "quant", kinds[bits])
    if keys.take("quantization_type", "nf4") != "nf4":
        keys.refuse("quantization_type", "four bits are nf4 here")


def _read_template(keys: ForeignKeys) -> None:
    name = keys.take("template")
    if name == "vicuna":
        keys.put("template", "chat_template", "vicuna_v1.1")
    elif name in GENERIC:
        keys.refuse(
            "template", f"{name} is a template of theirs; without it the checkpoint's is used"
        )
    elif name is not None:
        keys.leave(
            "template", f"{name} is taken for the checkpoint's own; see `hanok train preview`"
        )


def _read_data(keys: ForeignKeys) -> None:
    folder = Path(keys.take("dataset_dir", "data"))
    given = keys.take("dataset", "")
    names = given.split(",") if isinstance(given, str) else list(given)
    cap = keys.take("max_samples")
    if keys.take("mix_strategy", "concat") != "concat":
        keys.refuse(
            "mix_strategy", "files are read one after another, in an order drawn by the seed"
        )
    known = _info(folder / INFO)
    sources = []
    for name in filter(None, map(str.strip, names)):
        if name not in known:
            raise OptionError(f"dataset {name!r} is not in {folder / INFO}.")
        sources.append(_source(keys, folder, dict(known[name]), cap))
    keys.put("dataset", "data", sources)


def _info(path: Path) -> Mapping[str, Any]:
    try:
        return parse_json_object(path.read_bytes(), str(path))
    except (OSError, CheckpointError) as error:
        raise OptionError(
            f"{path} cannot be read: {error}. It says what the names of `dataset` are; run in the "
            "folder that dataset_dir is relative to."
        ) from None


def _source(keys: ForeignKeys, folder: Path, entry: dict[str, Any], cap: int | None) -> str:
    """Return the source that an entry of dataset_info.json is."""
    name = entry.pop("file_name", None)
    if name is None:
        places = [f"{key} {entry[key]}" for key in entry if key.endswith(("_url", "_uri"))]
        raise OptionError(
            f"a dataset is {', '.join(places) or entry}: only files on this disk (file_name) are read. "
            "Download it, and give the file as DATA."
        )
    if entry.pop("ranking", False):
        keys.refuse(
            "dataset.ranking", f"{name} has pairs of answers, which are learnt in another way"
        )
    columns, tags = entry.pop("columns", {}), entry.pop("tags", {})
    number = entry.pop("num_samples", None)
    settings: dict[str, Any] = {"cap": min(filter(None, (cap, number)), default=None)}
    kind = entry.pop("formatting", "alpaca")
    if kind == "sharegpt":
        unusual = {
            tag: spelled
            for tag, spelled in tags.items()
            if spelled not in USUAL_TAGS.get(tag, ("from", "role", "value", "content"))
        }
        if unusual:
            keys.refuse("dataset.tags", f"{unusual} of {name} are no names of roles here")
        is_messages = tags.get("role_tag", "from") == "role"
        settings["format"] = "messages" if is_messages else "sharegpt"
        settings["messages"] = columns.get("messages")
    elif kind in ("alpaca", "openai"):
        settings["format"] = "messages" if kind == "openai" else "alpaca"
        ours = {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "messages": "messages",
        }
        settings |= {ours[key]: column for key, column in columns.items() if key in ours}
        if columns.keys() == {"prompt"}:  # texts for pre-training
            settings = {"cap": settings["cap"], "format": "text", "text": columns["prompt"]}
    else:
        keys.refuse("dataset.formatting", f"{kind!r} of {name} is no format here")
    for key in ("system", "tools"):
        if columns.get(key) not in (None, key):
            settings[key] = columns[key]
    return source_of(str(folder / name), settings)
