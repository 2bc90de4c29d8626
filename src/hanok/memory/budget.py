"""What memory a place may really use: what the user allows, what this machine has free, and why.

The host's budget is the least of what `max_memory` says, what every memory cgroup above this process
leaves (versions 1 and 2), its resource limits, and what the system has available. Memory that the
kernel would give back before it kills (clean pages of files) counts as free, as in MemAvailable.
Swap never counts. Imports no torch.
"""

import os
import re
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hanok.errors import OptionError
from hanok.memory.cgroups import cgroups, read_fields, read_number

UNITS: Mapping[str, int] = {
    "B": 1,
    **{f"{prefix}B": 10**power for prefix, power in zip("KMGT", (3, 6, 9, 12), strict=True)},
    **{f"{prefix}iB": 2**power for prefix, power in zip("KMGT", (10, 20, 30, 40), strict=True)},
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
NO_LIMIT = 2**60  # cgroup v1 writes a huge number for "no limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Bytes that may still be claimed, and who says so."""

    num_bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one place may use: the least of its limits, which are listed with it."""

    device: str
    limits: tuple[Limit, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that may be claimed."""
        return max(0, self._least.num_bytes)

    @property
    def source(self) -> str:
        """What the least limit is."""
        return self._least.source

    @property
    def _least(self) -> Limit:
        return min(self.limits, key=_bytes_of)


def _bytes_of(limit: Limit) -> int:
    return limit.num_bytes


def parse_bytes(text: str | int) -> int:
    """Return the bytes of a size as people write it: "70GiB", "5.5GB", "7000MB", or a number of bytes.

    Raises OptionError for a size without a unit, or with one that may mean bits ("70Gb").
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise OptionError(f"{text} bytes of memory: a size is not negative.")
        return text
    match = SIZE.fullmatch(str(text).strip())
    unit = match[2] if match else ""
    if match is None or unit not in UNITS:
        raise OptionError(f"{text!r} is not a size. {_hint(match, unit)}")
    return round(float(match[1]) * UNITS[unit])


def _hint(match: "re.Match[str] | None", unit: str) -> str:
    examples = "Write for example 70GiB (2^30 bytes each), 5.5GB (10^9) or 7000MB (10^6)."
    if match is None:
        return examples
    if not unit:
        return f"Its unit is missing. {examples}"
    right = next((known for known in UNITS if known.lower() == unit.lower()), None)
    if right is not None and unit.endswith("b"):
        return f"{unit} may mean bits; for bytes write {match[1]}{right}."
    if right is not None:
        return f"Write {match[1]}{right}."
    return examples


def parse_rate(text: str) -> float:
    """Return bytes per second of a rate such as "3.3TB/s"."""
    size, slash, unit = text.partition("/")
    if not slash or unit.strip() != "s":
        raise OptionError(f"{text!r} is not a rate. Write for example 3.3TB/s.")
    return float(parse_bytes(size))


def parse_max_memory(given: str | Mapping[str | int, str | int]) -> dict[str, int]:
    """Return bytes by device of `max_memory`: "0=24GiB,cpu=16GiB", or a mapping like transformers'."""
    if isinstance(given, str):
        pairs: list[tuple[str | int, str | int]] = []
        for item in filter(None, (part.strip() for part in given.split(","))):
            name, equals, value = item.partition("=")
            if not equals:
                raise OptionError(
                    f"max_memory: {item!r} is not DEVICE=SIZE. Write for example 0=24GiB,cpu=16GiB."
                )
            pairs.append((name, value))
    else:
        pairs = list(given.items())
    found: dict[str, int] = {}
    for device, size in pairs:
        place = device_name(device)
        if place in found:
            raise OptionError(f"max_memory names {place} twice.")
        found[place] = parse_bytes(size)
    return found


def device_name(device: str | int) -> str:
    """Return how plans call a device: "0", "1", … for GPUs, "cpu", "disk", or a described one's name."""
    text = str(device).strip()
    if text.startswith("cuda"):
        return text.partition(":")[2] or "0"
    return "cpu" if text in ("cpu", "cpu:0") else text


def host_budget(allowed: int | None = None, root: Path = Path("/")) -> Budget:
    """Return what this process may claim of the host's memory; `allowed` is the user's own limit.

    `root` is where /proc and /sys are looked for.
    """
    limits = [] if allowed is None else [Limit(num_bytes=allowed, source="max_memory")]
    limits += [*_cgroup_limits(root), *_resource_limits(root), *_system_limit(root)]
    if not limits:
        limits.append(Limit(num_bytes=_physical_bytes(), source="memory of this machine"))
    return Budget(device="cpu", limits=tuple(limits))


def _system_limit(root: Path) -> Iterator[Limit]:
    info = read_fields(root / "proc/meminfo")
    if "MemAvailable" in info:
        yield Limit(num_bytes=info["MemAvailable"] * 1024, source="available on this machine")


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resource_limits(root: Path) -> Iterator[Limit]:
    """What RLIMIT_AS and RLIMIT_DATA leave of what is mapped already."""
    used = read_fields(root / "proc/self/status")
    for name, kind, field in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield Limit(num_bytes=limit - used.get(field, 0) * 1024, source=f"{name} (ulimit)")


def _cgroup_limits(root: Path) -> Iterator[Limit]:
    """What each memory cgroup from this process's own up to the root leaves."""
    for group in cgroups("memory", root):
        statistics = read_fields(group.folder / "memory.stat")
        if group.version == 2:
            used = read_number(group.folder / "memory.current")
            files: tuple[str, ...] = ("memory.max", "memory.high")
            keys: tuple[str, ...] = ("inactive_file", "active_file", "slab_reclaimable")
        else:
            used = read_number(group.folder / "memory.usage_in_bytes")
            files = ("memory.limit_in_bytes",)
            keys = ("total_inactive_file", "total_active_file")
        reclaimable = sum(statistics.get(key, 0) for key in keys)
        for file in files:
            limit = read_number(group.folder / file)
            if limit is not None and limit < NO_LIMIT and used is not None:
                free = limit - max(0, used - reclaimable)
                source = f"cgroup {group.name}: {file} {limit / 2**30:.2f} GiB"
                yield Limit(num_bytes=free, source=source)
