"""What a figure depends on beside the model: this machine, what it could do, and who else uses it."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from hanok import __version__
from hanok.bench.report import Probe
from hanok.engine.bandwidth import gflop_per_s, read_gb_per_s
from hanok.kernels.native import native, why_not
from hanok.models.linear import has_bfloat16_instructions

STAT = Path("/proc/stat")
STATUS = Path("/proc/self/status")
READ_BYTES = 2**27  # of a probe, larger than most caches; a round must not wait for it
PRODUCT_SIZE = 768
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
    """Measures what a device can do by torch alone: reading memory, and one product of matrices."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = self._device.type != "cpu"
        size = PRODUCT_SIZE * 8 if on_gpu else PRODUCT_SIZE
        # What many tokens are multiplied in: float32 on CPUs without bfloat16 instructions.
        kinds = (torch.float32, torch.bfloat16)
        self._values = torch.ones(READ_BYTES // 4, device=self._device)
        self._matrices = [torch.ones(size, size, dtype=kind, device=self._device) for kind in kinds]

    def best(self) -> Probe:
        """Return what it can do at the best, with more than caches hold; a round may not wait for it."""
        return Probe(
            gb_per_s=read_gb_per_s(self._device),
            gflop_per_s=gflop_per_s(self._device, torch.bfloat16),
        )

    def measure(self) -> Probe:
        """Return the best of a few tries."""
        read_s = min(self._seconds_of_reading() for _ in range(TRIES))
        flops = 2 * self._matrices[0].shape[0] ** 3
        product_s = min(self._seconds_of_product(index) for _ in range(TRIES) for index in range(2))
        return Probe(
            gb_per_s=self._values.nbytes / read_s / 1e9, gflop_per_s=flops / product_s / 1e9
        )

    def _seconds_of_reading(self) -> float:
        self._wait()
        start = time.perf_counter()
        self._values.sum()
        self._wait()
        return time.perf_counter() - start

    def _seconds_of_product(self, index: int) -> float:
        matrix = self._matrices[index]
        self._wait()
        start = time.perf_counter()
        matrix @ matrix
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


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
