"""Makes checkpoints with random weights, for measuring speed where no real model is at hand.

    python benchmarks/checkpoints.py [llama-1.1b qwen-0.5b tiny llama-7b] [--folder DIR]

A checkpoint is a folder in the Hugging Face layout: bfloat16 weights from N(0, 0.02²), norms of one,
and no tokenizer, since the benchmarks give token ids. Every tensor is drawn from the seed and its own
name and written before the next one is drawn, so a checkpoint is the same whatever the order, and
making it takes the memory of its largest tensor. A folder that is complete is left as it is.
"""

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hanok.checkpoint.writer import TensorData, write_json, write_safetensors
from hanok.models.family import read_config, sources

DEFAULT_FOLDER = Path(__file__).parents[1] / "build" / "benchmarks"
STANDARD_DEVIATION = 0.02
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a model, and what config.json says about them."""

    name: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def config(self) -> dict[str, Any]:
        """Return the content of config.json.

        There is an end token, as in every real checkpoint; a benchmark has to generate past it.
        """
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "dtype": "bfloat16",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 32768,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.is_tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="llama-1.1b",
            model_type="llama",
            hidden_size=2048,
            num_layers=22,
            num_heads=32,
            num_kv_heads=4,
            intermediate_size=5632,
            vocab_size=32000,
            is_tied=False,
        ),
        Shape(
            name="qwen-0.5b",
            model_type="qwen2",
            hidden_size=896,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            intermediate_size=4864,
            vocab_size=151936,
            is_tied=True,
            rope_theta=1e6,
            norm_eps=1e-6,
        ),
        Shape(
            name="llama-7b",
            model_type="llama",
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            intermediate_size=11008,
            vocab_size=32000,
            is_tied=False,
        ),
        Shape(
            name="tiny",
            model_type="qwen2",
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=160,
            vocab_size=512,
            is_tied=False,
        ),
    )
}


SMALL = ("llama-1.1b", "qwen-0.5b", "tiny")  # what is made unless named: the others take 13 GB


def make_checkpoint(shape: Shape, folder: Path, *, seed: int = 0) -> Path:
    """Write the checkpoint below `folder` unless it is there; return its own folder."""
    path = folder / f"{shape.name}-seed{seed}"
    if not is_complete(path, shape):
        write_safetensors(path, tensors_of(shape, seed))
        write_json(path / "config.json", shape.config())
    return path


def config_file(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json."""
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def is_complete(path: Path, shape: Shape) -> bool:
    """Return whether the folder holds this shape; config.json is what is written last."""
    config = path / "config.json"
    has_weights = any(
        (path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
    )
    return config.is_file() and has_weights and json.loads(config.read_text()) == shape.config()


def tensors_of(shape: Shape, seed: int) -> list[TensorData]:
    """Return every tensor of the checkpoint, named and cut as the family's files have it."""
    family, config = read_config(shape.config(), shape.name)
    return [
        TensorData(
            name=name, dtype="BF16", shape=tensor_shape, read=values_of(name, tensor_shape, seed)
        )
        for source in sources(family, config, ()).values()
        for name, tensor_shape in zip(source.names, source.file_shapes(), strict=True)
    ]


def values_of(name: str, shape: Sequence[int], seed: int) -> Callable[[], bytearray]:
    """Return what draws the tensor when the writer asks for it."""

    def read() -> bytearray:
        import torch

        data = bytearray(2 * prod(shape))
        values = torch.frombuffer(data, dtype=torch.bfloat16)
        if name.endswith("norm.weight"):
            values.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            values.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        return data

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description="Make checkpoints with random weights.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args()
    unknown = set(options.names) - set(SHAPES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    for name in options.names or SMALL:
        print(make_checkpoint(SHAPES[name], options.folder))


if __name__ == "__main__":
    main()
