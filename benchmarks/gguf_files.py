"""Checkpoints of Llama and Qwen2 as GGUF files for llama.cpp, and the weights of such files as floats.

    python benchmarks/gguf_files.py CHECKPOINT [Q8_0 Q4_0 Q4_K_M] --llama-cpp BIN [--folder DIR]

The file with the checkpoint's own weights is written here, without a vocabulary: the benchmarks give
token ids. llama.cpp's own llama-quantize makes the others of it. Format: ggml's docs/gguf.md, version
3; blocks: ggml-quants. llama.cpp turns neighbouring components of a Llama head, Hugging Face those half
a head apart, so rows of query and key change places.
"""

import argparse
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import checkpoints
import torch
from torch import Tensor

from hanok.checkpoint.files import open_checkpoint
from hanok.memory.tensors import dtype_of, read_into

ALIGNMENT = 32
HEADER = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
}
SCALARS[12] = "<d"
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
FILE_TYPES = {"F32": 0, "BF16": 32}

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where a tensor of a GGUF file lies, and as what."""

    name: str
    shape: tuple[int, ...]  # the outermost axis first
    kind: int
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        values, size = BLOCKS[self.kind][:2]
        return prod(self.shape) // values * size


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls a tensor of a Hugging Face checkpoint."""
    if name in NAMES:
        return NAMES[name]
    _, _, index, rest = name.split(".", 3)
    part, _, leaf = rest.rpartition(".")
    return f"blk.{index}.{LAYER_NAMES[part]}.{leaf}"


def turned_rows(rows: Tensor, num_heads: int) -> Tensor:
    """Put rows half a head apart next to each other."""
    halves = rows.view(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def unturned_rows(rows: Tensor, num_heads: int) -> Tensor:
    """Undo `turned_rows`."""
    pairs = rows.view(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """Return the heads whose rows change places in this tensor, None where they do not."""
    if config["model_type"] != "llama":
        return None
    heads = int(config["num_attention_heads"])
    if ".q_proj." in name:
        return heads
    return int(config.get("num_key_value_heads") or heads) if ".k_proj." in name else None


def write_gguf(checkpoint_folder: Path, path: Path, words: Sequence[str] = ()) -> Path:
    """Write a checkpoint as BF16 or F32, whichever its own weights are, unless the file is there.

    `words` are the texts of its tokens, for programs that cannot do without.
    """
    if path.is_file():
        return path
    checkpoint = open_checkpoint(checkpoint_folder)
    config = checkpoint.config
    is_wide = any(ref.dtype == "F32" for ref in checkpoint.tensors.values())
    tied = config.get("tie_word_embeddings", False)
    names = [n for n in checkpoint.tensors if not (tied and n == "lm_head.weight")]
    names = [n for n in names if "rotary_emb" not in n]
    kinds = {n: 0 if is_wide or len(checkpoint.tensors[n].shape) == 1 else 30 for n in names}
    table, offset = [], 0
    for name in names:
        shape = tuple(checkpoint.tensors[name].shape)
        table.append(
            GgufTensor(name=gguf_name(name), shape=shape, kind=kinds[name], offset_bytes=offset)
        )
        offset += -(-table[-1].size_bytes // ALIGNMENT) * ALIGNMENT
    unfinished = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as file:
        write_header(file, metadata(config, "F32" if is_wide else "BF16", words), table)
        for name in names:
            ref = checkpoint.tensors[name]
            values = torch.empty(tuple(ref.shape), dtype=dtype_of(ref))
            read_into(ref, values)
            heads = heads_of(name, config)
            if heads is not None:
                values = turned_rows(values, heads)
            values = values.float() if kinds[name] == 0 else values.bfloat16()
            file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
            file.write(bytes(-file.tell() % ALIGNMENT))
    unfinished.replace(path)
    return path


def metadata(
    config: Mapping[str, Any], file_type: str, words: Sequence[str] = ()
) -> dict[str, tuple[int, Any]]:
    """Return the keys that llama.cpp needs, each with its type."""
    kind = config["model_type"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    return {
        "general.architecture": (STRING, kind),
        "general.file_type": (UINT32, FILE_TYPES[file_type]),
        f"{kind}.context_length": (UINT32, config["max_position_embeddings"]),
        f"{kind}.embedding_length": (UINT32, config["hidden_size"]),
        f"{kind}.block_count": (UINT32, config["num_hidden_layers"]),
        f"{kind}.feed_forward_length": (UINT32, config["intermediate_size"]),
        f"{kind}.attention.head_count": (UINT32, heads),
        f"{kind}.attention.head_count_kv": (UINT32, config.get("num_key_value_heads") or heads),
        f"{kind}.attention.layer_norm_rms_epsilon": (FLOAT32, config["rms_norm_eps"]),
        f"{kind}.rope.dimension_count": (UINT32, head_dim),
        f"{kind}.rope.freq_base": (FLOAT32, theta),
        f"{kind}.vocab_size": (UINT32, config["vocab_size"]),
        **vocabulary(words),
    }


def vocabulary(words: Sequence[str]) -> dict[str, tuple[int, Any]]:
    """Return the keys of a vocabulary in which token 0 is unknown, 1 begins and 2 ends a text."""
    if not words:
        return {"tokenizer.ggml.model": (STRING, "no_vocab")}
    kinds = [2, 3, 3, *[1] * (len(words) - 3)]
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, words)),
        "tokenizer.ggml.scores": (ARRAY, (FLOAT32, [0.0] * len(words))),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, kinds)),
        "tokenizer.ggml.unknown_token_id": (UINT32, 0),
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
    }


