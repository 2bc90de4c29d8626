"""Saved weights have the names, shapes, dtypes and bytes of the files that they came from.

transformers writes tiny random checkpoints of families whose files differ most from hanok's own order:
matrices by columns, heads in turn, fused matrices, experts. The safetensors library compares the files.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hanok.checkpoint import writer
from hanok.errors import CheckpointError
from hanok.memory import save
from hanok.memory.load import Loaded, load_decoder
from hanok.memory.options import LoadOptions
from hanok.memory.planning import describe
from hanok.memory.save import save_weights
from hanok.memory.tensors import from_file_order, to_file_order
from hanok.models.family import Source

SIZES: Mapping[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": 41, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt_neox": ("GPTNeoXConfig", NEOX),
    "gpt2": ("GPT2Config", GPT2 | SPECIAL),
    "phi3": ("Phi3Config", SIZES),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 12}),
    "llama-tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
}


def random_checkpoint(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    class_name, options = CASES[name]
    config = getattr(transformers, class_name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    return folder


def loaded_from(folder: Path, dtype: str = "auto", weights: Any = "auto") -> Loaded:
    return load_decoder(describe(folder), LoadOptions(dtype=dtype, weights=weights))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("weights", ["mapped", "copied"])
@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_are_the_original_ones(tmp_path: Path, name: str, weights: str) -> None:
    original = random_checkpoint(tmp_path / "original", name)
    loaded = loaded_from(original, weights=weights)
    (file,) = save_weights(tmp_path / "copy", loaded.decoder, loaded.sources)
    assert file == tmp_path / "copy" / "model.safetensors"
    assert_same(load_file(file), load_file(original / "model.safetensors"))


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "mixtral"])
def test_a_conversion_on_load_is_what_is_saved(tmp_path: Path, name: str) -> None:
    original = random_checkpoint(tmp_path / "original", name)
    loaded = loaded_from(original, dtype="bfloat16")
    (file,) = save_weights(tmp_path / "copy", loaded.decoder, loaded.sources)
    expected = load_file(original / "model.safetensors")
    assert_same(load_file(file), {key: item.to(torch.bfloat16) for key, item in expected.items()})


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    loaded = loaded_from(random_checkpoint(tmp_path / "original", "llama-tied"))
    (file,) = save_weights(tmp_path / "copy", loaded.decoder, loaded.sources)
    assert "model.embed_tokens.weight" in load_file(file)
    assert "lm_head.weight" not in load_file(file)


def test_a_dropped_prefix_stays_dropped(tmp_path: Path) -> None:
    original = random_checkpoint(tmp_path / "original", "gpt2") / "model.safetensors"
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(original).items()
    }
    assert tensors.keys() != load_file(original).keys()
    save_file(tensors, original)
    loaded = loaded_from(original.parent)
    (file,) = save_weights(tmp_path / "copy", loaded.decoder, loaded.sources)
    assert_same(load_file(file), tensors)


def test_a_changed_weight_is_what_is_saved(tmp_path: Path) -> None:
    """Rows of the fused matrix belong to query, key and value in turn: 32, 16 and 16 of them."""
    original = random_checkpoint(tmp_path / "original", "llama-tied")
    loaded = loaded_from(original)
    loaded.decoder.get_parameter("layers.1.self_attn.qkv_proj.weight").data[32:48] = 5.0
    (file,) = save_weights(tmp_path / "copy", loaded.decoder, loaded.sources)
    changed = "model.layers.1.self_attn.k_proj.weight"
    expected = load_file(original / "model.safetensors")
    assert_same(load_file(file), expected | {changed: torch.full_like(expected[changed], 5.0)})


def test_progress_adds_up_to_the_bytes_saved(tmp_path: Path) -> None:
    loaded = loaded_from(random_checkpoint(tmp_path / "original", "phi3"))
    seen: list[int] = []
    (file,) = save_weights(tmp_path / "copy", loaded.decoder, loaded.sources, progress=seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in load_file(file).values())


def test_large_models_are_saved_in_shards_that_load_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = random_checkpoint(tmp_path / "original", "gpt_neox")

    def in_small_shards(*args: Any, **options: Any) -> tuple[Path, ...]:
        return writer.write_safetensors(*args, **options, max_shard_bytes=20_000)

    monkeypatch.setattr(save, "write_safetensors", in_small_shards)
    loaded = loaded_from(original)
    files = save_weights(tmp_path / "copy", loaded.decoder, loaded.sources)
    assert files[-1].name == "model.safetensors.index.json"
    shards = [load_file(file) for file in files[:-1]]
    assert len(shards) > 1
    joined = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert sum(map(len, shards)) == len(joined)
    assert_same(joined, load_file(original / "model.safetensors"))
    (tmp_path / "copy" / "config.json").write_text((original / "config.json").read_text())
    again = loaded_from(tmp_path / "copy")
    assert_same(again.decoder.state_dict(), loaded.decoder.state_dict())


def test_a_file_in_the_way_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    loaded = loaded_from(random_checkpoint(tmp_path / "original", "phi3"))
    (tmp_path / "copy").write_text("not a folder")
    with pytest.raises(CheckpointError, match="copy: cannot be written"):
        save_weights(tmp_path / "copy", loaded.decoder, loaded.sources)


def test_heads_are_sorted_into_query_key_and_value() -> None:
    """Two heads of two rows: the file has q0 k0 v0 q1 k1 v1, hanok q0 q1 k0 k1 v0 v1."""
    source = Source(names=("w",), rows=(12,), shape=(12, 1), head_rows=2, layout="heads")
    stored = torch.tensor([0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23])
    wanted = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23])
    assert torch.equal(from_file_order(stored, source), wanted)
    assert torch.equal(to_file_order(wanted, source), stored)
    assert torch.equal(from_file_order(stored[:, None], source), wanted[:, None])
    columns = replace(source, layout="columns")
    matrix = torch.arange(6).view(2, 3)
    assert torch.equal(from_file_order(matrix, columns), matrix.t())
    assert torch.equal(to_file_order(matrix.t(), columns), matrix)
    assert torch.equal(to_file_order(stored, columns), stored)
