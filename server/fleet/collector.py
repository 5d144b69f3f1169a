"""What /metrics tells of the fleet: which engines are up, how often they were not, and what those that are up do.

Several processes of a server know the same of what is now, each from the engines. What each has counted is summed by
prometheus_client, so there it stands in counters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.runtime.messages import EngineStats
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.member import Member
from octavo.server.metrics import LABELS

REASONS = ("prefix", "load")
IDLE = EngineStats(0, 0, 0.0, 0, 0, 0, 0)  # before the first step, and while it is down


RESTARTS = ("octavo:engine_restarts", "how often the engine was started again")
MIGRATED = ("octavo:requests_migrated", "answers that went on elsewhere when this engine died")
ROUTED = ("octavo:routing", "requests by why they came to this engine")
PREDICTED = ("octavo:routing_predicted_tokens", "prompt tokens that were to be cached where they went")


class FleetCollector(Collector):
    """Asks the fleet whenever the page is asked for. counts: False where FleetCounters has what is counted."""

    def __init__(self, fleet: Fleet, model_name: str, *, counts: bool = True) -> None:
        self._fleet = fleet
        self._model_name = model_name
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """One series for each engine."""
        up = GaugeMetricFamily("octavo:engine_up", "whether the engine can answer", labels=LABELS)
        for member in self._fleet.members:
            up.add_metric(self._labels(member), float(member.is_up))
        yield from (up, *self._gauges())
        if self._fleet.adapters.max_loras is not None:
            yield self._adapters()
        if self._counts:
            yield from self._counters()

    def _labels(self, member: Member) -> tuple[str, str]:
        return self._model_name, str(member.index)

    def _counters(self) -> Iterator[Metric]:
        restarts, migrated, predicted = (
            CounterMetricFamily(*named, labels=LABELS) for named in (RESTARTS, MIGRATED, PREDICTED)
        )
        routed = CounterMetricFamily(*ROUTED, labels=(*LABELS, "reason"))
        for member in self._fleet.members:
            labels = self._labels(member)
            restarts.add_metric(labels, member.num_restarts)
            migrated.add_metric(labels, member.num_migrated)
            predicted.add_metric(labels, member.num_predicted)
            for reason in REASONS:
                routed.add_metric((*labels, reason), member.num_routed[reason])
        yield from (restarts, migrated)
        if len(self._fleet.members) > 1:
            yield from (routed, predicted)

    def _adapters(self) -> Metric:
        """vLLM's: names stand in labels, and the value is the time."""
        stats = self._fleet.stats or IDLE
        names = self._fleet.adapters
        labels = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "adapters that requests use, and wait for", labels=labels)
        waiting, running = (names.names_of(digests) for digests in (stats.waiting_adapters, stats.running_adapters))
        info.add_metric((str(names.max_loras), ",".join(waiting), ",".join(running)), time.time())
        return info

    def _gauges(self) -> tuple[Metric, ...]:
        """Of each engine's last step."""
        running = GaugeMetricFamily("vllm:num_requests_running", "sequences in the batch", labels=LABELS)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "sequences that wait for room", labels=LABELS)
        by_reason = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "those that wait, for room or not yet ready",
            labels=(*LABELS, "reason"),
        )
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "share of the KV cache's blocks in use, 0 to 1", labels=LABELS
        )
        offloaded = GaugeMetricFamily(
            "octavo:kv_offload_usage_perc", "share of the slots of --kv-offloading-path's file, 0 to 1", labels=LABELS
        )
        for member in self._fleet.members:
            labels = self._labels(member)
            stats = member.stats or IDLE
            running.add_metric(labels, stats.num_running)
            waiting.add_metric(labels, stats.num_waiting)
            by_reason.add_metric((*labels, "capacity"), stats.num_waiting - stats.num_deferred)
            by_reason.add_metric((*labels, "deferred"), stats.num_deferred)
            usage.add_metric(labels, stats.kv_cache_usage)
            if stats.offload is not None:
                offloaded.add_metric(labels, stats.offload.usage)
        return (running, waiting, by_reason, usage, *([offloaded] if offloaded.samples else []))


class FleetCounters:
    """What a fleet counts, as counters of a registry; `take` brings them up to date.

    decides: whether this process is the one that restarts engines; the others give them requests.
    """

    def __init__(self, fleet: Fleet, model_name: str, registry: CollectorRegistry, *, decides: bool) -> None:
        self._taken: dict[Counter, int] = {}
        self._sources: list[tuple[Counter, Callable[[], int]]] = []
        if decides:
            counter = Counter(*RESTARTS, LABELS, registry=registry)
            for member in fleet.members:
                self._add(counter.labels(model_name, str(member.index)), partial(getattr, member, "num_restarts"))
            return
        migrated, predicted = (Counter(*named, LABELS, registry=registry) for named in (MIGRATED, PREDICTED))
        routed = Counter(*ROUTED, (*LABELS, "reason"), registry=registry)
        for member in fleet.members:
            labels = (model_name, str(member.index))
            self._add(migrated.labels(*labels), partial(getattr, member, "num_migrated"))
            if len(fleet.members) > 1:
                self._add(predicted.labels(*labels), partial(getattr, member, "num_predicted"))
                for reason in REASONS:
                    self._add(routed.labels(*labels, reason), partial(member.num_routed.__getitem__, reason))

    def _add(self, counter: Counter, source: Callable[[], int]) -> None:
        self._sources.append((counter, source))
        self._taken[counter] = 0

    def take(self) -> None:
        """Add what has been counted since the last call."""
        for counter, source in self._sources:
            count = source()
            if count != self._taken[counter]:
                counter.inc(count - self._taken[counter])
                self._taken[counter] = count