def write_header(
    file: BinaryIO, keys: Mapping[str, tuple[int, Any]], tensors: list[GgufTensor]
) -> None:
    """Write everything before the first tensor's bytes."""
    file.write(HEADER + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for key, (kind, value) in keys.items():
        file.write(string(key) + struct.pack("<I", kind))
        file.write(packed(kind, value))
    for tensor in tensors:
        file.write(string(tensor.name) + struct.pack("<I", len(tensor.shape)))
        file.write(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        file.write(struct.pack("<IQ", tensor.kind, tensor.offset_bytes))
    file.write(bytes(-file.tell() % ALIGNMENT))


def packed(kind: int, value: Any) -> bytes:
    """Return a value of a key as it is written."""
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        item_kind, items = value
        head = struct.pack("<IQ", item_kind, len(items))
        return head + b"".join(packed(item_kind, item) for item in items)
    return struct.pack(SCALARS[kind], value)


def string(text: str) -> bytes:
    """Return a string with its length before it."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def quantized(source: Path, kind: str, llama_cpp: Path, threads: int) -> Path:
    """Return the file that llama-quantize makes of one, unless it is there."""
    path = source.with_name(f"{source.stem}-{kind}.gguf")
    if not path.is_file():
        unfinished = path.with_suffix(".part")
        command = [llama_cpp / "llama-quantize", source, unfinished, kind, str(threads)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            raise RuntimeError(f"llama-quantize failed on {source}:\n{done.stderr[-1500:]}")
        unfinished.replace(path)
    return path


# Back


def read_gguf(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Return a file's keys and tensors, their offsets from the beginning of the file."""
    with path.open("rb") as file:
        if file.read(4) != HEADER:
            raise ValueError(f"{path} is no GGUF file")
        _, num_tensors, num_keys = struct.unpack("<IQQ", file.read(20))
        keys = {}
        for _ in range(num_keys):
            key = read_string(file)
            keys[key] = read_value(file, read_scalar(file, "<I"))
        tensors = []
        for _ in range(num_tensors):
            name = read_string(file)
            axes = read_scalar(file, "<I")
            shape = tuple(reversed([read_scalar(file, "<Q") for _ in range(axes)]))
            kind, offset = read_scalar(file, "<I"), read_scalar(file, "<Q")
            tensors.append(GgufTensor(name=name, shape=shape, kind=kind, offset_bytes=offset))
        start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    moved = [
        GgufTensor(name=t.name, shape=t.shape, kind=t.kind, offset_bytes=t.offset_bytes + start)
        for t in tensors
    ]
    return keys, moved


def read_scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def read_string(file: BinaryIO) -> str:
    return file.read(read_scalar(file, "<Q")).decode()


def read_value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return read_string(file)
    if kind == ARRAY:
        inner, count = read_scalar(file, "<I"), read_scalar(file, "<Q")
        return [read_value(file, inner) for _ in range(count)]
    return read_scalar(file, SCALARS[kind])


def bytes_per_token(path: Path) -> int:
    """Return the bytes of weights that one token reads: all but an embedding that is only looked up."""
    _, tensors = read_gguf(path)
    has_head = any(tensor.name == "output.weight" for tensor in tensors)
    return sum(t.size_bytes for t in tensors if not (has_head and t.name == "token_embd.weight"))


def floats(path: Path) -> Iterator[tuple[GgufTensor, Tensor]]:
    """Yield every tensor of a file, (…) float32."""
    data = path.read_bytes()
    for tensor in read_gguf(path)[1]:
        part = bytearray(data[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes])
        raw = torch.frombuffer(part, dtype=torch.uint8)
        _, size, decode = BLOCKS[tensor.kind]
        yield tensor, decode(raw.view(-1, size)).reshape(tensor.shape)


def hugging_face_floats(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield a file's tensors under the names and in the order of the checkpoint it was made of."""
    names = {ours: theirs for theirs, ours in NAMES.items()}
    parts = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    for tensor, values in floats(path):
        name = names.get(tensor.name)
        if name is None:
            _, index, part, leaf = tensor.name.split(".")
            name = f"model.layers.{index}.{parts[part]}.{leaf}"
        heads = heads_of(name, config)
        yield name, values if heads is None else unturned_rows(values, heads)


def halves(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of each block, (blocks, 1) float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def q4_0(blocks: Tensor) -> Tensor:
    """18 bytes: scale, 16 low nibbles, then the high ones."""
    codes = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], dim=1).float() - 8
    return codes * halves(blocks, 0)


def q5_0(blocks: Tensor) -> Tensor:
    """22 bytes: scale, 32 fifth bits, nibbles as in Q4_0."""
    codes = torch.cat([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], dim=1)
    fifth = (blocks[:, 2:6, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return ((codes | fifth.flatten(1) << 4).float() - 16) * halves(blocks, 0)


def q8_0(blocks: Tensor) -> Tensor:
    """34 bytes: scale, 32 codes."""
    return blocks[:, 2:].contiguous().view(torch.int8).float() * halves(blocks, 0)


def q4_k(blocks: Tensor) -> Tensor:
    """144 bytes: scale of scales, scale of minima, eight 6-bit pairs of them, 128 bytes of nibbles."""
    packed = blocks[:, 4:16]
    low, high = packed[:, :8] & 63, packed[:, 8:12]
    scale = torch.cat([low[:, :4], (high & 15) | (packed[:, :4] >> 6) << 4], dim=1).float()
    minimum = torch.cat([low[:, 4:], (high >> 4) | (packed[:, 4:8] >> 6) << 4], dim=1).float()
    pairs = blocks[:, 16:].view(-1, 4, 32)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=2).view(-1, 8, 32).float()
    scale, minimum = scale * halves(blocks, 0), minimum * halves(blocks, 2)
    return (codes * scale[..., None] - minimum[..., None]).flatten(1)


def q6_k(blocks: Tensor) -> Tensor:
    """210 bytes: 128 of low nibbles, 64 of upper pairs of bits, 16 scales, the scale of scales."""
    low, high = blocks[:, :128].view(-1, 2, 2, 32), blocks[:, 128:192].view(-1, 2, 1, 32)
    nibbles = torch.cat([low & 15, low >> 4], dim=2)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    codes = (nibbles | ((high >> shifts) & 3) << 4).float() - 32
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * halves(blocks, 208)
    return (codes.view(-1, 16, 16) * scale[..., None]).flatten(1)


# By ggml's number of a type: values and bytes of a block, and what makes floats of it.
BLOCKS = {
    0: (1, 4, lambda blocks: blocks.view(torch.float32)),
    1: (1, 2, lambda blocks: blocks.view(torch.float16).float()),
    30: (1, 2, lambda blocks: blocks.view(torch.bfloat16).float()),
    2: (32, 18, q4_0),
    6: (32, 22, q5_0),
    8: (32, 34, q8_0),
    12: (256, 144, q4_k),
    14: (256, 210, q6_k),
}

KIND_NAMES = {
    0: "F32",
    1: "F16",
    30: "BF16",
    2: "Q4_0",
    6: "Q5_0",
    8: "Q8_0",
    12: "Q4_K",
    14: "Q6_K",
}


def weights_by_kind(path: Path) -> dict[str, int]:
    """Return how many weights a file's matrices hold in each type of ggml, most first.

    llama-quantize takes other types for the head, for some layers and for rows that its blocks do not
    divide, so a file is not all of the type it is named for.
    """
    found: Counter[str] = Counter()
    for tensor in read_gguf(path)[1]:
        if len(tensor.shape) > 1:
            found[KIND_NAMES[tensor.kind]] += prod(tensor.shape)
    return dict(found.most_common())


def kinds_sentence(kind: str, weights: Mapping[str, int]) -> str:
    """Say which types llama-quantize really took for the matrices."""
    total = sum(weights.values())
    shares = ", ".join(f"{count / total:.1%} {name}" for name, count in weights.items())
    return f"Weights of the matrices of llama.cpp's {kind}: {shares}."


def main() -> None:
    parser = argparse.ArgumentParser(description="Make GGUF files of a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="what llama-quantize makes of it")
    parser.add_argument("--llama-cpp", type=Path, help="where llama-quantize is")
    parser.add_argument("--folder", type=Path, default=checkpoints.DEFAULT_FOLDER)
    options = parser.parse_args()
    if options.kinds and options.llama_cpp is None:
        parser.error("llama-quantize makes these; say where it is with --llama-cpp")
    source = write_gguf(options.checkpoint, options.folder / f"{options.checkpoint.name}.gguf")
    print(source)
    for kind in options.kinds:
        print(quantized(source, kind, options.llama_cpp, 2))


if __name__ == "__main__":
    main()
