"""benchmarks/machines.py: what each run is told, what is compared, and a run without figures."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("checkpoints", "measure", "generate", "gguf_files", "engine_contestants", "machines")


@pytest.fixture(scope="module")
def machines() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("machines")
    for name in NAMES:
        sys.modules.pop(name, None)


def contestant(machines: ModuleType, engine: str, told: list[Any], **more: Any) -> Any:
    def row(
        command: list[str], environment: dict[str, str], threads: int, has_prompt: bool
    ) -> dict[str, float]:
        told.append((command, dict(environment), threads))
        return {}

    return machines.Contestant(
        engine=engine,
        precision=more.pop("precision", "int8"),
        set="avx2",
        command=lambda threads: ["program", str(threads)],
        row=row,
        **more,
    )


def test_a_run_is_held_to_its_instruction_set_and_told_its_threads(machines: ModuleType) -> None:
    told: list[Any] = []
    machines.run_under(machines.ONE_THREAD, contestant(machines, "hanok", told))
    command, environment, threads = told[0]
    assert (command, threads) == (["program", "1"], 1)
    assert environment["HANOK_ISA"] == environment["ATEN_CPU_CAPABILITY"] == "avx2"
    assert environment["MKL_ENABLE_INSTRUCTIONS"] == environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_under_a_quota_hanok_finds_its_threads_and_the_others_have_the_machines(
    machines: ModuleType,
) -> None:
    told: list[Any] = []
    try:
        for engine in ("hanok", "llama.cpp"):
            machines.run_under(machines.QUOTA, contestant(machines, engine, told))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    (ours, _, our_threads), (theirs, _, their_threads) = told
    assert ours[:2] == theirs[:2] == ["sh", "-c"]
    assert (ours[-1], our_threads) == ("None", 0)
    cores = machines.measure.num_cores()
    assert (theirs[-1], their_threads) == (str(cores), cores)


def test_beside_busy_loops_a_run_ends_them(machines: ModuleType) -> None:
    loops: list[Any] = []
    real = subprocess.Popen

    def started(*args: Any, **kwargs: Any) -> Any:
        loops.append(real(*args, **kwargs))
        return loops[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machines.subprocess, "Popen", started)
        machines.run_under(machines.BUSY, contestant(machines, "hanok", []))
    assert len(loops) == 2
    assert all(loop.returncode is not None for loop in loops)


def test_what_is_asked_is_compared_within_one_set_and_condition(machines: ModuleType) -> None:
    rows = {
        ("avx2", "hanok int8", "idle"): [{"prefill_per_s": 150.0, "decode_per_s": 10.0}],
        ("avx2", "llama.cpp Q8_0", "idle"): [{"prefill_per_s": 100.0, "decode_per_s": 10.0}],
        ("avx2", "hanok int8", "two busy loops"): [{"decode_per_s": 4.0}],
        ("avx2", "hanok int8", "quota of one CPU"): [{"decode_per_s": 5.0}],
        ("avx2", "hanok int8", "quota, one thread"): [{"decode_per_s": 8.0}],
    }
    ours = contestant(machines, "hanok", [], bytes_per_token=10**9)
    table = machines.demands_table(["avx2"], rows, [ours], gb_per_s=11.0)
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert found == [
        ["avx2, idle: prefill, int8 / Q8_0", "1.50", "≥ 1.5", "yes"],
        ["avx2, idle: decode, int8 / Q8_0", "1.00", "≥ 1.1", "no"],
        ["avx2: int8 beside two busy loops / idle", "0.400", "≥ 0.4", "yes"],
        ["avx2: int8, quota / one thread", "0.625", "≥ 0.9", "no"],
        ["avx2: int8, share of the memory's speed", "91%", "≥ 80%", "yes"],
    ]


def test_a_quick_run_fills_the_table(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "machines.py"), "--quick", "--engines", "hanok"]
    command += ["--sets", "avx2", "--conditions", "idle", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for row in ("avx2: hanok bf16", "avx2: hanok int8", "avx2: hanok int4"):
        assert row in done.stdout
