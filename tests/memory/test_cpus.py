"""How many threads compute: limits in a made-up /proc and /sys, and in a cgroup with a CPU quota."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hanok
from hanok.errors import OptionError
from hanok.memory import places, threads
from hanok.memory.cpus import CpuBudget, CpuQuota, cpu_budget, num_physical_cores
from hanok.memory.places import Rates, core_places, host_place, memory_bytes_per_s
from hanok.memory.threads import set_threads

CGROUPS = Path("/sys/fs/cgroup")
V2 = "30 23 0:26 / /cg rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "31 23 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with eight cores, of which this process may use the first four."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 2, 1, 0}, raising=False)
    return tmp_path


def test_without_a_quota_there_is_a_thread_for_each_core_that_may_be_used(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cpu_budget(machine)
    assert (found.threads, found.cores, found.quota) == (4, (0, 1, 2, 3), None)
    assert found.reason == "limited by the affinity mask (8 cores are there)"
    monkeypatch.delattr(os, "sched_getaffinity")
    found = cpu_budget(machine)
    assert (found.threads, found.reason) == (8, "one for each core")


@pytest.mark.parametrize(
    ("inner", "threads", "cpus"),
    [
        ("max 100000", 3, 3.5),
        ("150000 100000", 1, 1.5),
        ("20000 10000", 2, 2.0),
        ("50000 100000", 1, 0.5),
        ("999000 100000", 3, 3.5),
    ],
)
def test_every_group_above_the_process_counts(
    machine: Path, inner: str, threads: int, cpus: float
) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "proc/self/mountinfo": V2,
            "cg/outer/cpu.max": "350000 100000\n",
            "cg/outer/inner/cpu.max": f"{inner}\n",
            "cg/outer/other/cpu.max": "1000 100000\n",
        },
    )
    found = cpu_budget(machine)
    assert (found.threads, found.cpus) == (threads, cpus)
    group = "/outer" if cpus == 3.5 else "/outer/inner"
    limit = f"limited by cgroup {group}: cpu.max {cpus:.2f} CPUs (4 cores may be used)"
    assert found.reason == limit


def test_a_quota_of_all_the_cores_is_none(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2,
            "cg/cpu.max": "400000 100000\n",
        },
    )
    found = cpu_budget(machine)
    assert (found.threads, found.quota) == (4, None)
    assert "affinity" in found.reason


@pytest.mark.parametrize(
    ("mounted", "own"), [("/", "docker/abc/"), ("/docker/abc", ""), ("/docker", "abc/")]
)
def test_the_first_version_in_its_own_tree_or_as_a_container_sees_it(
    machine: Path, mounted: str, own: str
) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n0::/\n",
            "proc/self/mountinfo": "35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory\n"
            f"31 23 0:29 {mounted} /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
            "41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n",
            "cg/cpu/cpu.cfs_quota_us": "-1\n",
            "cg/cpu/cpu.cfs_period_us": "100000\n",
            f"cg/cpu/{own}cpu.cfs_quota_us": "250000\n",
            f"cg/cpu/{own}cpu.cfs_period_us": "100000\n",
        },
    )
    found = cpu_budget(machine)
    assert found.threads == 2
    assert found.quota == CpuQuota(
        cpus=2.5, source="cgroup /docker/abc: cpu.cfs_quota_us 2.50 CPUs"
    )


def test_a_container_that_names_groups_otherwise_is_limited_by_what_is_mounted(
    machine: Path,
) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/../../elsewhere\n",
            "proc/self/mountinfo": V2,
            "cg/cpu.max": "100000 100000\n",
        },
    )
    assert cpu_budget(machine).threads == 1


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "\n0\n0:\nnonsense\n"},
        {"proc/self/cgroup": "3:cpuset:/\n"},
        {"proc/self/mountinfo": "\n - \n30 23 0:26 / /cg rw\n30 / - cgroup2\n"},
        {"cg/cpu.max": ""},
        {"cg/cpu.max": "100000\n"},
        {"cg/cpu.max": "100000 0\n"},
        {"cg/cpu.max": "0 100000\n"},
        {"cg/cpu.max": "-1 100000\n"},
        {"cg/cpu.max": "much more than this\n"},
        {"cg/cpu.max": "1e3 ²\n"},
    ],
)
def test_what_cannot_be_read_limits_nothing(machine: Path, files: dict[str, str]) -> None:
    limited = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2,
        "cg/cpu.max": "100000 100000\n",
    }
    write(machine, limited)
    assert cpu_budget(machine).threads == 1
    write(machine, {**limited, **files})
    assert cpu_budget(machine).threads == 4


@pytest.mark.parametrize("name", ["cpu.cfs_quota_us", "cpu.cfs_period_us"])
@pytest.mark.parametrize("text", ["", "x\n", "0\n", None])
def test_half_a_quota_of_the_first_version_limits_nothing(
    machine: Path, name: str, text: str | None
) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "proc/self/mountinfo": V1,
            "cg/cpu/cpu.cfs_quota_us": "100000\n",
            "cg/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cpu_budget(machine).threads == 1
    file = machine / "cg/cpu" / name
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert cpu_budget(machine).threads == 4


def test_a_file_of_bytes_that_are_no_text_limits_nothing(machine: Path) -> None:
    write(machine, {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, "cg/cpu.max": ""})
    (machine / "cg/cpu.max").write_bytes(b"\xff\xfe 100000\n")
    assert cpu_budget(machine).threads == 4


def test_hardware_threads_of_one_core_are_one_core(tmp_path: Path) -> None:
    assert num_physical_cores((0, 1, 2, 3), tmp_path) == 4
    folder = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    pairs = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    write(tmp_path, {folder.format(core): f"{text}\n" for core, text in pairs.items()})
    assert num_physical_cores((0, 1, 2, 3), tmp_path) == 2
    assert num_physical_cores((0, 2), tmp_path) == 1
    assert num_physical_cores((0, 1), tmp_path) == 2


def budget(cpus: float | None, num_cores: int = 4) -> CpuBudget:
    """`num_cores` cores, and a quota."""
    quotas = () if cpus is None else (CpuQuota(cpus=cpus, source="the test"),)
    return CpuBudget(cores=tuple(range(num_cores)), num_machine_cores=num_cores, quotas=quotas)


@pytest.mark.parametrize(
    ("own", "quota", "expected", "reason"),
    [
        (4, 1.5, 1, "limited by the test (4 cores may be used)"),
        (4, 3.0, 3, "limited by the test (4 cores may be used)"),
        (4, None, 4, "one for each core"),
        (4, 8.0, 4, "one for each core"),
        # A thread for each physical core, of which there are two.
        (2, 1.0, 1, "limited by the test (4 cores may be used)"),
        (2, 3.0, 2, "one for each physical core (4 hardware threads may be used)"),
        # What the user chose, more or less than allowed.
        (3, 1.0, 3, "as OMP_NUM_THREADS or torch.set_num_threads says"),
        (1, 3.0, 1, "as OMP_NUM_THREADS or torch.set_num_threads says"),
        (5, 3.0, 5, "as OMP_NUM_THREADS or torch.set_num_threads says"),
    ],
)
def test_torchs_own_number_follows_the_quota_and_a_chosen_one_stays(
    own: int,
    quota: float | None,
    expected: int,
    reason: str,
    with_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "cpu_budget", lambda: budget(quota))
    monkeypatch.setattr(threads, "num_physical_cores", lambda cores: len(cores) // 2)
    with_threads(own)
    for _ in range(2):  # a second load says the same
        found = set_threads()
        assert torch.get_num_threads() == found.count == expected
        assert str(found) == f"{expected}, {reason}"
        assert found.is_held_by_quota is ("limited" in reason)
    with_threads(own)
    notes = [note for note in hanok.load(hanok.BUNDLED).notes if note.startswith("threads")]
    assert notes == ([f"threads: {found}"] if found.is_held_by_quota else [])


def test_what_is_asked_for_is_done(
    with_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cpu_budget", lambda: budget(1.0, num_cores=2))
    with_threads(1)
    assert set_threads(2).count == torch.get_num_threads() == 2
    with_threads(1)
    model = hanok.load(hanok.BUNDLED, threads=2)
    assert torch.get_num_threads() == 2
    assert not [note for note in model.notes if note.startswith("threads")]
    with pytest.raises(OptionError, match="threads is 0; it must be at least 1"):
        set_threads(0)


def test_a_plan_estimates_with_what_the_quota_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(None, may_measure=False)

    def host(cpus: float | None) -> Any:
        monkeypatch.setattr(places, "cpu_budget", lambda: budget(cpus))
        return host_place(None, rates)

    free, two, half = host(None), host(2.9), host(0.5)
    assert two.flops_per_s == pytest.approx(free.flops_per_s / 2)
    assert half.flops_per_s == pytest.approx(free.flops_per_s / 8)
    assert half.bytes_per_s == free.bytes_per_s / 2 == two.bytes_per_s / 2
    assert [place.cpus.threads for place in (free, two, half)] == [4, 2, 1]

    one = host(1.0)
    alone = core_places({"core:3": 2**30}, rates)
    shared = core_places({"core:0": 2**30, "core:3": 2**30}, rates)
    assert [place.bytes_per_s for place in alone] == [one.bytes_per_s]
    assert [place.bytes_per_s for place in shared] == [one.bytes_per_s / 2] * 2
    assert [place.flops_per_s for place in shared] == [one.flops_per_s / 2] * 2
    monkeypatch.setattr(places, "cpu_budget", lambda: budget(None))
    assert core_places({"core:3": 2**30}, rates)[0].bytes_per_s == free.bytes_per_s / 4


def test_memory_is_read_with_as_many_threads_as_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Pool(places.ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            asked.append(count)
            super().__init__(count)

    monkeypatch.setattr(places, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(places, "MEMORY_PROBE_BYTES", 2**20)
    monkeypatch.setattr(places, "cpu_budget", lambda: budget(2.5))
    assert memory_bytes_per_s() > 0
    assert asked == [2]


# In a cgroup of one CPU


@pytest.fixture(scope="module")
def tasks() -> Iterator[Path]:
    """The file by which a process joins a cgroup with a quota of one CPU."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core, which a quota of one CPU does not limit")
    is_old = (CGROUPS / "cpu").is_dir()
    folder = (CGROUPS / "cpu" if is_old else CGROUPS) / f"hanok-tests-cpus-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no CPU cgroup can be made here: {error}")
    try:
        try:
            if is_old:
                (folder / "cpu.cfs_period_us").write_text("100000")
                (folder / "cpu.cfs_quota_us").write_text("100000")
            else:
                (folder / "cpu.max").write_text("100000 100000")
        except OSError as error:
            pytest.skip(f"no CPU cgroup can be limited here: {error}")
        yield folder / ("tasks" if is_old else "cgroup.procs")
    finally:
        folder.rmdir()


