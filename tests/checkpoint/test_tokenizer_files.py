"""Which files are a tokenizer, and which of them is read."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest

from hanok.checkpoint.tokenizer_files import Form, find_vocabulary, has_tokenizer, tokenizer_files

RANKS = base64.b64encode(b"!") + b" 0\n" + base64.b64encode(b"ab") + b" 1\n"


@pytest.mark.parametrize(
    ("names", "form", "read"),
    [
        (["tokenizer.json", "tokenizer.model", "tekken.json"], Form.LIBRARY, ["tokenizer.json"]),
        (["tokenizer.model", "vocab.json", "merges.txt"], Form.SENTENCEPIECE, ["tokenizer.model"]),
        (["vocab.json", "merges.txt"], Form.VOCAB_AND_MERGES, ["vocab.json", "merges.txt"]),
        (["vocab.json", "tekken.json"], Form.TEKKEN, ["tekken.json"]),
        (["qwen.tiktoken"], Form.TIKTOKEN, ["qwen.tiktoken"]),
        (["tiktoken.model"], Form.TIKTOKEN, ["tiktoken.model"]),
    ],
)
def test_the_first_form_is_read(tmp_path, names, form, read):
    for name in (*names, "tokenizer_config.json", "config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"\n")
    assert find_vocabulary(tmp_path) == (form, tuple(tmp_path / name for name in read))
    assert has_tokenizer(tmp_path)
    found = [path.name for path in tokenizer_files(tmp_path)]
    assert sorted(found) == sorted([*names, "tokenizer_config.json"])


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (RANKS, Form.TIKTOKEN),
        (RANKS.replace(b"\n", b"\r\n"), Form.TIKTOKEN),
        (b"\n\x0e\n\x05<unk>", Form.SENTENCEPIECE),
        (b"version https://git-lfs.github.com/spec/v1\n", Form.SENTENCEPIECE),
        (b"", Form.SENTENCEPIECE),
    ],
)
def test_two_formats_are_called_tokenizer_model(tmp_path, content, form):
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert find_vocabulary(tmp_path) == (form, (tmp_path / "tokenizer.model",))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_part_of_a_tokenizer_is_none_but_is_noticed(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    assert find_vocabulary(tmp_path) is None
    assert has_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path):
    for name in ("config.json", "tokenizer_config.json", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"{}")
    assert not has_tokenizer(tmp_path)
    assert find_vocabulary(tmp_path) is None
    assert not has_tokenizer(Path("nowhere"))


def test_no_library_is_imported():
    code = "import sys, hanok.checkpoint.tokenizer_files; print('tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
