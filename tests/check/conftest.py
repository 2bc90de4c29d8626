"""A small sound folder that tests break: an untied Llama in three shards, with the bundled tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hanok
from hanok.checkpoint.tokenizer_files import tokenizer_files
from hanok.checkpoint.writer import TensorData, write_json, write_safetensors
from hanok.models.family import read_config, sources

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2064,  # 16 spare rows
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}


def random_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    family, read = read_config(config, "config.json")
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).bfloat16()
        for source in sources(family, read, ()).values()
        for name, shape in zip(source.names, source.file_shapes(), strict=True)
    }


def write(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = 140_000) -> None:
    data = [
        TensorData(
            name=name,
            dtype={torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype],
            shape=tuple(tensor.shape),
            read=lambda tensor=tensor: tensor.contiguous().view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    ]
    write_safetensors(folder, data, max_shard_bytes=shard_bytes)


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    write_json(path, {key: value for key, value in content.items() if value is not None})


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    write(folder, random_tensors(CONFIG))
    write_json(folder / "config.json", CONFIG)
    for file in tokenizer_files(hanok.BUNDLED):
        shutil.copy(file, folder)
    shutil.copy(hanok.BUNDLED / "generation_config.json", folder)
    return folder


@pytest.fixture
def sound(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))
