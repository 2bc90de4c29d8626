"""Planning a model on the hub: a local server that counts what it is asked for stands in for it."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import hanok
from hanok.checkpoint import hub
from hanok.checkpoint.hub import is_repo_id, without_weights
from hanok.errors import CheckpointError, UnsupportedError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


class FakeHub:
    """Serves folders as repositories, and remembers each answer: (path, status, bytes sent)."""

    def __init__(self, *, answers_ranges: bool = True) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.answers: list[tuple[str, int, int]] = []
        self.answers_ranges = answers_ranges
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        if not self.thread.is_alive():
            return
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        found = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+)(?:/(resolve|revision)/([^/]+))?(/.*)?", path
        )
        name = found[1] if found else ""
        folder = self.repositories.get(name)
        if found is None or folder is None or found[3] not in (None, "main", "v1"):
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name in self.gated:
            return self.send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/"):
            siblings = [
                {"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size}
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            ]
            return self.send(request, 200, json.dumps({"id": name, "siblings": siblings}).encode())
        content = (folder / (found[4] or "/").lstrip("/")).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and self.answers_ranges:
            return self.send(request, 206, content[int(asked[1]) : int(asked[2]) + 1])
        return self.send(request, 200, content)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.answers.append((request.path, status, len(content)))
        request.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        # The reader may have what it wants before the end.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            request.wfile.write(content)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    yield server
    server.close()


def sharded(folder: Path) -> Path:
    """Write a checkpoint in two shards with an index, a tokenizer file and files of other forms."""
    hidden, inner, heads = 64, 128, 32
    shapes = {"model.embed_tokens.weight": (640, hidden), "lm_head.weight": (640, hidden)}
    for index in range(3):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (heads, hidden),
            f"{layer}.self_attn.v_proj.weight": (heads, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    names = list(tensors)
    parts = {
        f"model-0000{number}-of-00002.safetensors": some
        for number, some in ((1, names[:9]), (2, names[9:]))
    }
    folder.mkdir()
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "other.safetensors").write_bytes(b"not for us")
    return folder


def test_a_hub_id_is_planned_as_the_downloaded_folder_is(tmp_path: Path, fake: FakeHub) -> None:
    folder = sharded(tmp_path / "real")
    fake.repositories["org/small"] = folder
    found = hanok.plan_load("org/small", context=64, may_measure=False)
    wanted = hanok.plan_load(folder, context=64, may_measure=False)
    assert found.needs.units == wanted.needs.units
    assert found.hf_device_map == wanted.hf_device_map
    assert not [path for path, _, _ in fake.answers if "onnx" in path]
    assert hanok.plan_load("org/small@v1", may_measure=False).needs.units


def test_what_is_refused_of_a_hub_id_names_it(tmp_path: Path, fake: FakeHub) -> None:
    folder = sharded(tmp_path / "real")
    fake.repositories["org/fp8"] = folder
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(UnsupportedError, match=r"^org/fp8: the checkpoint .*\(ModelOpt FP8\)"):
        hanok.plan_load("org/fp8", may_measure=False)


def test_no_weight_is_downloaded(
    tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With short first requests, so that headers need a second one."""
    fake.repositories["org/small"] = sharded(tmp_path / "real")
    monkeypatch.setattr(hub, "FIRST_BYTES", 256)
    with without_weights("org/small") as folder:
        copies = sorted(folder.glob("*.safetensors"))
        for copy in copies:
            real = tmp_path / "real" / copy.name
            header_bytes = 8 + int.from_bytes(real.read_bytes()[:8], "little")
            assert copy.stat().st_size == real.stat().st_size
            assert copy.read_bytes()[:header_bytes] == real.read_bytes()[:header_bytes]
            assert set(copy.read_bytes()[header_bytes:]) == {0}
    assert len(copies) == 2
    assert not folder.exists()
    weights = [answer for answer in fake.answers if answer[0].endswith(".safetensors")]
    assert [status for _, status, _ in weights] == [206] * 4
    assert sum(size for _, _, size in weights) < 8000


def test_a_server_without_ranges_is_cut_off_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeHub(answers_ranges=False)
    try:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        server.repositories["org/small"] = sharded(tmp_path / "real")
        assert hanok.plan_load("org/small", may_measure=False).fits
        monkeypatch.setattr(hub, "FIRST_BYTES", 256)
        with pytest.raises(CheckpointError, match="does not answer range requests"):
            hanok.plan_load("org/small", may_measure=False)
    finally:
        server.close()


def test_what_the_hub_refuses_says_what_to_do(tmp_path: Path, fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="neither a folder here nor a model on http"):
        hanok.plan_load("org/nothing", may_measure=False)
    fake.repositories["org/gated"] = sharded(tmp_path / "real")
    fake.gated.add("org/gated")
    with pytest.raises(CheckpointError, match="is gated: accept its terms"):
        hanok.plan_load("org/gated", may_measure=False)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "pytorch_model.bin").write_bytes(b"x")
    fake.repositories["org/pickles"] = bare
    with pytest.raises(CheckpointError, match=r"has no \.safetensors files"):
        hanok.plan_load("org/pickles", may_measure=False)


def test_damaged_headers_are_refused(tmp_path: Path, fake: FakeHub) -> None:
    folder = sharded(tmp_path / "real")
    fake.repositories["org/small"] = folder
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="which no safetensors file has"):
        hanok.plan_load("org/small", may_measure=False)
    shard.write_bytes((500).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=r"ended after 0 of 500 bytes|416|answers"):
        hanok.plan_load("org/small", may_measure=False)


def test_without_a_network(fake: FakeHub) -> None:
    url = fake.url
    fake.close()
    with pytest.raises(CheckpointError, match=f"is not a folder here, and {url} cannot be reached"):
        hanok.plan_load("org/small", may_measure=False)


def test_what_is_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_repo_id("org/name")
    assert is_repo_id("org/other")
    assert is_repo_id("meta-llama/Llama-3.1-8B@refs/pr/1")
    assert not is_repo_id("/absolute/path")
    assert not is_repo_id("./a/b")
    assert not is_repo_id("name")
