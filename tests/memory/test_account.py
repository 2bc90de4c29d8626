"""What a checkpoint is, from its headers alone: loading, planning and `hanok info` agree on it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tests.memory.test_load import (
    CONFIG,
    HIDDEN,
    LAYERS,
    MLP,
    load,
    logits,
    notes_of,
    tensors_of,
    write,
)
from torch import Tensor

import hanok
from hanok.checkpoint.files import open_checkpoint
from hanok.cli.main import cli
from hanok.errors import CheckpointError, HanokError, UnsupportedError
from hanok.memory.load import load_decoder
from hanok.memory.planning import describe, plan_load

Rename = Callable[[str], str]
EMBEDDING = "model.embed_tokens.weight"
SPELLINGS: Mapping[str, Rename] = {
    "DDP": lambda name: f"module.{name}",
    "compile": lambda name: f"_orig_mod.{name}",
    "DDP of compile": lambda name: f"module._orig_mod.{name}",
    "text part": lambda name: f"language_model.{name}",
    "text part inside": lambda name: name.replace("model.", "model.language_model."),
    "another base": lambda name: name.replace("model.", "transformer."),
    "base model": lambda name: name.removeprefix("model."),
    "DDP of a base model": lambda name: f"module.{name.removeprefix('model.')}",
    "FSDP": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "blocks compiled": lambda name: f"module.{name}".replace(".mlp.", "._orig_mod.mlp."),
}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", SPELLINGS)
def test_another_prefix_is_recognised_and_told(tmp_path: Path, name: str, is_tied: bool) -> None:
    rename = SPELLINGS[name]
    tensors = tensors_of(tied=is_tied)
    if is_tied:  # a second copy is as good under the other name
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    keys = {"tie_word_embeddings": is_tied}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    plain = load(write(tmp_path / "plain", tensors, **keys))
    renamed = {rename(key): tensor for key, tensor in (tensors | buffer).items()}
    folder = write(tmp_path / "renamed", renamed, **keys)
    found = load(folder)
    assert torch.equal(logits(found), logits(plain))
    assert notes_of(plain) == []
    told = rename(EMBEDDING)
    if told == EMBEDDING:
        told = "model.layers.1._fsdp_wrapped_module."
    assert [note for note in notes_of(found) if f"tensor names: {told}" in note]
    understood = describe(folder)
    assert list(understood.notes) == notes_of(found)
    assert {name for source in understood.table.values() for name in source.names} <= set(renamed)


def test_what_is_missing_below_another_prefix_is_named_as_the_files_name_it(tmp_path: Path) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in tensors_of().items()}
    del tensors["module.model.layers.1.mlp.up_proj.weight"]
    missing = r"1 missing: module\.model\.layers\.1\.mlp\.up_proj\.weight\."
    with pytest.raises(CheckpointError, match=missing):
        load(write(tmp_path, tensors))


def test_a_second_copy_is_told_and_the_usual_one_is_not_guessed(tmp_path: Path) -> None:
    tensors = tensors_of()
    names = [f"{who}.{name}" for who in ("student", "teacher") for name in tensors]
    copies = {name: tensors[name.partition(".")[2]].clone() for name in names}
    both = "Layers lie below 'student.model.' and 'teacher.model.': keep one"
    with pytest.raises(CheckpointError, match=both):
        load(write(tmp_path / "two", copies))
    averaged = {f"ema.{name}": tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"left over: ema\..*'model\.' and 'ema\.model\.'"):
        load(write(tmp_path / "ema", tensors | averaged))


def with_index(folder: Path, tensors: Mapping[str, Tensor], *listed: str, **keys: Any) -> Path:
    write(folder, tensors, **keys)
    (folder / "model.safetensors").rename(folder / "s.safetensors")
    index = {"weight_map": dict.fromkeys([*tensors, *listed], "s.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_an_index_may_list_what_nobody_needs(tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = tensors_of(tied=True)
    folder = with_index(tmp_path, tensors, "lm_head.weight", buffer, tie_word_embeddings=True)
    note = "lists 2 tensors that no shard has: lm_head.weight, model.layers.0.self_attn.rotary_emb"
    assert [found for found in notes_of(load(folder)) if note in found]
    assert [found for found in describe(folder).notes if note in found]


def test_what_an_index_lists_and_the_decoder_needs_is_missing(tmp_path: Path) -> None:
    tensors = tensors_of()
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    with pytest.raises(CheckpointError, match=rf"1 missing: {name}; .* no shard has: {name}\."):
        load(with_index(tmp_path, tensors, name))


def quantized(kind: str) -> Mapping[str, Tensor]:
    """Tensors of one matrix as formats of quantized weights name them."""
    stem = "model.layers.0.mlp.up_proj"
    parts = {
        "GPTQ": ("qweight", "qzeros", "scales", "g_idx"),
        "AWQ": ("qweight", "qzeros", "scales"),
        "EXL2": ("q_weight", "q_scale", "q_groups", "q_invperm"),
        "MLX": ("weight", "scales", "biases"),
        "NVFP4": ("weight", "weight_scale", "weight_scale_2"),
    }[kind]
    tensors = tensors_of()
    del tensors[f"{stem}.weight"]
    return tensors | {f"{stem}.{part}": torch.zeros(3, dtype=torch.int32) for part in parts}


def without_head() -> Mapping[str, Tensor]:
    tensors = tensors_of()
    del tensors["lm_head.weight"]
    return tensors


def with_extra_layer() -> Mapping[str, Tensor]:
    return tensors_of() | {f"model.layers.{LAYERS}.eh_proj.weight": torch.zeros(HIDDEN, 2 * HIDDEN)}


def with_wrong_shape() -> Mapping[str, Tensor]:
    return tensors_of() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(MLP + 1, HIDDEN)}


def narrow(dtype: torch.dtype) -> Mapping[str, Tensor]:
    found = tensors_of()
    name = "model.layers.0.mlp.up_proj.weight"
    return found | {name: found[name].to(dtype)}


REFUSED: Mapping[str, tuple[Callable[[], Mapping[str, Tensor]], str]] = {
    "GPTQ": (lambda: quantized("GPTQ"), r"is quantized \(GPTQ, by its tensors\)"),
    "AWQ": (lambda: quantized("AWQ"), r"is quantized \(AWQ or GPTQ, by its tensors\)"),
    "EXL2": (lambda: quantized("EXL2"), r"is quantized \(EXL2, by its tensors\)"),
    "MLX": (lambda: quantized("MLX"), r"is quantized \(MLX, by its tensors\)"),
    "NVFP4": (lambda: quantized("NVFP4"), r"is quantized \(NVFP4, by its tensors\)"),
    "float8": (
        lambda: narrow(torch.float8_e4m3fn),
        r"1 weights are F8_E4M3, .*compute with: model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "int8": (lambda: narrow(torch.int8), "1 weights are I8"),
    "no head": (without_head, r"1 missing: lm_head\.weight"),
    "another layer": (with_extra_layer, r"1 left over: model\.layers\.2\.eh_proj"),
    "shape": (with_wrong_shape, "1 of the wrong shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_loading_refuses_is_not_planned_either(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    folder = write(tmp_path, make())
    with pytest.raises(HanokError, match=message) as loading:
        load(folder)
    with pytest.raises(type(loading.value), match=message) as planning:
        describe(folder)
    assert str(planning.value) == str(loading.value)


FILES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "ModelOpt": (
        {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}},
        r"quantized \(ModelOpt FP8\)",
    ),
    "AutoGPTQ": ({"quantize_config.json": {"bits": 4}}, r"quantized \(GPTQ, by quantize_config"),
    "AutoAWQ": ({"quant_config.json": {"w_bit": 4}}, r"quantized \(AWQ, by quant_config\.json"),
    "ModelOpt in the config": (
        {"config.json": {"quantization_config": {"quant_method": None, "quant_algo": "NVFP4"}}},
        r"quantized \(ModelOpt NVFP4\)",
    ),
    "MLX": (
        {"config.json": {"quantization": {"group_size": 64, "bits": 4}}},
        r"quantized \(MLX, 4 bits\)",
    ),
    "MLX under both names": (
        {"config.json": {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}},
        r"quantized \(MLX, 4 bits\)",
    ),
    "nameless": (
        {"config.json": {"quantization_config": {"bits": 4}}},
        r"quantized \(by a method that quantization_config does not name\)",
    ),
    "compressed-tensors, once": (
        {"config.json": {"compression_config": {"quant_method": "compressed-tensors"}}},
        r"quantized \('compressed-tensors'\)",
    ),
    "HQQ": ({"config.json": {"quantization_config": {"quant_method": "hqq"}}}, r"\('hqq'\)"),
}


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_quantization_is_known_by_the_files_that_say_it(
    tmp_path: Path, name: str, has_weights: bool
) -> None:
    files, message = FILES[name]
    write(tmp_path, tensors_of())
    if not has_weights:
        (tmp_path / "model.safetensors").unlink()
    for file, content in files.items():
        beneath = CONFIG if file == "config.json" else {}
        (tmp_path / file).write_text(json.dumps({**beneath, **content}))
    with pytest.raises(UnsupportedError, match=message):
        describe(tmp_path)
    if has_weights:
        with pytest.raises(UnsupportedError, match=message):
            load_decoder(describe(tmp_path))


def test_a_cache_of_fewer_bits_is_no_quantization_of_the_weights(tmp_path: Path) -> None:
    write(tmp_path, tensors_of())
    said = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert describe(tmp_path).notes == ()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("a-Q4_K_M.gguf", r"holds GGUF \(a-Q4_K_M\.gguf\) weights"),
        ("model.onnx", "holds ONNX"),
        ("onnx/model.onnx", "holds ONNX"),
        ("tf_model.h5", "holds TensorFlow"),
        ("flax_model.msgpack", "holds Flax"),
    ],
)
def test_weights_of_another_program_are_no_config_alone(
    tmp_path: Path, file: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert describe(tmp_path).config.vocab_size == CONFIG["vocab_size"]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    for open_it in (describe, open_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            open_it(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path)


def test_a_gguf_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    for open_it in (describe, open_checkpoint):
        with pytest.raises(CheckpointError, match=r"a\.gguf: holds GGUF weights.*made from"):
            open_it(tmp_path / "a.gguf")


@pytest.mark.parametrize("weights", ["consolidated.safetensors", "consolidated.00.pth"])
def test_the_makers_own_layout_is_named_for_what_it_is(tmp_path: Path, weights: str) -> None:
    (tmp_path / "params.json").write_text('{"dim": 4096}')
    (tmp_path / weights).touch()
    (tmp_path / weights.replace("00", "01")).touch()
    for open_it in (describe, open_checkpoint):
        with pytest.raises(UnsupportedError, match=r"own layout \(params\.json, without config"):
            open_it(tmp_path)


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    for has_config in (False, True):
        if has_config:
            (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        for open_it in (describe, open_checkpoint):
            with pytest.raises(UnsupportedError, match="a PEFT adapter of org/base, not a model"):
                open_it(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "weights.safetensors"])
def test_an_adapter_beside_weights_is_told(tmp_path: Path, file: str) -> None:
    write(tmp_path, tensors_of())
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert [note for note in notes_of(load(tmp_path)) if "PEFT adapter next to the weights" in note]
    assert [note for note in describe(tmp_path).notes if "is left out" in note]


VISION = {"model_type": "qwen2_vl", "vision_config": {"depth": 1}}
TOWER = "left out: the vision tower and its projector, 2 tensors of 2,016 bytes"


def with_tower(folder: Path) -> Path:
    """Write a model whose files hold a tower of 8 + 1000 bfloat16 numbers, and none that is read."""
    biases = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": torch.ones(rows)
        for layer in range(LAYERS)
        for part, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2))
    }
    tower = {
        "visual.patch_embed.proj.weight": torch.arange(8, dtype=torch.bfloat16),
        "visual.blocks.0.norm.weight": torch.ones(10, 100, dtype=torch.bfloat16),
    }
    return write(folder, tensors_of() | biases | tower, **VISION)


def test_a_tower_is_said_wherever_a_checkpoint_is_looked_at(tmp_path: Path) -> None:
    folder = with_tower(tmp_path / "model")
    assert describe(folder).notes == (TOWER,)
    assert load(folder).report.notes[0] == TOWER
    run = CliRunner().invoke
    assert (
        TOWER in json.loads(run(cli, ["info", str(folder), "--json"]).stdout)["checkpoint"]["notes"]
    )
    plan = ["plan", str(folder), "--cache-folder", str(tmp_path / "rates")]
    assert f"Note: {TOWER}." in run(cli, plan).stdout
    assert json.loads(run(cli, [*plan, "--json"]).stdout)["notes"] == [TOWER]


def test_a_tower_takes_no_memory(tmp_path: Path) -> None:
    folder = with_tower(tmp_path)
    found = plan_load(folder, may_measure=False)
    files = sum(ref.size_bytes for ref in describe(folder).checkpoint.tensors.values())
    assert sum(unit.file_bytes for unit in found.needs.units) == files - 2016
    report = load_decoder(describe(folder), plan=found).report
    assert report.mapped_bytes + report.copied_bytes == sum(
        unit.weight_bytes for unit in found.needs.units
    )
    assert report.planned_bytes is not None
    assert report.held_bytes <= report.planned_bytes


def test_a_saved_model_keeps_what_was_left_out(tmp_path: Path) -> None:
    folder = with_tower(tmp_path / "original")
    saved = hanok.load(folder).save(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (folder, saved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_left_out_is_named_as_a_whole(tmp_path: Path) -> None:
    tensors = {**load_file(with_tower(tmp_path / "a") / "model.safetensors")}
    tensors["model.visually.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"1 left over: model\.visually\.weight"):
        load(write(tmp_path / "b", tensors, **VISION))


def headless(folder: Path, **keys: Any) -> Path:
    """Write a checkpoint whose files have no head."""
    tensors = {name: item for name, item in tensors_of().items() if name != "lm_head.weight"}
    return write(folder, tensors, **keys)


MODULES = '[{"path": "", "type": "sentence_transformers.models.Transformer"}]'


@pytest.mark.parametrize("modules", [None, MODULES])
@pytest.mark.parametrize(
    ("architectures", "is_base"),
    [
        (["LlamaModel"], True),
        (["LlavaModel", "LlamaModel"], True),
        (["LlamaForCausalLM"], False),
        (["LlamaModel", "LlamaForCausalLM"], False),
        (["GPT2LMHeadModel"], False),
        (["GPT2DoubleHeadsModel"], False),
        (["Model"], False),
        ([], False),
        (None, False),
        ("LlamaModel", False),
    ],
)
def test_a_model_without_a_head_is_one_that_says_so(
    tmp_path: Path, architectures: Any, is_base: bool, modules: str | None
) -> None:
    folder = headless(tmp_path / "model", architectures=architectures)
    if modules is not None:
        (folder / "modules.json").write_text(modules)
    if not is_base and modules is None:
        with pytest.raises(
            CheckpointError, match=r"1 missing: lm_head\.weight.*meant for embeddings"
        ):
            describe(folder)
        with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight.*modules\.json"):
            load(folder)
        return
    found = describe(folder)
    assert not found.config.has_head
    assert "lm_head.weight" not in found.table
    words = architectures[0] if is_base else "modules.json"
    notes = [note for note in found.notes if note.startswith("no head: ")]
    assert len(notes) == 1
    assert words in notes[0]
    loaded = load(folder)
    assert notes[0] in notes_of(loaded)
    assert "lm_head" not in dict(loaded.decoder.named_children())
    # Without weights files it is what its files say all the same.
    (folder / "model.safetensors").unlink()
    assert not describe(folder).config.has_head
    assert describe(folder).config.num_parameters() == found.config.num_parameters()


@pytest.mark.parametrize("modules", [None, MODULES])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_that_is_there_is_used_whatever_the_model_is_called(
    tmp_path: Path, is_tied: bool, modules: str | None
) -> None:
    plain = load(write(tmp_path / "plain", tensors_of(tied=is_tied), tie_word_embeddings=is_tied))
    folder = write(
        tmp_path / "named",
        tensors_of(tied=is_tied),
        tie_word_embeddings=is_tied,
        architectures=["LlamaModel"],
    )
    if modules is not None:
        (folder / "modules.json").write_text(modules)
    assert describe(folder).config.has_head
    assert torch.equal(logits(load(folder)), logits(plain))


def test_more_than_the_head_missing_is_no_base_model(tmp_path: Path) -> None:
    tensors = {name: item for name, item in tensors_of().items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing: model\.norm\.weight") as found:
        load(write(tmp_path / "a", tensors))
    assert "embeddings" not in str(found.value)
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match="2 missing") as found:
        load(write(tmp_path / "b", tensors))
    assert "embeddings" not in str(found.value)
    with pytest.raises(CheckpointError, match=r"1 missing: model\.norm\.weight"):
        load(write(tmp_path / "c", tensors, architectures=["LlamaModel"]))
