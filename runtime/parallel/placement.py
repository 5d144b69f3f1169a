"""Which cores, or which GPU, each engine of a server gets. Two engines' spinning threads would fight for a core."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec

from octavo.runtime.parallel.config import Devices, ParallelConfig

CGROUP = Path("/sys/fs/cgroup")
NVIDIA = Path("/proc/driver/nvidia/gpus")
RAY = "ray (--distributed-executor-backend, --data-parallel-backend)"
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one engine runs. cores: the CPUs that it may use; None: all. num_threads: of a rank; None: by those.

    gpu: as CUDA_VISIBLE_DEVICES names it; None: as it is in the server's environment.
    """

    cores: list[int] | None = None
    num_threads: int | None = None
    gpu: str | None = None


def find_devices(device: Literal["auto", "cpu", "cuda"]) -> Devices:
    """What this process may use. GPUs are counted without torch, which the server doesn't import."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Devices(cores, cpus_in_cgroup(CGROUP), () if device == "cpu" else _gpus())


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))
    count = len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0
    return tuple(map(str, range(count)))


def check_ray_installed() -> None:
    """Raise ValueError where engines are to be placed by Ray, and there is none."""
    if find_spec("ray") is None:
        raise ValueError(f"{RAY} is not installed: pip install 'octavo[ray]'")


def place(index: int, size: int, devices: Devices, ranks: int = 1) -> Placement:
    """The place of one of `size` engines: a GPU of its own, or consecutive cores, as evenly as they go.

    ranks: of each engine, which divide its cores among themselves.
    """
    if size == 1:
        return Placement()
    if devices.gpus:
        return Placement(gpu=devices.gpus[index])
    count = len(devices.cores)
    if devices.max_cores < count:  # a quota says how many at a time, and not which: others may be on any of them
        return Placement(num_threads=max(1, devices.max_cores // (size * ranks)))
    return Placement(cores=list(devices.cores[index * count // size : (index + 1) * count // size]))


def cores_to_share(parallel: ParallelConfig) -> list[int]:
    """The CPUs that ranks are pinned to shares of. None on Ray, which says how many an engine has, and not which."""
    return [] if parallel.is_on_ray else sorted(os.sched_getaffinity(0))


def num_cores() -> int:
    """How many CPUs this process may use at a time."""
    return min(len(os.sched_getaffinity(0)), cpus_in_cgroup(CGROUP))


def cpus_in_cgroup(root: Path) -> int:
    """A container's quota of CPU time (cgroup v2) in whole CPUs; more threads would only wait and spin."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return 1 << 16
    return 1 << 16 if quota == "max" else max(1, int(quota) // int(period))
