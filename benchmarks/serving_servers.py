"""The servers that benchmarks/serving.py compares: how each is started, asked and stopped.

All serve the same checkpoint. It gets a tokenizer of its own, in which every token is a word ("w17"), so
that servers that take texts alone can be asked for the same token ids as the others.
"""

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
import gguf_files

from hanok.bench.traffic import Target

HANOK, BARE, LLAMA_CPP = "hanok", "hanok's engine alone", "llama.cpp"
# As it starts it answers one request after the other, so few clients tell all of it.
TRANSFORMERS = "transformers"
BATCHED = "transformers --continuous-batching"
START_PATIENCE_S = 300.0
STOP_PATIENCE_S = 60.0
SPECIAL = ("<unk>", "<s>", "</s>")
TRANSFORMERS_HELP = (
    "pip install torch, then 'transformers[serving]' into an environment, and give its bin/transformers "
    "as --transformers or as $HANOK_TRANSFORMERS"
)


@dataclass(slots=True, kw_only=True)
class Running:
    """A server that answers."""

    target: Target
    process: subprocess.Popen[str]
    takes_ids: bool = True
    log: list[str] = field(default_factory=list)
    """What it wrote."""

    def resident_bytes(self) -> int:
        """Return what the process holds in memory (VmRSS)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

    def get(self, path: str) -> str:
        """Return the body of a GET."""
        host = self.target.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """Return the value of a Prometheus series without labels."""
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics"), re.MULTILINE)
        if found is None:
            raise RuntimeError(f"{self.target.url}/metrics has no {name}")
        return float(found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a server must have room for."""

    clients: int
    tokens: int
    """Of one request, prompt and answer."""


Start = Callable[[Sizes], contextlib.AbstractContextManager[Running]]


def texts_of(vocab_size: int) -> list[str]:
    """Return the text of each token. No special one is the beginning of a word."""
    return [*SPECIAL, *(f"w{token}" for token in range(len(SPECIAL), vocab_size))]


def words(token_ids: Sequence[int]) -> str:
    """Return the text that is these tokens."""
    return " ".join(f"w{token}" for token in token_ids)


def served_checkpoint(shape: checkpoints.Shape, folder: Path) -> Path:
    """Return a folder with the shape's weights and the tokenizer of words."""
    made = checkpoints.make_checkpoint(shape, folder)
    served = folder / f"{made.name}-words"
    served.mkdir(exist_ok=True)
    for file in made.iterdir():
        if not (served / file.name).exists():
            (served / file.name).symlink_to(file)
    vocabulary = {text: token for token, text in enumerate(texts_of(shape.vocab_size))}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": SPECIAL[0]},
    }
    (served / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
    }
    (served / "tokenizer_config.json").write_text(json.dumps(settings))
    return served


def hanok(
    checkpoint: Path, quant: str | None, *, threads: int, options: Sequence[str] = ()
) -> Start:
    """Return what starts `hanok serve`."""

    @contextlib.contextmanager
    def start(sizes: Sizes) -> Iterator[Running]:
        command = [sys.executable, "-m", "hanok", "serve", str(checkpoint), "--port", "0"]
        command += ["--threads", str(threads), "--users", str(sizes.clients)]
        command += ["--context", str(sizes.tokens), *(("--quant", quant) if quant else ())]
        with _process([*command, *options], threads) as running:
            url = _wait_for_line(running, r"Listening on (http://\S+)")
            name = re.sub(r"[^\w.-]", "", checkpoint.name)
            running.target = Target(url=url, model=name, options={"ignore_eos": True})
            _wait_until_ok(running, "/ready")
            yield running

    return start


def llama_cpp(model: Path, binary: Path, *, threads: int) -> Start:
    """Return what starts llama.cpp's server, a slot for each client."""

    @contextlib.contextmanager
    def start(sizes: Sizes) -> Iterator[Running]:
        port = _free_port()
        command = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["-t", str(threads), "-np", str(sizes.clients)]
        command += ["-c", str(sizes.clients * sizes.tokens), "--no-webui"]
        with _process(command, threads) as running:
            running.target = Target(url=f"http://127.0.0.1:{port}", options={"ignore_eos": True})
            _wait_until_ok(running, "/health")
            yield running

    return start


def transformers(checkpoint: Path, program: Path, *, threads: int, options: Sequence[str]) -> Start:
    """Return what starts `transformers serve`; it takes texts alone."""

    @contextlib.contextmanager
    def start(sizes: Sizes) -> Iterator[Running]:
        port = _free_port()
        command = [str(program), "serve", str(checkpoint), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]
        with _process([*command, *options], threads) as running:
            running.takes_ids = False
            running.target = Target(url=f"http://127.0.0.1:{port}", model=str(checkpoint))
            _wait_until_ok(running, "/health")
            yield running

    return start


def gguf(checkpoint: Path, kind: str, programs: Path, threads: int) -> Path:
    """Return the checkpoint as a GGUF file of llama.cpp's own making."""
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    path = checkpoint.with_name(f"{checkpoint.name}.gguf")
    names = [*SPECIAL, *(f"\u2581{text}" for text in texts_of(size)[len(SPECIAL) :])]
    plain = gguf_files.write_gguf(checkpoint, path, names)
    return gguf_files.quantized(plain, kind, programs, threads)


@contextlib.contextmanager
def _process(command: Sequence[str], threads: int) -> Iterator[Running]:
    """Run a command until the block ends; it must end by itself when it is asked to."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    running = Running(target=Target(url=""), process=process)
    reader = threading.Thread(target=_keep_lines, args=(process, running.log), daemon=True)
    reader.start()
    try:
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()


def _keep_lines(process: subprocess.Popen[str], log: list[str]) -> None:
    if process.stdout is not None:
        with process.stdout as lines:
            log.extend(lines)


def _wait_for_line(running: Running, pattern: str) -> str:
    end = time.monotonic() + START_PATIENCE_S
    while time.monotonic() < end and running.process.poll() is None:
        for line in running.log:
            if found := re.search(pattern, line):
                return found[1]
        time.sleep(0.05)
    raise _failed(running)


def _wait_until_ok(running: Running, path: str) -> None:
    end = time.monotonic() + START_PATIENCE_S
    host = running.target.url.removeprefix("http://")
    while time.monotonic() < end and running.process.poll() is None:
        connection = http.client.HTTPConnection(host, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        connection.close()
        time.sleep(0.1)
    raise _failed(running)


def _failed(running: Running) -> RuntimeError:
    command = shlex.join(map(str, running.process.args))  # type: ignore[arg-type]
    return RuntimeError(f"{command} did not begin to answer:\n{''.join(running.log[-30:])}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def find_program(given: Path | None, name: str) -> Path | None:
    """Return a program as given, or as it is found; None where there is none."""
    found = given or shutil.which(name) or Path(sys.executable).with_name(name)
    return Path(found) if Path(found).is_file() else None
