"""Quantizing while reading: which weights, in whose bytes, and never more than a chunk beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import hanok
from hanok.errors import CheckpointError, UnsupportedError
from hanok.memory import quantize as module
from hanok.models.linear import Linear, Weighted
from hanok.quant.base import StoredWeight, quantize
from hanok.quant.recipe import read_recipe

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
METHODS = ("int8", "int4", "nf4", "fp8", "int8-outlier", "nf4:double_quant=true")


def llama(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    config = LlamaConfig(
        **{
            "vocab_size": 150,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def logits_of(model: hanok.Model) -> Tensor:
    from hanok.attention.base import ForwardBatch

    with torch.inference_mode():
        return model.decoder.logits(model.decoder(ForwardBatch.of([TOKENS])))


def record_of(model: hanok.Model, path: str) -> Tensor:
    module_ = model.decoder.get_submodule(path)
    return stored_in(module_).record().dequantize()


def stored_in(module_: torch.nn.Module) -> StoredWeight:
    assert isinstance(module_, Weighted)
    assert isinstance(module_.stored, StoredWeight)
    return module_.stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", METHODS)
def test_the_weights_are_what_the_method_makes_of_the_files(
    tmp_path: Path, text: str, dtype: torch.dtype
) -> None:
    """Fused ones too: their rows are quantized each for itself."""
    folder = llama(tmp_path, dtype=dtype)
    plain, model = (
        hanok.load(folder, dtype="float32"),
        hanok.load(folder, dtype="float32", quant=text),
    )
    recipe = read_recipe(text)
    for path in (
        "layers.0.self_attn.qkv_proj",
        "layers.1.mlp.gate_up_proj",
        "layers.1.mlp.down_proj",
    ):
        weight = plain.decoder.get_submodule(path).get_parameter("weight").detach()
        wanted = quantize(recipe.linears, weight).dequantize()
        assert (record_of(model, path) - wanted).norm() <= 0.02 * wanted.norm()
    floats = [
        name
        for name, item in model.decoder.named_modules()
        if isinstance(item, Linear) and item.stored is None
    ]
    assert floats == ([] if recipe.head is not None else ["lm_head"])
    assert model.report.quantized_bytes > 0
    reference, found = logits_of(plain), logits_of(model)
    limit = 0.05 if "8" in text else 0.4
    assert float((found - reference).norm() / reference.norm()) < limit


@pytest.mark.parametrize(
    ("text", "head", "embedding"),
    [
        ("int4", "int8", None),
        ("int4:head=none", None, None),
        ("int4:head=int4,embedding=nf4", "int4", "nf4"),
        ("int8-outlier", None, None),
    ],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_head_and_embedding_are_choices_of_their_own(
    tmp_path: Path, text: str, head: str | None, embedding: str | None, is_tied: bool
) -> None:
    model = hanok.load(llama(tmp_path, tie_word_embeddings=is_tied), dtype="float32", quant=text)
    found_head, found_embedding = model.decoder.lm_head, model.decoder.embed_tokens
    assert (found_head.stored is not None) == (head is not None)
    if head is not None:
        assert stored_in(found_head).method.name == head
    shares = is_tied and embedding is None and head is not None
    assert (found_embedding.stored is not None) == (embedding is not None or shares)
    if shares:
        assert found_embedding.stored is found_head.stored
    assert logits_of(model).isfinite().all()


def test_weights_that_files_keep_the_other_way_round_are_turned_first(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=90, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain, model = hanok.load(tmp_path), hanok.load(tmp_path, quant="int8")
    reference, found = logits_of(plain), logits_of(model)
    assert float((found - reference).norm() / reference.norm()) < 0.03
    weight = plain.decoder.get_submodule("layers.0.mlp.up_proj").get_parameter("weight")
    torch.testing.assert_close(
        record_of(model, "layers.0.mlp.up_proj"), weight.detach(), atol=2e-3, rtol=0
    )


def test_rows_go_through_one_small_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llama(tmp_path, intermediate_size=1000)
    monkeypatch.setattr(module, "CHUNK_BYTES", 64 * 64 * 4)
    sizes: list[int] = []
    real = torch.empty

    def spy(*shape: Any, **options: Any) -> Tensor:
        made = real(*shape, **options)
        if made.device.type == "cpu" and made.dim() == 2 and made.is_floating_point():
            sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(module.torch, "empty", spy)
    model = hanok.load(folder, quant="int8:head=none")
    assert 64 * 64 * 4 in sizes
    assert max(sizes) <= 64 * 1000 * 4  # 64 rows of the widest weight; the largest has 2000 x 64
    monkeypatch.undo()
    whole = hanok.load(folder, quant="int8:head=none")
    for path in ("layers.0.mlp.gate_up_proj", "layers.1.self_attn.qkv_proj"):
        assert torch.equal(record_of(model, path), record_of(whole, path))


def test_files_of_several_dtypes_are_read_as_float32(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    plain, model = (
        hanok.load(folder, dtype="float32"),
        hanok.load(folder, dtype="float32", quant="int8"),
    )
    reference = logits_of(plain)
    assert float((logits_of(model) - reference).norm() / reference.norm()) < 0.03


def test_a_quantized_model_is_not_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = hanok.load(llama(tmp_path / "model"), quant="int8")
    with pytest.raises(UnsupportedError):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_generation_cached_is_generation_computed_again(tmp_path: Path) -> None:
    for text in ("int8", "int4"):
        model = hanok.load(llama(tmp_path), dtype="float32", quant=text)
        options = {"max_new_tokens": 20, "temperature": 0.0, "ignore_eos": True}
        cached = [e.token_id for e in model.stream(TOKENS, **options)]
        again = [e.token_id for e in model.stream(TOKENS, use_cache=False, **options)]
        together = model.generate([TOKENS, TOKENS[:3]], **options)
        assert cached == again == together[0].token_ids


def with_large_row(folder: Path, name: str, largest: float) -> Path:
    """A checkpoint in which one row of one weight is as large as that."""
    tensors = load_file(llama(folder) / "model.safetensors")
    tensors[name][3] *= largest / tensors[name][3].abs().max()
    save_file(tensors, folder / "model.safetensors")
    return folder


LARGE = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("text", ["int8", "nf4", "fp8", "int8-outlier", "nf4:double_quant=true"])
def test_a_large_row_is_computed_with(tmp_path: Path, text: str) -> None:
    folder = with_large_row(tmp_path, LARGE, 4.6e5)
    model = hanok.load(folder, dtype="float32", quant=text)
    assert logits_of(model).isfinite().all()
    weight = hanok.load(folder, dtype="float32").decoder.get_parameter(
        "layers.0.mlp.gate_up_proj.weight"
    )
    found = record_of(model, "layers.0.mlp.gate_up_proj")
    large = weight.abs().amax(1).argmax()
    assert (found[large] - weight[large]).norm() < 0.15 * weight[large].norm()
    layer = model.decoder.get_submodule("layers.0.mlp.gate_up_proj")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        assert layer(x.to(dtype)).isfinite().all()


@pytest.mark.parametrize(
    ("text", "largest"), [("int4", 6.5e5), ("int8", 9e6), ("fp8", float("nan"))]
)
def test_weights_that_scales_cannot_hold_are_refused_at_load(
    tmp_path: Path, text: str, largest: float
) -> None:
    folder = with_large_row(tmp_path, LARGE, largest)
    message = rf"{LARGE} have values too large for the F\d\d scales of {text}, or that are no numb"
    with pytest.raises(CheckpointError, match=message):
        hanok.load(folder, dtype="float32", quant=text)


def test_weights_that_float16_cannot_hold_are_refused_at_load(tmp_path: Path) -> None:
    folder = with_large_row(tmp_path, LARGE, 65520.0)
    with pytest.raises(CheckpointError, match=rf"{LARGE} has values beyond float16's 65,504"):
        hanok.load(folder, dtype="float16")
    assert logits_of(hanok.load(folder, dtype="bfloat16")).isfinite().all()
    # 65,519 is the last that is rounded to a float16.
    hanok.load(with_large_row(tmp_path / "held", LARGE, 65519.0), dtype="float16")
