"""What a process may use: sizes as people write them, and limits in a made-up /proc and /sys."""

import resource
from pathlib import Path
from typing import Any

import pytest

from hanok.errors import OptionError
from hanok.memory.budget import host_budget, parse_bytes, parse_max_memory, parse_rate

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("70GiB", 70 * GIB),
        ("5.5GB", 5_500_000_000),
        ("7000MB", 7_000_000_000),
        ("1 KiB", 1024),
        (" 2TiB ", 2**41),
        ("12B", 12),
        (7000, 7000),
    ],
)
def test_sizes_as_people_write_them(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("70Gb", "Gb may mean bits; for bytes write 70GB"),
        ("70gib", "gib may mean bits; for bytes write 70GiB"),
        ("70GIB", "Write 70GiB"),
        ("7000", "Its unit is missing"),
        ("70G", "Write for example 70GiB"),
        ("much", "Write for example 70GiB"),
        (-1, "not negative"),
    ],
)
def test_what_is_no_size_says_what_to_write(text: str | int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_bytes(text)


def test_rates() -> None:
    assert parse_rate("3.3TB/s") == 3.3e12
    for text in ("3.3TB", "3.3TB/h"):
        with pytest.raises(OptionError, match="is not a rate"):
            parse_rate(text)


def test_limits_by_device_in_either_form() -> None:
    expected = {"0": 24 * GIB, "cpu": 16 * GIB}
    assert parse_max_memory("0=24GiB, cpu=16GiB") == expected
    assert parse_max_memory({0: "24GiB", "cpu": "16GiB"}) == expected
    assert parse_max_memory({"cuda:0": "24GiB", "cpu": 16 * GIB}) == expected
    given: dict[str | int, str | int] = {0: "1GiB"}
    parse_max_memory(given)
    assert given == {0: "1GiB"}
    with pytest.raises(OptionError, match="'24GiB' is not DEVICE=SIZE"):
        parse_max_memory("24GiB")
    with pytest.raises(OptionError, match="names 0 twice"):
        parse_max_memory({0: "1GiB", "cuda:0": "1GiB"})


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 10 GiB available and no limits."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {10 * GIB // 1024} kB\n",
            "proc/self/status": f"VmSize:\t{GIB // 1024} kB\nVmData:\t{GIB // 2048} kB\n",
        },
    )
    return tmp_path


def test_without_limits_it_is_what_the_system_has_available(machine: Path) -> None:
    budget = host_budget(root=machine)
    assert (budget.num_bytes, budget.source) == (10 * GIB, "available on this machine")
    allowed = host_budget(3 * GIB, root=machine)
    assert (allowed.num_bytes, allowed.source) == (3 * GIB, "max_memory")
    # More than there is does not become more by being allowed.
    assert host_budget(30 * GIB, root=machine).num_bytes == 10 * GIB


def test_every_group_above_the_process_counts_and_clean_pages_are_free(machine: Path) -> None:
    cgroup = "sys/fs/cgroup"
    write(
        machine,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "proc/self/mountinfo": f"30 23 0:26 / /{cgroup} rw,nosuid - cgroup2 cgroup2 rw\n",
            f"{cgroup}/memory.stat": "inactive_file 0\n",
            f"{cgroup}/outer/memory.max": f"{4 * GIB}\n",
            f"{cgroup}/outer/memory.high": "max\n",
            f"{cgroup}/outer/memory.current": f"{3 * GIB}\n",
            f"{cgroup}/outer/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
            f"{cgroup}/outer/inner/memory.max": "max\n",
            f"{cgroup}/outer/inner/memory.high": f"{6 * GIB}\n",
            f"{cgroup}/outer/inner/memory.current": f"{GIB}\n",
        },
    )
    budget = host_budget(root=machine)
    assert budget.num_bytes == 4 * GIB - (3 * GIB - GIB - GIB // 2)
    assert budget.source == "cgroup /outer: memory.max 4.00 GiB"
    assert {(limit.source, limit.num_bytes) for limit in budget.limits} == {
        ("available on this machine", 10 * GIB),
        ("cgroup /outer: memory.max 4.00 GiB", int(2.5 * GIB)),
        ("cgroup /outer/inner: memory.high 6.00 GiB", 5 * GIB),
    }


def test_a_group_that_is_over_its_limit_leaves_nothing(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": "30 23 0:26 / /cg rw - cgroup2 cgroup2 rw\n",
            "cg/memory.max": f"{GIB}\n",
            "cg/memory.current": f"{2 * GIB}\n",
        },
    )
    assert host_budget(root=machine).num_bytes == 0


@pytest.mark.parametrize("mounted", ["/", "/docker/abc"])
def test_the_first_version_in_its_own_tree_or_as_a_container_sees_it(
    machine: Path, mounted: str
) -> None:
    own = "" if mounted != "/" else "docker/abc/"
    write(
        machine,
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n0::/\n",
            "proc/self/mountinfo": "31 23 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu\n"
            f"35 31 0:32 {mounted} /cg/memory rw - cgroup cgroup rw,memory\n",
            "cg/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "cg/memory/memory.usage_in_bytes": "77\n",
            f"cg/memory/{own}memory.limit_in_bytes": f"{2 * GIB}\n",
            f"cg/memory/{own}memory.usage_in_bytes": f"{GIB}\n",
            f"cg/memory/{own}memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}\n",
        },
    )
    budget = host_budget(root=machine)
    assert budget.num_bytes == 3 * GIB // 2
    assert "memory.limit_in_bytes 2.00 GiB" in budget.source


def test_resource_limits_less_what_is_mapped(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[int, Any] = {
        resource.RLIMIT_AS: 5 * GIB,
        resource.RLIMIT_DATA: resource.RLIM_INFINITY,
    }
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    assert host_budget(root=machine).num_bytes == 4 * GIB
    limits[resource.RLIMIT_DATA] = 2 * GIB
    budget = host_budget(root=machine)
    assert (budget.num_bytes, budget.source) == (3 * GIB // 2, "RLIMIT_DATA (ulimit)")
