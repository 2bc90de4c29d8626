"""What a figure depends on besides the model: this machine, its speed, and who else uses it."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from hanok.bench.bandwidth import gflop_per_s, product_probes, read_gb_per_s, read_probe
from hanok.bench.report import Probe
from hanok.kernels.native import native, why_not
from hanok.kernels.processor import has_bfloat16_instructions
from hanok.package import __version__

STAT = Path("/proc/stat")
STATUS = Path("/proc/self/status")
# Of one round's probe, which a round must not wait for: a read larger than most caches, and the side of
# a matrix, eight times as long on a GPU.
READ_BYTES, PRODUCT_SIDE = 2**27, 768
TRIES = 3


def machine_facts() -> dict[str, str]:
    """Return the processor, what its cores can do, memory and GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kernels = native()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "hanok's kernels": f"built, using {kernels.instruction_set}" if kernels else str(why_not()),
        "bfloat16 instructions": "yes"
        if has_bfloat16_instructions()
        else "no: many tokens are computed in float32, weights widened block by block",
        "memory": f"{memory / 2**30:.1f} GiB",
        "gpus": ", ".join(gpus) or "none",
    }


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    return {"hanok": __version__, "python": platform.python_version(), "torch": version("torch")}


def cpu_name() -> str:
    """Return what the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


class MachineProbe:
    """Measures what a device can do by torch alone: reading memory, and one product of matrices.

    Each measurement is bounded in time (`engine.bandwidth`); all rounds make calls of the same size.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        side = PRODUCT_SIDE if device.type == "cpu" else 8 * PRODUCT_SIDE
        self._reading = read_probe(device, READ_BYTES)
        self._products = product_probes(device, torch.bfloat16, side)

    def best(self) -> Probe:
        """Return what it can do at the best, with more than caches hold; a round may not wait for it."""
        return Probe(
            gb_per_s=read_gb_per_s(self._device),
            gflop_per_s=gflop_per_s(self._device, torch.bfloat16),
        )

    def measure(self) -> Probe:
        """Return the best of a few tries."""
        return Probe(
            gb_per_s=self._reading.best_per_s(TRIES) / 1e9,
            gflop_per_s=max(probe.best_per_s(TRIES) for probe in self._products) / 1e9,
        )


class ForeignLoad:
    """How many cores other programs use from now on."""

    def __init__(self) -> None:
        self._wall, self._own, self._all = time.perf_counter(), time.process_time(), _busy_s()

    def cores(self) -> float | None:
        """Return it; None where the system does not say."""
        now = _busy_s()
        if now is None or self._all is None:
            return None
        foreign = (now - self._all) - (time.process_time() - self._own)
        # The system counts in ticks of some milliseconds.
        return max(0.0, foreign / max(0.05, time.perf_counter() - self._wall))


def _busy_s() -> float | None:
    """Return the CPU seconds that everything has used, those stolen from a virtual machine included."""
    try:
        values = STAT.read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, stolen = map(int, values)
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def peak_bytes() -> int:
    """Return the most memory that this process has held at once, shared libraries and files included.

    The kernel's count for this program alone: getrusage's begins with what its parent held. 0 where
    there is none.
    """
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