def run(
    tasks: Path | None, *arguments: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run Python with its own number of threads, in the cgroup or outside of it."""
    command = [sys.executable, "-W", "error", *arguments]
    if tasks is not None:
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(tasks), *command]
    unset = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return done


CODE = """
import json
from concurrent.futures import ThreadPoolExecutor
import torch
import hanok
from hanok.bench.worker import Worker

def in_threads():
    with ThreadPoolExecutor(1) as pool:
        return [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()]

found = {"own": in_threads()}
model = hanok.load(hanok.BUNDLED)
found["tokens"] = model.generate("Once upon a time", max_new_tokens=8).token_ids
found["loaded"] = in_threads()
found["notes"] = [note for note in model.notes if note.startswith("threads")]
hanok.load(hanok.BUNDLED, threads=2)
found["asked"] = in_threads()
load = {"path": str(hanok.BUNDLED), "draft": str(hanok.BUNDLED)}
Worker().load(options={}, **load)
found["worker"] = in_threads()
Worker().load(options={"threads": 2}, **load)
found["worker asked"] = in_threads()
print(json.dumps(found))
"""


def test_a_process_computes_within_its_quota(tasks: Path) -> None:
    free, bound = (json.loads(run(where, "-c", CODE).stdout) for where in (None, tasks))
    assert bound["tokens"] == free["tokens"]
    assert bound["own"] == free["own"]
    assert bound["loaded"] == bound["worker"] == [1, 1]
    assert bound["asked"] == bound["worker asked"] == [2, 2]
    (note,) = bound["notes"]
    assert note.startswith(f"threads: 1, limited by cgroup /{tasks.parent.name}: cpu.")


def test_the_command_line_says_what_limits(tasks: Path, tmp_path: Path) -> None:
    limit = f"limited by cgroup /{tasks.parent.name}: cpu."
    prompt = ("Once upon a time", "--max-new-tokens", "8")
    free, bound = (run(where, "-m", "hanok", "generate", *prompt) for where in (None, tasks))
    assert bound.stdout == free.stdout
    assert f"threads: 1, {limit}" in bound.stderr
    asked = run(tasks, "-m", "hanok", "generate", *prompt, "--threads", "2")
    assert asked.stdout == free.stdout
    assert "threads:" not in asked.stderr
    machine = json.loads(run(tasks, "-m", "hanok", "info", "--json").stdout)["machine"]
    assert machine["threads"].startswith(f"1, {limit}")
    assert machine["cpu"].endswith(", 1 threads")
    shown = run(tasks, "-m", "hanok", "plan", "--cache-folder", str(tmp_path)).stdout
    assert f"CPU: 1 thread, {limit}" in shown
    planned = run(tasks, "-m", "hanok", "plan", "--json", "--cache-folder", str(tmp_path)).stdout
    assert json.loads(planned)["places"][0]["threads"] == 1
