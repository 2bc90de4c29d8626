"""Every Triton kernel compiles for GPUs, which the interpreter says nothing about."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "compile_triton.py"
# What a program may use on the GPUs with least shared memory that bfloat16 products run on (8.6, 8.9).
SHARED_BYTES = 99 * 1024


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_have_room_in_registers_and_shared_memory(
    capability: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.9.0")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, PROGRAM, str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) > 12
    assert [item for item in kernels if item["stack"] > 0] == []
    assert [item for item in kernels if item["shared"] > SHARED_BYTES] == []
