"""The places a plan may use: this machine's memory and disk, and devices that are described. No torch.

A rate is measured once and kept in a file: how fast all cores together read memory, and how fast the
disk under a file is read past the page cache. A device that is not there is described by its name and
what differs from its data sheet: "name=h100,memory=80GiB,bandwidth=3.3TB/s".
"""

import ctypes
import json
import mmap
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from hanok.checkpoint.writer import write_json
from hanok.errors import OptionError
from hanok.memory.budget import Budget, Limit, host_budget, parse_bytes, parse_rate
from hanok.memory.cpus import cpu_budget
from hanok.memory.plan import LoadPlan, Place

MEMORY_PROBE_BYTES = 2**29  # larger than most caches
MEMORY_PROBES = 4
MEMORY_PROBE_S = 0.5  # then no further one begins
DISK_BLOCK_BYTES = 2**24
DISK_PROBE_S = 0.5
DISK_READERS = 2
ASSUMED_DISK = 1e9  # bytes per second, if there is no file to measure with
ASSUMED_MEMORY = 30e9
GPU_CONTEXT_BYTES = 500 * 2**20  # what a process takes of a GPU before the first tensor
# Floating-point operations of one core and clock cycle, half of what its units could do at the best.
CYCLE_FLOPS = {"avx512f": 32, "avx2": 16, "asimd": 8}
ASSUMED_CLOCK = 2.5e9


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSheet:
    """What a maker says of a device."""

    memory: str
    bandwidth: str
    teraflops: float
    """Dense, in bfloat16 or float16."""


DATA_SHEETS: Mapping[str, DataSheet] = {
    "t4": DataSheet(memory="16GiB", bandwidth="320GB/s", teraflops=65),
    "v100": DataSheet(memory="32GiB", bandwidth="900GB/s", teraflops=125),
    "a10g": DataSheet(memory="24GiB", bandwidth="600GB/s", teraflops=70),
    "l4": DataSheet(memory="24GiB", bandwidth="300GB/s", teraflops=121),
    "rtx4080": DataSheet(memory="16GiB", bandwidth="717GB/s", teraflops=97),
    "rtx4090": DataSheet(memory="24GiB", bandwidth="1008GB/s", teraflops=165),
    "a100": DataSheet(memory="80GiB", bandwidth="2.0TB/s", teraflops=312),
    "h100": DataSheet(memory="80GiB", bandwidth="3.35TB/s", teraflops=989),
    "h200": DataSheet(memory="141GB", bandwidth="4.8TB/s", teraflops=989),
    "b200": DataSheet(memory="180GB", bandwidth="7.7TB/s", teraflops=2250),
}


class Rates:
    """Measured rates, kept in a file so that each is measured once.

    Where measuring would take too long, `may_measure` false assumes what is not known.
    """

    def __init__(self, file: Path | None, *, may_measure: bool = True) -> None:
        self._file = file
        self._may_measure = may_measure
        self._known: dict[str, float] = {}
        if file is not None and file.is_file():
            try:
                found = json.loads(file.read_text())
            except ValueError:
                found = {}
            if isinstance(found, dict):
                self._known = {key: float(value) for key, value in found.items()}

    def get(self, key: str, measure: Callable[[], float], assumed: float) -> tuple[float, str]:
        """Return the rate and where it is from; what cannot be kept is measured again."""
        if key not in self._known:
            if not self._may_measure:
                return assumed, "assumed"
            self._known[key] = measure()
            if self._file is not None:
                try:
                    self._file.parent.mkdir(parents=True, exist_ok=True)
                    write_json(self._file, self._known)
                except OSError:
                    self._file = None
        return self._known[key], "measured"


