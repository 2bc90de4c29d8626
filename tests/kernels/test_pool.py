"""The pool of threads: each piece once, no waiting for who has not begun, several callers, children."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hanok.kernels.native import Native

SOURCES = Path(__file__).parents[2] / "src/hanok/kernels/cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("compiles a program, and there is no g++ here")
    library = tmp_path_factory.mktemp("pool") / "pool.so"
    files = [str(Path(__file__).with_name("pool_program.cpp")), str(SOURCES / "pool.cpp")]
    options = ["-std=c++17", "-O2", "-pthread", "-fPIC", "-shared", f"-I{SOURCES}"]
    subprocess.run([compiler, *options, *files, "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))
    for name in ("others_go_on", "nested"):
        getattr(found, name).restype = ctypes.c_int64
    for name in ("runs_each_once", "others_go_on", "nested"):
        getattr(found, name).argtypes = [ctypes.c_int, ctypes.c_int64]
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_each_piece_runs_once(program: ctypes.CDLL, threads: int) -> None:
    for count in [0, 1, 2, 3, 7, 64, 1000] * 20:
        assert program.runs_each_once(threads, count), count


def test_the_caller_waits_for_claimed_pieces_only(program: ctypes.CDLL) -> None:
    # Each helper keeps its first piece until all others are done, so the caller has to do them. That a
    # helper never came is as good; that one is waited for would not end.
    for _ in range(200):
        assert program.others_go_on(3, 50) <= 2


def test_work_within_work_runs_in_place(program: ctypes.CDLL) -> None:
    assert program.nested(3, 20) == 20 * sum(range(20))


def test_several_callers_at_once_get_what_each_gets_alone(
    kernels: Native, with_threads: Callable[[int], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1200, 512, generator=generator).bfloat16()
    rows = [torch.randn(2, 512, generator=generator).bfloat16() for _ in range(4)]
    with_threads(1)
    alone = [kernels.dense(x, weight, None) for x in rows]
    with_threads(3)

    def is_equal(index: int) -> bool:
        return all(
            torch.equal(kernels.dense(rows[index], weight, None), alone[index]) for _ in range(50)
        )

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(is_equal, range(4)))


def test_a_child_process_starts_threads_of_its_own(kernels: Native) -> None:
    code = f"""
import os, torch
from hanok.kernels.native import built_instruction_sets
kernels = {{item.key: item for item in built_instruction_sets()}}[{kernels.key!r}]
torch.set_num_threads(3)
x, weight = torch.ones(1, 512).bfloat16(), torch.ones(2400, 512).bfloat16()
before = kernels.dense(x, weight, None)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.dense(x, weight, None), before) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "0"
