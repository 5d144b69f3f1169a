"""Timing on a GPU: CUDA graphs of calls over rotated inputs, replayed in turns; the card's bandwidth.

What is timed together is captured once each, as a graph of calls that go round several sets of inputs (more than three
times the L2 cache in all, where memory allows), and the graphs are replayed in turns, so that a slow moment of the card
falls on all. A graph holds no launch by the CPU; what is left between two kernels is the GPU's own. `HostClock` has the
same face and no GPU: for rehearsals.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

Call = Callable[[], object]
GRAPH_MS = 3.0  # what a graph's replay lasts, about
MOST_CALLS = 400  # in a graph
ROUNDS = 15


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median over the rounds, and the width of the middle 80 %, in shares of it."""

    us: float
    spread: float


def summarize(values: list[float]) -> Timing:
    """Of one round's microseconds each."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    median = statistics.median(ordered)
    return Timing(median, (high - low) / median if median else 0.0)


class CudaClock:
    """The clock of the current CUDA device."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        self.rounds = rounds
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def together(self, bodies: dict[str, list[Call]]) -> tuple[dict[str, Timing], dict[str, str]]:
        """Time bodies in turns, each a list of calls on different inputs; what can't be run or captured says why."""
        replays: dict[str, tuple[Call, int]] = {}
        problems: dict[str, str] = {}
        for name, calls in bodies.items():
            try:
                replays[name] = self._captured(calls)
            except Exception as error:  # a stock operator that this torch, shape or card doesn't have
                problems[name] = one_line(error)
                torch.cuda.synchronize()
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in replays}
        order = list(replays)
        for number in range(self.rounds + 2):
            for name in order[number % len(order) :] + order[: number % len(order)]:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                replays[name][0]()
                end.record()
                if number >= 2:  # the first rounds warm up
                    events[name].append((begin, end))
        torch.cuda.synchronize()
        found = {
            name: summarize([1e3 * a.elapsed_time(b) / replays[name][1] for a, b in pairs])
            for name, pairs in events.items()
        }
        return found, problems

    def _captured(self, calls: list[Call]) -> tuple[Call, int]:
        """What replays a graph of the calls, over and over for some milliseconds; how many calls that is."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # compiles and allocates what the first call does
                call()
        torch.cuda.synchronize()
        once = self._graph(calls, stream)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        once.replay()
        begin.record()
        once.replay()
        end.record()
        torch.cuda.synchronize()
        laps = round(GRAPH_MS / max(begin.elapsed_time(end), 1e-3))
        laps = max(1, min(laps, MOST_CALLS // len(calls)))
        graph = once if laps == 1 else self._graph(calls * laps, stream)
        return graph.replay, laps * len(calls)

    def _graph(self, calls: list[Call], stream: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        return graph

    def bandwidth(self, num_bytes: int = 2 << 30) -> dict[str, float]:
        """GB/s of a device-to-device copy, bytes read and written counted, and of reading alone (a sum)."""
        source = torch.empty(num_bytes // 4, dtype=torch.float32, device="cuda").normal_()
        target = torch.empty_like(source)
        calls: dict[str, list[Call]] = {"copy": [lambda: target.copy_(source)], "read": [lambda: source.sum()]}
        times, _ = self.together(calls)
        return {"copy": 2 * num_bytes / times["copy"].us / 1e3, "read": num_bytes / times["read"].us / 1e3}

    def forget(self) -> None:
        """Give memory of past graphs back."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class HostClock:
    """One call of each body by the processor's clock: shows that bodies run, and nothing about speed."""

    l2_bytes = 0

    def together(self, bodies: dict[str, list[Call]]) -> tuple[dict[str, Timing], dict[str, str]]:
        found: dict[str, Timing] = {}
        problems: dict[str, str] = {}
        for name, calls in bodies.items():
            try:
                begin = time.perf_counter()
                calls[0]()
                found[name] = Timing(1e6 * (time.perf_counter() - begin), 0.0)
            except Exception as error:
                problems[name] = one_line(error)
        return found, problems

    def bandwidth(self) -> dict[str, float]:
        return {"copy": 1.0, "read": 1.0}

    def forget(self) -> None:
        """Nothing is kept."""


Clock = CudaClock | HostClock


def one_line(error: BaseException) -> str:
    """An exception in at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


@contextmanager
def poisoned() -> Any:
    """All memory that torch.empty hands out meanwhile is NaN (numbers without one: their largest).

    torch's own function for this imports its compiler, which takes seconds.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True  # the default; it acts with the following
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


def environment() -> dict[str, str]:
    """The card and all that a time depends on beside the code."""
    found = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }
    if torch.cuda.is_available():
        wanted = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        asked = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
        try:
            state = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            state = one_line(error)
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": torch.cuda.get_device_name(0),
            "driver, clocks, power limit, temperature": state,
            "multiprocessors": str(properties.multi_processor_count),
            "L2": f"{properties.L2_cache_size >> 20} MiB",
        }
    return found
