"""What can be read of the machine: who else is busy, a server's memory, energy, and the machine's name.

Each of these is None where the system doesn't tell, and the report says so.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

PROC = Path("/proc")
POWERCAP = Path("/sys/class/powercap")
LOOK_SECONDS = 0.5
NOISY = 0.05  # share of the machine's cores that other programs may keep busy, in the median over the runs


class MachineFacts(msgspec.Struct, frozen=True):
    """The machine that `octavo cost` runs on; a server elsewhere has its own."""

    processor: str
    cores: int
    memory_bytes: int | None
    gpus: tuple[str, ...] = ()


def machine_facts() -> MachineFacts:
    """This machine."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MachineFacts(_processor(), cores, memory, _gpu_names())


def _processor() -> str:
    with suppress(OSError):
        for line in (PROC / "cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def busy_cores(seconds: float) -> float | None:
    """Cores that are busy while the server under measurement has nothing to do: that is somebody else's work."""
    before = _jiffies()
    if before is None:
        return None
    begun = time.perf_counter()
    time.sleep(seconds)
    after = _jiffies()
    passed = time.perf_counter() - begun
    return None if after is None else max(0.0, (after - before) / os.sysconf("SC_CLK_TCK") / passed)


def _jiffies() -> int | None:
    """Time that all cores were busy, stolen time too, in the kernel's ticks."""
    try:
        fields = [int(field) for field in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(fields) - fields[3] - fields[4]  # idle, and waiting for a disk


def memory_of(pid: int | None) -> int | None:
    """Bytes of a process and its children, what they share counted once (Pss)."""
    if pid is None:
        return None
    found = [_pss(process) for process in _family(pid)]
    known = [size for size in found if size is not None]
    return sum(known) if known else None


def _family(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    family = [pid]
    for process in family:
        family += children.get(process, [])
    return family


def _pss(pid: int) -> int | None:
    with suppress(OSError):
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None


class EnergyMeter:
    """Counts the joules of this machine: of its GPUs by NVML, else of its processors by RAPL."""

    def __init__(self, joules: Callable[[], float], source: str) -> None:
        self.joules = joules
        self.source = source

    @classmethod
    def find(cls, powercap: Path = POWERCAP) -> EnergyMeter | None:
        """None where nothing counts, or only root may read it."""
        return _nvml_meter() or _rapl_meter(powercap)


def _rapl_meter(powercap: Path) -> EnergyMeter | None:
    """The packages' counters: their subdomains (intel-rapl:0:0) are parts of them. A counter begins anew at its end."""
    packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]
    ends: list[int] = []
    last: list[int] = []
    total = [0] * len(packages)
    try:
        for path in packages:
            ends.append(int((path / "max_energy_range_uj").read_text()))
            last.append(int((path / "energy_uj").read_text()))
    except (OSError, ValueError):
        return None

    def joules() -> float:
        for i, path in enumerate(packages):
            now = int((path / "energy_uj").read_text())
            total[i] += now - last[i] + (ends[i] if now < last[i] else 0)
            last[i] = now
        return sum(total) / 1e6

    return EnergyMeter(joules, "processors (RAPL)") if packages else None


def _nvml_meter() -> EnergyMeter | None:
    handles = _gpus()
    if not handles:
        return None
    import pynvml

    def joules() -> float:
        return float(sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)) / 1e3

    try:
        joules()
    except pynvml.NVMLError:
        return None
    return EnergyMeter(joules, "GPUs (NVML)")


def _gpu_names() -> tuple[str, ...]:
    handles = _gpus()
    if not handles:
        return ()
    import pynvml

    return tuple(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles)


def _gpus() -> list[object]:
    """NVML's handles; none without a driver, or without the package nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
