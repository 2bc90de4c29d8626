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
from pathlib import Path, PurePosixPath

from hanok.errors import OptionError

UNITS: Mapping[str, int] = {
    "B": 1,
    **{f"{prefix}B": 10**power for prefix, power in zip("KMGT", (3, 6, 9, 12), strict=True)},
    **{f"{prefix}iB": 2**power for prefix, power in zip("KMGT", (10, 20, 30, 40), strict=True)},
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
NO_LIMIT = 2**60  # cgroup v1 writes a huge number where there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Bytes that may still be claimed, and who says so."""

    num_bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one place may use: the least of its limits, which stand beside it."""

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
    info = _fields(root / "proc/meminfo")
    if "MemAvailable" in info:
        yield Limit(num_bytes=info["MemAvailable"] * 1024, source="available on this machine")


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resource_limits(root: Path) -> Iterator[Limit]:
    """What RLIMIT_AS and RLIMIT_DATA leave of what is mapped already."""
    used = _fields(root / "proc/self/status")
    for name, kind, field in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield Limit(num_bytes=limit - used.get(field, 0) * 1024, source=f"{name} (ulimit)")


def _cgroup_limits(root: Path) -> Iterator[Limit]:
    """What each memory cgroup from this process's own up to the root leaves."""
    for folder, top, version in _cgroup_folders(root):
        for place in (folder, *folder.parents):
            yield from _limits_of(place, top, version)
            if place == top:
                break


def _limits_of(folder: Path, top: Path, version: int) -> Iterator[Limit]:
    name = f"/{folder.relative_to(top)}".replace("/.", "/")
    statistics = _fields(folder / "memory.stat")
    if version == 2:
        used = _number(folder / "memory.current")
        limits = {file: _number(folder / file) for file in ("memory.max", "memory.high")}
        keys: tuple[str, ...] = ("inactive_file", "active_file", "slab_reclaimable")
    else:
        used = _number(folder / "memory.usage_in_bytes")
        limits = {"memory.limit_in_bytes": _number(folder / "memory.limit_in_bytes")}
        keys = ("total_inactive_file", "total_active_file")
    reclaimable = sum(statistics.get(key, 0) for key in keys)
    for file, limit in limits.items():
        if limit is not None and limit < NO_LIMIT and used is not None:
            free = limit - max(0, used - reclaimable)
            yield Limit(num_bytes=free, source=f"cgroup {name}: {file} {limit / 2**30:.2f} GiB")


def _cgroup_folders(root: Path) -> Iterator[tuple[Path, Path, int]]:
    """Yield this process's folder, the top of what is mounted, and the version, for each hierarchy."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mounted, target = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        version = 2 if kind == "cgroup2" else 1
        is_memory = version == 2 or (kind == "cgroup" and "memory" in options.split(","))
        if kind not in ("cgroup", "cgroup2") or not is_memory or version not in paths:
            continue
        top = root / target.lstrip("/")
        own = PurePosixPath(paths[version])
        # In a container only a part of the tree may be mounted, and names may be of another one.
        inner = own.relative_to(mounted) if own.is_relative_to(mounted) else PurePosixPath()
        folder = top / inner
        yield (folder if folder.is_dir() else top), top, version


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _fields(file: Path) -> dict[str, int]:
    """Return the numbers of lines such as "MemAvailable:  100 kB" or "inactive_file 100"."""
    found = {}
    for line in _lines(file):
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found


def _number(file: Path) -> int | None:
    """Return the number in a file; None where there is no such file, or it says "max"."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None
