"""Equal bits, equal quality: hanok's int8 and int4 beside llama.cpp's Q8_0, Q4_0 and Q4_K_M.

    python benchmarks/equal_bits.py --llama-cpp FOLDER [--model PATH] [--text FILE] [--output FILE.md]

Every row scores the same text through the same float32 reference (`hanok.measure_quality`). A GGUF
file's weights are turned back into floats and computed with as such: what llama.cpp loses by rounding
activations to 8 bits as well is not in its rows. hanok's own rows contain that loss; the rows called
"weights only" leave it out, by turning hanok's weights back into floats in the same way.
"""

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import gguf_files
import measure
import torch
from engine_contestants import LLAMA_CPP_HELP
from torch import Tensor

import hanok
from hanok.bench.quality import measure_quality
from hanok.checkpoint.files import Checkpoint, open_checkpoint
from hanok.checkpoint.writer import TensorData, write_safetensors
from hanok.cli.verbs.quality import BUNDLED_TEXT, HEADER, cells
from hanok.memory.tensors import dtype_of, read_into
from hanok.quant.base import quantize
from hanok.quant.recipe import Recipe, read_recipe

OURS = ("int8", "int8:group_size=128", "int4", "int4:symmetric=false", "int4:group_size=64", "nf4")
THEIRS = ("Q8_0", "Q4_0", "Q4_K_M")
METHOD = (
    'Weights of the rows "weights only" are turned back into floats and computed with as such. The '
    "other rows of hanok also round what is multiplied with them to 8 bits, as it does when it "
    "generates; llama.cpp does the like, in blocks of 32, which none of its rows contains. Rows of as "
    "many bits, both weights only, are what is comparable."
)


def folder_of(checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> Path:
    """Write float32 weights beside links to the checkpoint's other files."""
    folder.mkdir()
    for file in checkpoint.folder.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            (folder / file.name).symlink_to(file.resolve())
    found = dict(tensors)
    write_safetensors(
        folder,
        [
            TensorData(
                name=name,
                dtype="F32",
                shape=tuple(values.shape),
                read=lambda values=values: bytearray(values.contiguous().numpy().tobytes()),
            )
            for name, values in found.items()
        ],
    )
    return folder


def rounded(checkpoint: Checkpoint, recipe: Recipe) -> Iterable[tuple[str, Tensor]]:
    """Yield the checkpoint's weights as the recipe stores them, as floats."""
    is_tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for name, ref in checkpoint.tensors.items():
        values = torch.empty(tuple(ref.shape), dtype=dtype_of(ref))
        read_into(ref, values)
        method = recipe.method_for(name.removeprefix("model."), is_tied=is_tied)
        if method is not None:
            values = quantize(method, values).dequantize()
        yield name, values.float()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quality at equal bits with llama.cpp.")
    parser.add_argument("--model", type=Path, default=hanok.BUNDLED)
    parser.add_argument("--text", type=Path, default=BUNDLED_TEXT)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama-quantize")
    parser.add_argument("--output", type=Path, help="Markdown file")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    text = options.text.read_text(encoding="utf-8")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        others = {}
        for recipe in OURS:
            folder = Path(temporary, recipe.replace(":", "-"))
            others[f"{recipe}, weights only"] = folder_of(
                checkpoint, rounded(checkpoint, read_recipe(recipe)), folder
            )
        sizes, kinds = {}, []
        if options.llama_cpp is not None:
            source = gguf_files.write_gguf(options.model, Path(temporary, "model.gguf"))
            for kind in THEIRS:
                file = gguf_files.quantized(source, kind, options.llama_cpp, threads)
                name = f"llama.cpp {kind}, weights only"
                tensors = gguf_files.hugging_face_floats(file, checkpoint.config)
                others[name] = folder_of(checkpoint, tensors, Path(temporary, kind))
                sizes[name] = sum(item.size_bytes for item in gguf_files.read_gguf(file)[1])
                kinds.append(gguf_files.kinds_sentence(kind, gguf_files.weights_by_kind(file)))
        report = measure_quality(
            options.model,
            OURS,
            text,
            dtype="float32",
            max_tokens=options.max_tokens,
            others=others,
        )
    weights = report.rows[0].weight_bytes * 8 / report.rows[0].bits_per_weight
    bytes_of = {f"{row.name}, weights only": row.weight_bytes for row in report.rows} | sizes
    rows = [
        replace(row, weight_bytes=size, bits_per_weight=8 * size / weights)
        if (size := bytes_of.get(row.name))
        else row
        for row in report.rows
    ]
    kept = [index for index, name in enumerate(HEADER) if name not in ("tokens/s", "bandwidth")]
    table = measure.table(
        [HEADER[index] for index in kept],
        [[row[index] for index in kept] for row in cells(replace(report, rows=tuple(rows)))],
    )
    missing = [] if options.llama_cpp else [f"llama.cpp is left out: {LLAMA_CPP_HELP}."]
    sentence = f"{report.num_tokens} tokens of {options.text.name}, in windows of {report.window}."
    parts = [
        measure.heading(f"Equal bits: {options.model.name}", threads),
        f"{sentence} {METHOD}",
        *missing,
        table,
        *kinds,
    ]
    measure.publish("\n\n".join(parts), options.output)


if __name__ == "__main__":
    main()
