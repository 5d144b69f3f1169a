"""The machine: which device to compute on, how many threads, how much memory is free. All torch.cuda calls are here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

CGROUP = Path("/sys/fs/cgroup")


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that name; 'auto' is the GPU if there is one. A GPU that is asked for and missing is an error."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch finds no NVIDIA GPU here; --device cpu works")
    return torch.device("cuda", torch.cuda.current_device())


def set_threads(num_threads: int | None) -> int:
    """Use that many CPU threads for one operator (None: as many as the process may use), and return the number."""
    count = num_threads or min(len(os.sched_getaffinity(0)), cpus_in_cgroup(CGROUP))
    torch.set_num_threads(count)
    return count


def cpus_in_cgroup(root: Path) -> int:
    """What a container's quota of CPU time (cgroup v2) amounts to, in whole CPUs; threads beyond it wait and spin."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return 1 << 16
    return 1 << 16 if quota == "max" else max(1, int(quota) // int(period))


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on the device; on a CPU also within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available(), left_in_cgroup(CGROUP))


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has."""
    return torch.cuda.mem_get_info(device)[1]


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def left_in_cgroup(root: Path) -> int:
    """What a memory limit of cgroup v2 leaves; the page cache counts as used there but gives way, so it is added."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        used = int((root / "memory.current").read_text())
        files = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(files.get("inactive_file", 0))
    except OSError:
        return 1 << 62
