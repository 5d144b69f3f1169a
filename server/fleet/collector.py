"""What /metrics tells of the fleet: which engines are up, how often they were not, and what those that are up do."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.runtime.messages import EngineStats
from octavo.server.fleet.fleet import Fleet
from octavo.server.metrics import LABELS

REASONS = ("prefix", "load")
IDLE = EngineStats(0, 0, 0.0, 0, 0, 0, 0)  # before the first step, and while it is down


class FleetCollector(Collector):
    """Asks the fleet whenever the page is asked for."""

    def __init__(self, fleet: Fleet, model_name: str) -> None:
        self._fleet = fleet
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """One series for each engine."""
        up = GaugeMetricFamily("octavo:engine_up", "whether the engine can answer", labels=LABELS)
        restarts = CounterMetricFamily(
            "octavo:engine_restarts", "how often the engine was started again", labels=LABELS
        )
        migrated = CounterMetricFamily(
            "octavo:requests_migrated", "answers that went on elsewhere when this engine died", labels=LABELS
        )
        routed = CounterMetricFamily(
            "octavo:routing", "requests by why they came to this engine", labels=(*LABELS, "reason")
        )
        predicted = CounterMetricFamily(
            "octavo:routing_predicted_tokens", "prompt tokens that were to be cached where they went", labels=LABELS
        )
        for member in self._fleet.members:
            labels = (self._model_name, str(member.index))
            up.add_metric(labels, float(member.is_up))
            restarts.add_metric(labels, member.num_restarts)
            migrated.add_metric(labels, member.num_migrated)
            predicted.add_metric(labels, member.num_predicted)
            for reason in REASONS:
                routed.add_metric((*labels, reason), member.num_routed[reason])
        yield from (up, restarts, migrated, *self._gauges())
        if len(self._fleet.members) > 1:
            yield from (routed, predicted)

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
        for member in self._fleet.members:
            labels = (self._model_name, str(member.index))
            stats = member.stats or IDLE
            running.add_metric(labels, stats.num_running)
            waiting.add_metric(labels, stats.num_waiting)
            by_reason.add_metric((*labels, "capacity"), stats.num_waiting - stats.num_deferred)
            by_reason.add_metric((*labels, "deferred"), stats.num_deferred)
            usage.add_metric(labels, stats.kv_cache_usage)
        return running, waiting, by_reason, usage