def host_place(allowed: int | None, rates: Rates) -> Place:
    """Return this machine's memory."""
    cpus = cpu_budget()
    key = f"memory of {cpu_name()}, {cpus.threads} cores"
    rate, source = rates.get(key, memory_bytes_per_s, ASSUMED_MEMORY)
    # A quota of less than one CPU: its thread stands still for the rest of each period. What is
    # measured is its rate while it runs.
    rate *= min(1.0, cpus.cpus)
    return Place(
        name="cpu",
        kind="cpu",
        budget=host_budget(allowed),
        bytes_per_s=rate,
        flops_per_s=_cpu_flops_per_s(min(cpus.threads, cpus.cpus)),
        rate_source=f"{rate / 1e9:.1f} GB/s {source}",
        cpus=cpus,
        is_host=True,
    )


def core_places(allowed: Mapping[str, int], rates: Rates) -> list[Place]:
    """Return the cores that `allowed` names ("core:0") as devices of their own.

    Each has its share of the machine's memory and of the rate at which all cores read it.
    """
    host, cpus = host_place(None, rates), cpu_budget()
    # Cores that are more than the CPU quota allows wait for each other.
    parts = max(cpus.threads, len(allowed))
    found: list[Place] = []
    for name, size in sorted(allowed.items(), key=lambda item: int(item[0].partition(":")[2])):
        if int(name.partition(":")[2]) not in cpus.cores:
            listed = ", ".join(f"core:{core}" for core in cpus.cores)
            raise OptionError(f"{name} is not a core that this process may use. Cores: {listed}.")
        share = [
            Limit(num_bytes=limit.num_bytes // len(allowed), source=f"a share of: {limit.source}")
            for limit in (host.budget.limits if host.budget else ())
        ]
        limits = (Limit(num_bytes=size, source="max_memory"), *share)
        found.append(
            replace(
                host,
                name=name,
                kind="core",
                budget=Budget(device=name, limits=limits),
                bytes_per_s=host.bytes_per_s / parts,
                flops_per_s=host.flops_per_s / parts,
                is_host=not found,
            )
        )
    return found


def disk_place(file: Path | None, rates: Rates) -> Place:
    """Return the disk that holds `file`; None: one of which nothing is known."""
    rate, source = ASSUMED_DISK, "assumed"
    if file is not None:
        key = f"disk {file.stat().st_dev}"
        rate, source = rates.get(key, lambda: disk_bytes_per_s(file), ASSUMED_DISK)
    return Place(
        name="disk",
        kind="disk",
        budget=None,
        bytes_per_s=rate,
        flops_per_s=1.0,
        rate_source=f"{rate / 1e9:.1f} GB/s {source}",
    )


def described_place(text: str, index: int, allowed: int | None) -> Place:
    """Return a GPU that may not be here: "name=h100[,memory=80GiB][,bandwidth=3.3TB/s][,tflops=989]"."""
    given: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not equals or key.strip() not in ("name", "memory", "bandwidth", "tflops"):
            raise OptionError(
                f"--device {text!r}: {item!r} is none of name=…, memory=…, bandwidth=…, tflops=…. "
                "Write for example name=h100,memory=80GiB,bandwidth=3.3TB/s."
            )
        given[key.strip()] = value.strip()
    name = given.get("name", "")
    sheet = DATA_SHEETS.get(name.lower())
    if sheet is None and not {"memory", "bandwidth"} <= given.keys():
        raise OptionError(
            f"--device {text!r}: {name or 'it'} is not known, so its memory and bandwidth are needed. "
            f"Known: {', '.join(DATA_SHEETS)}."
        )
    memory = parse_bytes(given.get("memory") or (sheet.memory if sheet else ""))
    rate = parse_rate(given.get("bandwidth") or (sheet.bandwidth if sheet else ""))
    tflops = float(given["tflops"]) if "tflops" in given else (sheet.teraflops if sheet else 0.0)
    limits = [Limit(num_bytes=memory, source=f"{name or 'device'}, as described")]
    if allowed is not None:
        limits.append(Limit(num_bytes=allowed, source="max_memory"))
    return Place(
        name=str(index),
        kind="gpu",
        budget=Budget(device=str(index), limits=tuple(limits)),
        bytes_per_s=rate,
        # Without a figure: what usually goes with such a memory, 200 operations for each byte.
        flops_per_s=tflops * 1e12 or 200 * rate,
        rate_source=f"{rate / 1e9:,.0f} GB/s described",
        runtime_bytes=GPU_CONTEXT_BYTES,
    )


def with_work(place: Place, activation_bytes: int, runtime_bytes: int = 0) -> Place:
    """Return the place with what a use of the model holds there besides weights and cache."""
    if place.kind == "disk":
        return place
    runtime = place.runtime_bytes + (runtime_bytes if place.is_host else 0)
    activations = max(place.activation_bytes, activation_bytes)
    return replace(place, activation_bytes=activations, runtime_bytes=runtime)


def with_draft(place: Place, plan: LoadPlan) -> Place:
    """Return the place with what a model that drafts takes of it; the two compute in turn."""
    tier = next((tier for tier in plan.tiers if tier.place.name == place.name), None)
    if tier is None or place.kind == "disk":
        return place
    return replace(
        place,
        draft_bytes=tier.steady_bytes - tier.place.held_bytes,
        activation_bytes=tier.place.activation_bytes,
    )


def memory_bytes_per_s() -> float:
    """Return the best rate at which all cores together read memory: the C library looks for a byte."""
    search = ctypes.CDLL(None).memchr
    search.restype = ctypes.c_void_p
    search.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    cores = cpu_budget().threads
    memory = mmap.mmap(-1, MEMORY_PROBE_BYTES)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(start, 1, MEMORY_PROBE_BYTES)
    part = MEMORY_PROBE_BYTES // cores
    best = 0.0
    ends = time.perf_counter() + MEMORY_PROBE_S
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(MEMORY_PROBES):
            began = time.perf_counter()
            if best and began > ends:
                break
            list(pool.map(lambda core: search(start + core * part, 0, part), range(cores)))
            best = max(best, cores * part / (time.perf_counter() - began))
    return best


def disk_bytes_per_s(file: Path) -> float:
    """Return the rate at which a file is read, past the page cache where that can be."""
    descriptor = _open_past_cache(file)
    size = max(DISK_BLOCK_BYTES, os.fstat(descriptor).st_size)
    began = time.perf_counter()
    ends = began + DISK_PROBE_S

    def read(reader: int) -> int:
        # Each reads its own part of the file from its start on, and stops when the time is over.
        buffer = mmap.mmap(-1, DISK_BLOCK_BYTES)
        place = size // DISK_READERS * reader // mmap.PAGESIZE * mmap.PAGESIZE
        total = 0
        while time.perf_counter() < ends and total < size // DISK_READERS:
            count = os.preadv(descriptor, [buffer], place + total)
            if count <= 0 or count % mmap.PAGESIZE:
                return total + max(0, count)
            total += count
        return total

    try:
        with ThreadPoolExecutor(DISK_READERS) as pool:
            total = sum(pool.map(read, range(DISK_READERS)))
        return max(total, 1) / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def _open_past_cache(file: Path) -> int:
    """Open a file for reads that its file system's cache has no part in, where it allows them."""
    if not hasattr(os, "O_DIRECT"):
        return os.open(file, os.O_RDONLY)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(file, os.O_RDONLY)
    try:
        os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
    except OSError:
        os.close(descriptor)
        return os.open(file, os.O_RDONLY)
    return descriptor


def _cpu_info() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """Return what the processor calls itself."""
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _cpu_flops_per_s(cores: float) -> float:
    """Return an estimate of float32 operations per second from what the processor says of itself."""
    info = _cpu_info()
    features = re.split(r"\s+", info.get("flags", "") or info.get("Features", ""))
    each = next((flops for name, flops in CYCLE_FLOPS.items() if name in features), 4)
    clock = float(info.get("cpu MHz", 0)) * 1e6 or ASSUMED_CLOCK
    return cores * each * clock
