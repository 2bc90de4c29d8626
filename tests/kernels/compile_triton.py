"""Compiles every Triton kernel for GPUs that are not there; prints what each takes as JSON lines.

A program of its own, because the tests' process runs kernels in the interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hanok.kernels import triton_attention, triton_elementwise, triton_linear

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOATS = {"scale", "offset", "softcap", "eps"}
# What a model's shapes are multiples of 16 of; the launcher finds that out by itself.
DIVISIBLE = {"rows", "columns", "units", "groups", "size"}
BFLOAT16, FLOAT32, FLOAT16, BYTES, INT64 = "*bf16", "*fp32", "*fp16", "*u8", "*i64"


def compiled(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    *,
    capability: int,
    warps: int = 4,
    stages: int = 3,
) -> dict[str, Any]:
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in pointers:
            signature[name] = pointers[name]
        elif name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    aligned = [
        name for name in names if name in pointers or name in DIVISIBLE or name.endswith("_stride")
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    stack = max(int(size) for size in re.findall(r"STACK:(\d+)", usage))
    name = f"{kernel.__name__} {capability} " + " ".join(str(v) for v in constants.values())
    return {"name": name, "shared": binary.metadata.shared, "stack": stack}


def linear(
    kind: str, bits: int, *, has_zero: bool = False, is_nested: bool = False, x: str = BFLOAT16
) -> tuple[dict[str, str], dict[str, Any]]:
    scale = BYTES if is_nested else FLOAT32 if kind == "codebook" else FLOAT16
    pointers = dict.fromkeys(("x", "bias", "output"), x) | {
        "words": "*i32",
        "codes": BYTES,
        "scale": scale,
        "zero": BYTES,
        "ids": INT64,
        "codebook": FLOAT32,
        "nested_codebook": FLOAT32,
        "absmax": FLOAT32,
    }
    constants = {"KIND": kind, "BITS": bits, "MIDDLE": 8 if bits == 4 else 128}
    return pointers, constants | {"HAS_ZERO": has_zero, "IS_NESTED": is_nested}


def kept(kernel: Any, pointers: dict[str, str]) -> dict[str, str]:
    return {name: kind for name, kind in pointers.items() if name in kernel.arg_names}


def products(capability: int) -> None:
    # Half of the formats on each: compiling is slow.
    formats = [linear("integer", 4), linear("integer", 8, x=FLOAT32)]
    if capability >= 90:
        formats = [
            linear("integer", 4, has_zero=True),
            linear("codebook", 4, is_nested=True, x=FLOAT16),
            linear("float8", 8),
        ]
    for pointers, constants in formats:
        kernel = triton_linear._gemv
        rows = 4 if constants["KIND"] == "codebook" else 8
        sizes = {"HAS_BIAS": True, "BLOCK_ROWS": rows, "BLOCK_UNITS": 128}
        report(kernel, kept(kernel, pointers), constants | sizes, capability=capability)
        kernel = triton_linear._tiles
        precision = "ieee" if pointers["x"] == FLOAT32 else "tf32"
        tiles = [(64, 16, 4, 4, 3)]
        if precision == "ieee":
            tiles += [(64, 32, 4, 4, 3)]
        elif constants["KIND"] == "codebook":
            tiles += [(64, 64, 4, 4, 3)]
        else:
            tiles += [(128, 128, 4, 8, 2)]
        for rows, tokens, units, warps, stages in tiles:
            sizes = {"HAS_BIAS": False, "PRECISION": precision}
            sizes |= {"BLOCK_ROWS": rows, "BLOCK_TOKENS": tokens, "BLOCK_UNITS": units}
            report(
                kernel,
                kept(kernel, pointers),
                constants | sizes,
                capability=capability,
                warps=warps,
                stages=stages,
            )
        kernel = triton_linear._dequantize
        sizes = {"HAS_IDS": True, "BLOCK_ROWS": 4, "BLOCK_UNITS": 64}
        report(kernel, kept(kernel, pointers), constants | sizes, capability=capability)
    kernel = triton_linear._merge
    pointers = {"partial": FLOAT32, "bias": BFLOAT16, "output": BFLOAT16}
    report(kernel, pointers, {"HAS_BIAS": True, "BLOCK": 512}, capability=capability)


def attention(capability: int) -> None:
    for dtype, dim, tile in ((BFLOAT16, 128, 64), (FLOAT16, 256, 32), (FLOAT32, 128, 32)):
        kernel = triton_attention._part
        pointers = dict.fromkeys(("q", "keys", "values"), dtype)
        pointers |= dict.fromkeys(("sums", "largest", "weights"), FLOAT32)
        pointers |= dict.fromkeys(("key_lengths", "block_table"), INT64)
        constants = {"GROUP": 4, "HEAD_DIM": dim, "HAS_SOFTCAP": True, "SPLIT": 256}
        constants |= {"PRECISION": "ieee" if dtype == FLOAT32 else "tf32", "TILE": tile}
        constants |= {"TILE_GROUP": 16, "TILE_DIM": dim}
        report(kernel, pointers, constants, capability=capability, stages=2)
    kernel = triton_attention._merge
    pointers = dict.fromkeys(("sums", "largest", "weights"), FLOAT32)
    pointers |= {"key_lengths": INT64, "output": BFLOAT16}
    constants = {"HEAD_DIM": 128, "SPLIT": 256, "TILE_DIM": 128}
    report(kernel, pointers, constants, capability=capability, warps=2)
    kernel = triton_attention._append
    pointers = dict.fromkeys(("k", "v", "keys", "values"), BFLOAT16)
    pointers |= dict.fromkeys(("key_lengths", "block_table"), INT64)
    constants = {"HEAD_DIM": 96, "TILE_DIM": 128}
    report(kernel, pointers, constants, capability=capability, warps=1)


def elementwise(capability: int) -> None:
    pointers = dict.fromkeys(("x", "weight", "output"), BFLOAT16)
    constants: dict[str, Any] = {"UNIT_OFFSET": True, "BLOCK": 8192}
    kernel = triton_elementwise._rms_norm
    report(kernel, pointers, constants, capability=capability, warps=16)
    pointers = dict.fromkeys(("heads", "cos", "sin", "output"), BFLOAT16)
    constants = {"ROTARY_DIM": 64, "HEAD_DIM": 96, "IS_INTERLEAVED": True}
    constants |= {"BLOCK_HEADS": 8, "BLOCK_DIM": 128}
    report(triton_elementwise._rotate, pointers, constants, capability=capability)
    pointers = dict.fromkeys(("gate_up", "output"), BFLOAT16)
    constants = {"IS_SILU": False, "BLOCK": 1024}
    report(triton_elementwise._gate, pointers, constants, capability=capability)


def report(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **how: int) -> None:
    # A name may be an address in one kernel and a number in another.
    found = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
    print(json.dumps(compiled(kernel, found, constants, **how)), flush=True)


if __name__ == "__main__":
    for make in (products, attention, elementwise):
        make(int(sys.argv[1]))
