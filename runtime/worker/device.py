"""The machine: which device to compute on, how many threads, how much memory is free. All torch.cuda calls are here.

But one: `kernels.launching.tuning` asks which card a launch's tensors are on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from octavo.kernels.launching import tuning
from octavo.runtime.parallel.placement import CGROUP, num_cores


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that name; 'auto' is the GPU if there is one. A GPU that is asked for and missing is an error."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch finds no NVIDIA GPU here; --device cpu works")
    return torch.device("cuda", torch.cuda.current_device())


def set_threads(num_threads: int | None) -> int:
    """Use that many CPU threads for one operator (None: as many as the process may use), and return the number."""
    count = num_threads or num_cores()
    torch.set_num_threads(count)
    return count


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on the device; on a CPU also within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available(), left_in_cgroup(CGROUP))


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has."""
    return torch.cuda.mem_get_info(device)[1]


def capability(device: torch.device) -> int:
    """A GPU's compute capability: 90 for an H100, 89 for an L40S or 4090, 80 for an A100. 0 for a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def table_notes(device: torch.device) -> list[str]:
    """A note if kernels use block sizes that were tuned on another GPU. ValueError for a GPU no kernel is made for."""
    if device.type != "cuda":
        return []
    note = tuning.note_of(torch.cuda.get_device_name(device), capability(device))
    return [note] if note else []


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a GPU held while something ran, at the most, beyond what it held before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Mark:
    """A place in the current stream, which the host can wait for; on a CPU it is always passed."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def set(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until all that was launched before the last `set` is done."""
        if self._event is not None:
            self._event.synchronize()


class GraphCapture:
    """Captures CUDA graphs that share memory: one runs at a time, and torch shares it within one stream and pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """Run twice, the second time into a graph, and return what replays it. On a CPU, which has none: run again.

        What it allocates may be given to the next graph, so it leaves its results in memory that was there before.
        """
        if self._stream is None:
            run()
            return run
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # what compiles or allocates at first use may not be captured
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        return graph.replay


def give_back_unused(device: torch.device) -> None:
    """Memory that torch keeps of tensors which are gone. On a CPU the system does so."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


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
