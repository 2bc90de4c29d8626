"""Loading accounts for every tensor, keeps what it may in the file, and gives the same weights each way.

The checkpoints are tiny and random, written by the safetensors library or torch itself; what hanok must
hold is worked out from the same tensors with torch.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hanok.attention import native as native_attention
from hanok.attention.base import ForwardBatch
from hanok.errors import CheckpointError, OptionError
from hanok.kernels.native import native, why_not
from hanok.memory import load as load_module
from hanok.memory.load import Loaded, load_decoder
from hanok.memory.options import LoadOptions
from hanok.memory.planning import describe

VOCAB, HIDDEN, MLP, LAYERS = 37, 16, 24, 2
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GEMMA2: Mapping[str, Any] = {
    **CONFIG,
    "model_type": "gemma2",
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def notes_of(loaded: Loaded) -> list[str]:
    """What loading says, but for kernels that were not built where these tests run."""
    return [note for note in loaded.report.notes if not note.startswith("hanok's kernels")]


def tensors_of(
    dtype: torch.dtype = torch.float32, *, tied: bool = False, norms: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    found = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": draw(HIDDEN)}
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm", *norms):
            found[f"{layer}.{name}.weight"] = draw(HIDDEN)
        found[f"{layer}.self_attn.q_proj.weight"] = draw(HIDDEN, HIDDEN)
        found[f"{layer}.self_attn.k_proj.weight"] = draw(HIDDEN // 2, HIDDEN)
        found[f"{layer}.self_attn.v_proj.weight"] = draw(HIDDEN // 2, HIDDEN)
        found[f"{layer}.self_attn.o_proj.weight"] = draw(HIDDEN, HIDDEN)
        found[f"{layer}.mlp.gate_proj.weight"] = draw(MLP, HIDDEN)
        found[f"{layer}.mlp.up_proj.weight"] = draw(MLP, HIDDEN)
        found[f"{layer}.mlp.down_proj.weight"] = draw(HIDDEN, MLP)
    if not tied:
        found["lm_head.weight"] = draw(VOCAB, HIDDEN)
    return found


def write(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG, **keys: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_raw(folder: Path, tensors: Mapping[str, Tensor], *, shift: int = 0, **keys: Any) -> Path:
    """Write a safetensors file with the tensors in the given order, `shift` bytes off alignment."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **keys}))
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 64 + shift)
    data = b"".join(bytes(item.reshape(-1).view(torch.uint8).tolist()) for item in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return folder


def load(folder: Path, **options: Any) -> Loaded:
    plan, progress = options.pop("plan", None), options.pop("progress", None)
    return load_decoder(describe(folder), LoadOptions(**options), plan=plan, progress=progress)


@torch.inference_mode()
def logits(loaded: Loaded) -> Tensor:
    decoder = loaded.decoder
    return decoder.logits(decoder(ForwardBatch.of([TOKENS])))


def ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the parts of the fused weights by hand."""
    found = {}
    for name, tensor in tensors.items():
        renamed = (
            name.removeprefix("model.")
            .replace("input_layernorm", "attention_norm")
            .replace("post_attention_layernorm", "mlp_norm")
        )
        if not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_p", "up_proj")):
            found[renamed] = tensor
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        qkv = [tensors[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
        found[f"layers.{index}.self_attn.qkv_proj.weight"] = torch.cat(qkv)
        mlp = [tensors[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        found[f"layers.{index}.mlp.gate_up_proj.weight"] = torch.cat(mlp)
    return found


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = tensors_of()
    name = "model.layers.1.self_attn.k_proj.weight"
    del tensors[name]
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, tensors))
    assert f"1 missing: {name}." in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "left over" not in str(caught.value)


def test_a_left_over_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1 left over: model\.extra\.weight\.") as caught:
        load(write(tmp_path, tensors_of() | {"model.extra.weight": torch.zeros(2)}))
    assert "missing" not in str(caught.value)


def test_a_wrong_shape_is_told_with_both_shapes(tmp_path: Path) -> None:
    tensors = tensors_of() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(MLP + 1, HIDDEN)}
    message = r"1 of the wrong shape: model\.layers\.0\.mlp\.up_proj\.weight is \[25, 16\] "
    with pytest.raises(CheckpointError, match=message + r"and should be \[24, 16\]"):
        load(write(tmp_path, tensors))


def test_all_complaints_come_at_once_and_long_lists_are_cut(tmp_path: Path) -> None:
    tensors = tensors_of() | {f"extra.{index}": torch.zeros(1) for index in range(11)}
    del tensors["lm_head.weight"]
    tensors["model.norm.weight"] = torch.zeros(HIDDEN, 1)
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, tensors))
    message = str(caught.value)
    assert "1 missing: lm_head.weight;" in message
    assert "model.norm.weight is [16, 1] and should be [16]" in message
    assert "11 left over" in message
    assert "and 3 more" in message


def test_the_rotary_buffer_of_old_checkpoints_is_ignored(tmp_path: Path) -> None:
    buffers = {
        f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4)
        for index in range(LAYERS)
    }
    plain = logits(load(write(tmp_path / "plain", tensors_of())))
    assert torch.equal(logits(load(write(tmp_path / "old", tensors_of() | buffers))), plain)


def test_a_tied_head_that_is_the_embedding_is_accepted(tmp_path: Path) -> None:
    tensors = tensors_of(tied=True)
    plain = logits(load(write(tmp_path / "a", tensors, tie_word_embeddings=True)))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    loaded = load(write(tmp_path / "b", tensors, tie_word_embeddings=True))
    assert torch.equal(logits(loaded), plain)
    assert loaded.decoder.lm_head.weight is loaded.decoder.embed_tokens.weight


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][5, 5] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load(write(tmp_path, tensors, tie_word_embeddings=True))


@pytest.mark.parametrize(
    "head", [torch.zeros(VOCAB, HIDDEN, dtype=torch.float16), torch.zeros(VOCAB + 1, HIDDEN)]
)
def test_a_tied_head_of_another_dtype_or_shape_is_refused(tmp_path: Path, head: Tensor) -> None:
    tensors = tensors_of(tied=True) | {"lm_head.weight": head}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load(write(tmp_path, tensors, tie_word_embeddings=True))


def test_a_tied_head_without_the_embedding_is_refused_by_name(tmp_path: Path) -> None:
    tensors = tensors_of(tied=True)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match=r"1 missing: model\.embed_tokens\.weight; 1 left"):
        load(write(tmp_path, tensors, tie_word_embeddings=True))


def test_auto_makes_float16_bfloat16_on_a_cpu_and_says_so(tmp_path: Path) -> None:
    tensors = tensors_of(torch.float16)
    loaded = load(write(tmp_path, tensors))
    assert loaded.decoder.dtype is torch.bfloat16
    (note,) = notes_of(loaded)
    assert "bfloat16 instead of the file's float16" in note
    assert "float32" in note
    for name, tensor in ours(tensors).items():
        assert torch.equal(loaded.decoder.get_parameter(name), tensor.to(torch.bfloat16))


def test_a_dtype_that_is_asked_for_is_used_without_a_note(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, tensors_of(torch.float16)), dtype="float16")
    assert loaded.decoder.dtype is torch.float16
    assert notes_of(loaded) == []


def test_auto_takes_what_the_config_declares_before_what_the_file_holds(tmp_path: Path) -> None:
    declared = load(write(tmp_path / "a", tensors_of(), torch_dtype="bfloat16"))
    assert declared.decoder.dtype is torch.bfloat16
    assert load(write(tmp_path / "b", tensors_of())).decoder.dtype is torch.float32


@pytest.mark.parametrize("weights", ["mapped", "copied"])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_what_torch_converts_them_to(
    tmp_path: Path, stored: torch.dtype, target: torch.dtype, weights: str
) -> None:
    tensors = tensors_of(stored)
    name = str(target).removeprefix("torch.")
    loaded = load(write(tmp_path, tensors), dtype=name, weights=weights)
    expected = ours(tensors)
    found = dict(loaded.decoder.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is target
        assert torch.equal(found[name], tensor.to(target)), name


def test_mapped_and_copied_weights_give_bit_equal_logits(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors_of())
    mapped, copied = load(folder, weights="mapped"), load(folder, weights="copied")
    assert torch.equal(logits(mapped), logits(copied))
    assert copied.report.mapped_bytes == 0
    assert mapped.report.mapped_bytes > 0
    assert mapped.promotion is None
    assert copied.promotion is None
    total = sum(item.nbytes for item in tensors_of().values())
    for loaded in (mapped, copied):
        assert loaded.report.mapped_bytes + loaded.report.copied_bytes == total


def test_parts_that_lie_together_stay_mapped(tmp_path: Path) -> None:
    """All but one gate stand before their up; that one pair, and nothing else, is copied."""
    tensors = tensors_of()
    together = load(write_raw(tmp_path / "a", tensors), weights="mapped")
    assert together.report.copied_bytes == 0
    assert together.report.mapped_bytes == sum(item.nbytes for item in tensors.values())
    up = "model.layers.0.mlp.up_proj.weight"
    apart = {name: tensor for name, tensor in tensors.items() if name != up} | {up: tensors[up]}
    split = load(write_raw(tmp_path / "b", apart), weights="mapped")
    assert split.report.copied_bytes == 2 * MLP * HIDDEN * 4
    assert torch.equal(logits(together), logits(split))


def test_parts_in_the_wrong_order_are_copied(tmp_path: Path) -> None:
    tensors = tensors_of()
    order = [name for name in tensors if "layers.1.mlp.gate_proj" not in name]
    after_up = order.index("model.layers.1.mlp.up_proj.weight") + 1
    order.insert(after_up, "model.layers.1.mlp.gate_proj.weight")
    folder = write_raw(tmp_path / "a", {name: tensors[name] for name in order})
    loaded = load(folder, weights="mapped")
    assert loaded.report.copied_bytes == 2 * MLP * HIDDEN * 4
    assert torch.equal(logits(loaded), logits(load(write(tmp_path / "b", tensors))))


@pytest.mark.parametrize(("shift", "is_mapped"), [(0, True), (4, True), (1, False), (2, False)])
def test_weights_off_their_alignment_are_copied(
    tmp_path: Path, shift: int, is_mapped: bool
) -> None:
    tensors = tensors_of()
    loaded = load(write_raw(tmp_path, tensors, shift=shift), weights="mapped")
    assert (loaded.report.mapped_bytes > 0) is is_mapped
    assert (loaded.report.copied_bytes == 0) is is_mapped
    for name, tensor in ours(tensors).items():
        assert loaded.decoder.get_parameter(name).data_ptr() % 4 == 0
        assert torch.equal(loaded.decoder.get_parameter(name), tensor)


@pytest.mark.parametrize("names", [("whole.bin",), ("a.bin", "b.bin")])
def test_pickles_load_as_safetensors_do(tmp_path: Path, names: tuple[str, ...]) -> None:
    tensors = tensors_of()
    expected = logits(load(write(tmp_path / "safe", tensors)))
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if len(names) == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        index = {name: names[position % 2] for position, name in enumerate(tensors)}
        for file_name in names:
            part = {name: tensors[name] for name in tensors if index[name] == file_name}
            torch.save(part, folder / file_name)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "pytorch_model.bin.index.json").write_text(text)
    for weights in ("mapped", "copied"):
        assert torch.equal(logits(load(folder, weights=weights)), expected)


def test_transposed_views_in_a_pickle_are_put_in_order(tmp_path: Path) -> None:
    tensors = tensors_of()
    expected = logits(load(write(tmp_path / "safe", tensors)))
    views = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }
    assert not views["lm_head.weight"].is_contiguous()
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(views, folder / "pytorch_model.bin")
    assert torch.equal(logits(load(folder)), expected)


def test_progress_adds_up_to_the_weights(tmp_path: Path) -> None:
    seen: list[int] = []
    load(write(tmp_path, tensors_of()), dtype="bfloat16", progress=seen.append)
    assert sum(seen) == sum(item.numel() * 2 for item in tensors_of().values())
    assert len(seen) > LAYERS


def test_layers_that_do_not_get_the_first_backend_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_attention, "native", lambda: None)
    norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    tensors = tensors_of(tied=True, norms=norms)
    loaded = load(write(tmp_path, tensors, GEMMA2))
    assert loaded.report.attention == {"eager": LAYERS}
    (note,) = [item for item in loaded.report.notes if item.startswith("attention")]
    assert note.startswith(f"attention: eager in {LAYERS} layers, because sdpa")
    asked = load(tmp_path, attn_implementation="eager")
    assert not [item for item in asked.report.notes if item.startswith("attention")]
    assert torch.equal(logits(asked), logits(loaded))


def test_the_first_backend_needs_no_note(tmp_path: Path) -> None:
    if native() is None:
        pytest.skip(f"the kernels are {why_not()}")
    report = load(write(tmp_path, tensors_of())).report
    assert report.attention == {"native": LAYERS}
    assert report.notes == ()


def test_missing_kernels_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_attention, "native", lambda: None)
    monkeypatch.setattr(load_module, "why_not", lambda: "not built")
    report = load(write(tmp_path, tensors_of())).report
    assert report.attention == {"sdpa": LAYERS}
    assert report.notes == ("hanok's kernels are not built",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float13"}, "'float13' is unknown. Choose one of: float32, .*auto"),
        ({"dtype": "int8"}, "'int8' is unknown"),
        ({"weights": "borrowed"}, "'borrowed' is unknown. Choose one of: .*mapped"),
        ({"attn_implementation": "spda"}, "sdpa"),
    ],
)
def test_an_unknown_option_is_refused_with_the_choices(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        load(write(tmp_path, tensors_of()), **options)
