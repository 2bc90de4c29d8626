"""Identifies folders that are not plain Hugging Face checkpoints, and says what to do with them.

Quantized weights, adapters, other layouts and other programs' formats are recognised by the files that
come with them and by the endings of their tensors' names. Nothing here reads a weight.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hanok.checkpoint.safetensors import TensorRef, parse_json_object
from hanok.errors import CheckpointError, UnsupportedError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = {"adapter_model.safetensors", "adapter_model.bin"}
PARAMS = "params.json"  # with Mistral's and Meta's own weights, in place of config.json
FOREIGN: Mapping[str, str] = {
    "*.gguf": "GGUF",
    "*.ggml": "GGML",
    "*.onnx": "ONNX",
    "onnx/*.onnx": "ONNX",
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "*.ot": "rust-bert",
    "*.tflite": "TensorFlow Lite",
    "*.mlpackage": "Core ML",
    "*.nemo": "NeMo",
    "*.engine": "TensorRT",
}
"""Weights of other programs by their file names."""
# The first ending found decides, so endings of one format come before those that several share.
QUANTIZED_ENDINGS: Mapping[str, str] = {
    ".g_idx": "GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".q_weight": "EXL2",
    ".trellis": "EXL3",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_2": "NVFP4",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_scale": "FP8",
    ".SCB": "bitsandbytes, 8 bits",
    ".absmax": "bitsandbytes, 4 bits",
    "_proj_blocks": "MXFP4",
    ".scales": "MLX",
    ".W_q": "HQQ",
}


def quantization_of(config: Mapping[str, Any], folder: Path | None = None) -> str | None:
    """Return how config.json, or another file in `folder`, says the weights are quantized.

    None if none of them does. Raises CheckpointError where such a file cannot be read.
    """
    declared = config.get("quantization_config") or config.get("compression_config")
    if method := _declared(declared):
        return method
    # MLX writes the same object as quantization_config too, without a method.
    if mlx := config.get("quantization"):
        bits = mlx.get("bits") if isinstance(mlx, Mapping) else None
        return f"MLX, {bits} bits" if bits else f"MLX, {mlx!r}"
    if declared:
        return "by a method that quantization_config does not name"
    if folder is None:
        return None
    inner = _object(folder / "hf_quant_config.json").get("quantization")
    if isinstance(inner, Mapping) and inner.get("quant_algo"):
        return f"ModelOpt {inner['quant_algo']}"
    for name, method in (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")):
        if (folder / name).is_file():
            method = str(_object(folder / name).get("quant_method") or method)
            return f"{method}, by {name}"
    return "HQQ" if (folder / "qmodel.pt").is_file() else None


def quantization_in(tensors: Mapping[str, TensorRef]) -> str | None:
    """Return how tensors of these names and dtypes are quantized; None if no name shows it."""
    for ending, method in QUANTIZED_ENDINGS.items():
        if any(name.endswith(ending) for name in tensors):
            return method
    narrow = {ref.dtype for ref in tensors.values() if ref.dtype.startswith(("F8", "F6", "F4"))}
    return " and ".join(sorted(narrow)) or None


def quantized_error(where: str, method: str) -> UnsupportedError:
    """Return the error of a checkpoint whose weights are quantized."""
    return UnsupportedError(
        f"{where}: the checkpoint is quantized ({method}). This version reads unquantized "
        "checkpoints; use the one it was made from."
    )


def refuse_other_layouts(path: Path, weights: Sequence[Path]) -> None:
    """Raise where `path` holds an adapter, or weights in another layout, in place of a checkpoint.

    `weights` are the files of the folder that could be the checkpoint's.
    """
    if path.is_file():
        if method := FOREIGN.get(f"*{path.suffix}"):
            raise _foreign_error(path, method)
        return
    if (path / ADAPTER_CONFIG).is_file() and {file.name for file in weights} <= ADAPTER_WEIGHTS:
        raise UnsupportedError(
            f"{path}: holds a PEFT adapter of {_base_of(path)}, not a model. Merge it into its base "
            "(merge_and_unload of peft, then save_pretrained) and give that folder."
        )
    if (path / PARAMS).is_file() and not (path / CONFIG).is_file():
        raise UnsupportedError(
            f"{path}: holds weights in their makers' own layout ({PARAMS}, without {CONFIG}). Get the "
            "same model in the Hugging Face layout, which has a config.json."
        )


def foreign_weights(folder: Path) -> str | None:
    """Return what other programs' weights a folder holds: "GGUF (a.gguf)"."""
    for pattern, method in FOREIGN.items():
        if files := sorted(folder.glob(pattern)):
            return f"{method} ({files[0].name})"
    return None


def no_weights_error(folder: Path, listed: str) -> CheckpointError:
    """Return the error of a folder without weights that hanok reads."""
    if found := foreign_weights(folder):
        return _foreign_error(folder, found)
    return CheckpointError(
        f"{folder}: holds no weights (*.safetensors, *.bin, *.pt, *.pth); it holds "
        f"{listed or 'nothing'}"
    )


def adapter_note(folder: Path) -> str | None:
    """Return the note about an adapter that lies next to a model's own weights."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    return (
        f"adapter: the PEFT adapter next to the weights ({ADAPTER_CONFIG}) is left out; merge it into "
        "them to use it"
    )


def _declared(declared: Any) -> str | None:
    """Return the method that a quantization_config names; None where it names none."""
    if not isinstance(declared, Mapping):
        return repr(declared) if declared else None
    method, algorithm = declared.get("quant_method"), declared.get("quant_algo")
    if algorithm and method in (None, "modelopt"):
        return f"ModelOpt {algorithm}"
    return repr(method) if method else None


def _foreign_error(path: Path, method: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds {method} weights, which this version does not read. Use the checkpoint that "
        "they were made from: its weights are *.safetensors or *.bin files, with a config.json."
    )


def _base_of(folder: Path) -> str:
    return str(_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "another model")


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return parse_json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
