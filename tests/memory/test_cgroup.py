"""Inside a memory cgroup: budgets see the limit; what is larger loads and answers the same."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

CGROUPS = Path("/sys/fs/cgroup")
MEBIBYTE = 2**20
LIMIT_BYTES = 420 * MEBIBYTE  # Python with torch, and half of the weights
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
CODE = """
import json, sys
import hanok
from hanok.memory.budget import host_budget
budget = host_budget()
model = hanok.load(sys.argv[1], context=64, **json.loads(sys.argv[2]))
tokens = model.generate([5, 6, 7, 8], max_new_tokens=4).token_ids
print(json.dumps({
    "tokens": tokens, "budget": budget.num_bytes, "source": budget.source,
    "streamed": model.decoder.execution.is_streamed, "peak": model.report.peak_bytes,
}))
"""


@pytest.fixture(scope="module")
def tasks() -> Iterator[Path]:
    """The file by which a process joins a cgroup of LIMIT_BYTES."""
    is_old = (CGROUPS / "memory").is_dir()
    folder = (CGROUPS / "memory" if is_old else CGROUPS) / f"hanok-tests-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            file = folder / ("memory.limit_in_bytes" if is_old else "memory.max")
            file.write_text(str(LIMIT_BYTES))
        except OSError as error:
            pytest.skip(f"no memory cgroup can be limited here: {error}")
        yield folder / ("tasks" if is_old else "cgroup.procs")
    finally:
        folder.rmdir()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 470 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).bfloat16()

    tensors = {"model.embed_tokens.weight": drawn(1000, 1024), "lm_head.weight": drawn(1000, 1024)}
    tensors["model.norm.weight"] = torch.ones(1024).bfloat16()
    for index in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}.self_attn.{name}.weight"] = drawn(1024, 1024)
        tensors |= {
            f"{layer}.mlp.gate_proj.weight": drawn(4096, 1024),
            f"{layer}.mlp.up_proj.weight": drawn(4096, 1024),
            f"{layer}.mlp.down_proj.weight": drawn(1024, 4096),
            f"{layer}.input_layernorm.weight": torch.ones(1024).bfloat16(),
            f"{layer}.post_attention_layernorm.weight": torch.ones(1024).bfloat16(),
        }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(folder: Path, options: dict[str, Any], tasks: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-c", CODE, str(folder), json.dumps(options)]
    if tasks is not None:
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(tasks), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("options", "streams"), [({"quant": "int4"}, False), ({}, True)])
def test_what_is_larger_than_the_limit_answers_the_same(
    large: Path, tasks: Path, options: dict[str, Any], streams: bool
) -> None:
    free, bound = run(large, options, None), run(large, options, tasks)
    assert bound["tokens"] == free["tokens"]
    assert bound["streamed"] is streams
    assert not free["streamed"]
    assert bound["budget"] < LIMIT_BYTES < free["budget"]
    assert "cgroup" in bound["source"]
    assert bound["peak"] < LIMIT_BYTES
