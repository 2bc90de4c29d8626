"""A training that is killed goes on, and is the one without a break: float32 on a CPU, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 100


@pytest.mark.skipif(not hasattr(__import__("os"), "pidfd_open"), reason="needs Linux")
def test_killed_at_a_hundred_random_moments(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path), str(KILLS)]
    root = Path(__file__).parents[2]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert found.returncode == 0, found.stderr[-2000:] + found.stdout
    told = json.loads(found.stdout)
    assert told["kills"] >= KILLS
    assert 1 <= told["trainings"] < KILLS  # each training was killed several times
