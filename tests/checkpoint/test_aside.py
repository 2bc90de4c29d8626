"""What is written aside: complete or not there, and never left for ever."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hanok.checkpoint.aside import Batch, folder_aside, remove_leftovers
from hanok.checkpoint.convert import convert
from hanok.checkpoint.files import open_checkpoint

WRITERS = {
    "file": (
        "with Batch() as batch, batch.open(target) as file:\n"
        "    file.write(b'half'); file.flush(); print('writes', flush=True); input()"
    ),
    "folder": (
        "with folder_aside(target) as folder:\n"
        "    (folder / 'half').touch(); print('writes', flush=True); input()"
    ),
}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@contextmanager
def writing(kind: str, target: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has begun to write `target` and waits."""
    code = (
        "import sys, pathlib\n"
        "from hanok.checkpoint.aside import Batch, folder_aside\n"
        f"target = pathlib.Path(sys.argv[1])\n{WRITERS[kind]}"
    )
    command = [sys.executable, "-c", code, str(target)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writes\n"
        yield process
        process.kill()


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_being_written_stays_and_what_a_killed_writer_left_goes(
    tmp_path: Path, kind: str
) -> None:
    with writing(kind, tmp_path / "a") as process:
        (held,) = names(tmp_path)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [held]
        process.kill()
        process.wait()
        assert names(tmp_path) == [held]
        with Batch() as batch:
            with batch.open(tmp_path / "b") as file:
                file.write(b"whole")
                assert held not in names(tmp_path)
            batch.publish()
    assert names(tmp_path) == ["b"]


def test_a_folder_written_aside_removes_leftovers_too(tmp_path: Path) -> None:
    (tmp_path / ".model.0123abcd.partial").mkdir()
    (tmp_path / ".model.0123abcd.partial" / "half").touch()
    with folder_aside(tmp_path / "model") as folder:
        (folder / "whole").touch()
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path) == ["model"]
    with pytest.raises(RuntimeError), folder_aside(tmp_path / "other"):
        raise RuntimeError
    assert names(tmp_path) == ["model"]


def test_only_what_was_written_aside_is_removed(tmp_path: Path) -> None:
    others = [".a.0123abcd", "a.0123abcd.partial", ".a.partial", ".a.0123ABCD.partial", ".partial"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / "target").touch()
    (tmp_path / ".link.0123abcd.partial").symlink_to(tmp_path / "target")
    (tmp_path / ".a.0123abcd.partial").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "target", ".link.0123abcd.partial"])
    remove_leftovers(tmp_path / "absent")


def test_a_conversion_killed_while_reading_back_is_not_done(tmp_path: Path) -> None:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    code = (
        "import os, signal, sys\n"
        "from hanok.checkpoint.convert import convert\n"
        "left = int(sys.argv[2])\n"
        "def progress(count):\n"
        "    global left\n"
        "    left -= count\n"
        "    if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(sys.argv[1], progress=progress)"
    )
    # All of it is written, and a part of it read back.
    command = [sys.executable, "-c", code, str(tmp_path), str(num_bytes)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = [name for name in names(tmp_path) if name != "pytorch_model.bin"]
    assert left.startswith(".model.safetensors.")
    report = convert(tmp_path)
    assert not report.already_done
    assert names(tmp_path) == ["model.safetensors", "pytorch_model.bin"]
    assert set(open_checkpoint(tmp_path, needs_config=False).tensors) == set(weights)
    # What another killed run left goes even where there is nothing to do.
    os.close(os.open(tmp_path / ".model.safetensors.00000000.partial", os.O_CREAT))
    assert convert(tmp_path).already_done
    assert names(tmp_path) == ["model.safetensors", "pytorch_model.bin"]
