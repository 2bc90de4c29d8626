"""Every example runs as it is, on the bundled model, and prints what it says it does."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
NEEDS_SERVER = ("client", "tools")


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of `hanok serve` with the bundled model."""
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hanok", "serve", "--port", str(port)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server is not ready"
            time.sleep(0.1)  # between two questions to another process


def test_every_example_is_listed_tested_and_short() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) ", (EXAMPLES / "README.md").read_text(), re.M)
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))
    assert set(listed) == files == tested
    for name in files:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 70, name
        assert re.findall(r"^(?:from|import) hanok[._]\w+", text, re.M) == [], "public names only"


def test_generate() -> None:
    output = run("generate")
    assert "4,459,264 parameters in torch.bfloat16" in output
    assert "(24 tokens, ended by length)" in output
    assert len(re.findall(r"^'.*': [01]\.\d{3}$", output, re.M)) == 8
    assert re.search(r"^perplexity: \d+\.\d+$", output, re.M)


def test_batch() -> None:
    output = run("batch")
    assert "Once upon a time, there was" in output
    assert output.count("the same tokens: True") == 3


def test_embeddings() -> None:
    rows = [line.split()[:3] for line in run("embeddings").splitlines()]
    table = [[float(value) for value in row] for row in rows]
    assert [table[i][i] for i in range(3)] == [1.0, 1.0, 1.0]
    assert table[0][1] > table[0][2]
    assert table[0][1] == table[1][0]


def test_quantize() -> None:
    output = run("quantize")
    assert "int4 fits: True" in output
    sizes = dict(re.findall(r"^(\w+): ([\d.]+) MB, perplexity [\d.]+$", output, re.M))
    assert float(sizes["reference"]) > float(sizes["int8"]) > float(sizes["int4"])


def test_train() -> None:
    output = run("train")
    assert "194,560 numbers learnt in 40 steps" in output
    assert "tales: Lily saw a small green frog." in output
    assert "None: Lily saw a small green frog." not in output


def test_finetune() -> None:
    output = run("finetune")
    assert "learn beside the weights" in output
    assert re.search(r"Trained \d+ steps; loss 0\.\d+, 0\.\d+ held out\.", output)
    assert "Lily saw a small green frog." in output
    assert re.search(r"^merged .* same top token (9\d|100)\.\d%", output, re.M)
    assert "Served: The little bear was sad." in output


def test_client(server: str) -> None:
    assert len(run("client", server).split()) > 10


def test_tools(server: str) -> None:
    called, answer = run("tools", server).split("\n", 1)
    assert re.fullmatch(r"count_toys\(\{'color': '(red|blue)'\}\) -> [35]", called)
    assert answer.strip()
