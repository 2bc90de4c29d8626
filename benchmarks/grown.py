"""A model of any Llama shape that says what the bundled model says, for measuring a draft that is right.

    python benchmarks/grown.py [--shape llama-1.1b] [--folder DIR]

The hidden state is the bundled model's, as many times side by side as fit, so that the mean of its
squares, and with it every norm, stays what it was. Matrices read the first copy (other columns are
zero) and write all of them; further heads and rows of the MLP are zero, and further layers have random
weights whose results are multiplied by zero. A pass therefore costs what the shape costs, and the
logits are the bundled model's but for the order of sums. The vocabulary is the bundled one.
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import checkpoints
import torch
from torch import Tensor

import hanok
from hanok.checkpoint.files import Checkpoint, open_checkpoint
from hanok.checkpoint.writer import TensorData, write_json, write_safetensors
from hanok.memory.tensors import read_into

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LAYER = "model.layers."


def grown_shape(shape: checkpoints.Shape) -> checkpoints.Shape:
    """Return the shape with the bundled model's vocabulary and constants.

    Raises ValueError where the bundled model does not fit into it.
    """
    small = open_checkpoint(hanok.BUNDLED).config
    head_dim = small["head_dim"]
    fits = (
        shape.model_type == small["model_type"]
        and shape.hidden_size % small["hidden_size"] == 0
        and shape.hidden_size == shape.num_heads * head_dim
        and shape.num_layers >= small["num_hidden_layers"]
        and shape.num_kv_heads >= small["num_key_value_heads"]
        and shape.num_heads // shape.num_kv_heads
        >= small["num_attention_heads"] // small["num_key_value_heads"]
        and shape.intermediate_size >= small["intermediate_size"]
    )
    if not fits:
        raise ValueError(f"the bundled model does not fit into {shape}")
    return replace(
        shape,
        name=f"grown-{shape.name}",
        vocab_size=small["vocab_size"],
        rope_theta=small["rope_theta"],
        norm_eps=small["rms_norm_eps"],
    )


def make_grown(shape: checkpoints.Shape, folder: Path) -> Path:
    """Write the checkpoint below `folder` unless it is there; return its own folder."""
    shape = grown_shape(shape)
    path = folder / shape.name
    source = open_checkpoint(hanok.BUNDLED)
    ends = {name: source.config[name] for name in ("bos_token_id", "eos_token_id")}
    config = shape.config() | ends
    if (path / "config.json").is_file() and json.loads(
        (path / "config.json").read_text()
    ) == config:
        return path
    write_safetensors(
        path,
        [
            TensorData(
                name=item.name, dtype="BF16", shape=item.shape, read=_reader(item, shape, source)
            )
            for item in checkpoints.tensors_of(shape, 0)
        ],
    )
    for name in TOKENIZER_FILES:
        shutil.copy(hanok.BUNDLED / name, path / name)
    write_json(path / "config.json", config)
    return path


def _reader(
    item: TensorData, shape: checkpoints.Shape, source: Checkpoint
) -> Callable[[], bytearray]:
    def read() -> bytearray:
        data = bytearray(2 * prod(item.shape))
        values = torch.frombuffer(data, dtype=torch.bfloat16).view(*item.shape)
        _fill(values, item.name, shape, source)
        return data

    return read


def _fill(values: Tensor, name: str, shape: checkpoints.Shape, source: Checkpoint) -> None:
    """Write a tensor of the grown model; `values` are zero."""
    config = source.config
    hidden, copies = config["hidden_size"], shape.hidden_size // config["hidden_size"]
    is_norm, kind = name.endswith("norm.weight"), name.split(".")[-2]
    if name.startswith(LAYER) and int(name.split(".")[2]) >= config["num_hidden_layers"]:
        if is_norm:
            values.fill_(1.0)
        elif kind not in ("o_proj", "down_proj"):  # those that write the hidden state stay zero
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values.normal_(0.0, checkpoints.STANDARD_DEVIATION, generator=generator)
        return
    # The head is the embedding there.
    ref = source.tensors["model.embed_tokens.weight" if kind == "lm_head" else name]
    small = torch.empty(tuple(ref.shape), dtype=torch.bfloat16)
    read_into(ref, small)
    if is_norm:
        values.copy_(small.repeat(copies))
    elif kind == "embed_tokens":
        values.copy_(small.repeat(1, copies))
    elif kind in ("q_proj", "k_proj", "v_proj"):
        values[_rows_of_heads(kind, shape, config), :hidden] = small
    elif kind == "o_proj":
        values[:, _rows_of_heads("q_proj", shape, config)] = small.repeat(copies, 1)
    elif kind == "down_proj":
        values[:, : small.shape[1]] = small.repeat(copies, 1)
    else:  # gate_proj, up_proj, lm_head
        values[: small.shape[0], :hidden] = small


def _rows_of_heads(kind: str, shape: checkpoints.Shape, config: dict[str, int]) -> Tensor:
    """Return which rows belong to the bundled model's heads: each KV head keeps the heads it serves."""
    head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
    heads = list(range(kv_heads))
    if kind == "q_proj":
        group, wide = (
            config["num_attention_heads"] // kv_heads,
            shape.num_heads // shape.num_kv_heads,
        )
        heads = [kv * wide + index for kv in range(kv_heads) for index in range(group)]
    return torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in heads])


def main() -> None:
    parser = argparse.ArgumentParser(description="Grow the bundled model to a larger shape.")
    parser.add_argument("--shape", default="llama-1.1b", choices=list(checkpoints.SHAPES))
    parser.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    options = parser.parse_args()
    print(make_grown(checkpoints.SHAPES[options.shape], options.folder))


if __name__ == "__main__":
    main()
