"""What /metrics tells of the processes of a server, summed over them: CPU time, memory, files.

Names are prometheus_client's of one process. The process that has the others looks at all of them from time to time,
so that what a dead one had used stays counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.process_collector import ProcessCollector

CPU = "process_cpu_seconds_total"
SUMMED = {
    "process_virtual_memory_bytes": "virtual memory, of all server processes",
    "process_resident_memory_bytes": "resident memory, of all server processes",
    "process_open_fds": "open file descriptors, of all server processes",
    "process_max_fds": "how many they may open",
}
START = "process_start_time_seconds"


class ProcessFigures:
    """Counters and gauges of one registry; `take` brings them up to date."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._cpu = Counter(CPU, "CPU time, of all server processes", registry=registry)
        self._gauges = {
            name: Gauge(name, text, registry=registry, multiprocess_mode="mostrecent") for name, text in SUMMED.items()
        }
        self._start = Gauge(START, "when the first of them began", registry=registry, multiprocess_mode="mostrecent")
        self._cpu_of: dict[int, float] = {}

    def take(self, pids: Iterable[int]) -> None:
        """Look at these processes; those that have ended have no figures."""
        found = {pid: figures for pid in pids if (figures := _figures_of(pid))}
        for pid, figures in found.items():
            self._cpu.inc(max(0.0, figures[CPU] - self._cpu_of.get(pid, 0.0)))
        self._cpu_of = {pid: figures[CPU] for pid, figures in found.items()}
        for name, gauge in self._gauges.items():
            gauge.set(sum(figures.get(name, 0.0) for figures in found.values()))
        if found:
            self._start.set(min(figures[START] for figures in found.values()))


def _figures_of(pid: int) -> dict[str, float]:
    metrics = ProcessCollector(pid=lambda: pid, registry=None).collect()
    return {sample.name: sample.value for metric in metrics for sample in metric.samples}
