"""What tests of the hub share: a hub on this machine, a small checkpoint, and no waiting."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from tests.hub.fake_hub import TOKEN, FakeHub

from hanok.hub.client import Patience


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with nothing on it, which is the one that is asked by default; caches of its own."""
    found = FakeHub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, "")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + template)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.close()


@pytest.fixture
def waits() -> list[float]:
    """The seconds that were waited, or would have been."""
    return []


@pytest.fixture
def patience(waits: list[float]) -> Patience:
    return Patience(sleep=waits.append, timeout_s=20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like a checkpoint's: small text, weights of several parts, one of less than a part."""
    found = tmp_path / "model"
    (found / "sub").mkdir(parents=True)
    (found / "config.json").write_text('{"model_type": "llama"}')
    (found / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (found / "sub" / "notes.txt").write_text("text\n")
    (found / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 20)
    (found / "model-00002-of-00002.safetensors").write_bytes(b"weights" * 100)
    return found
