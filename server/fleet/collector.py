"""What /metrics tells of the fleet itself: which engines are up, and how often they were not."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.server.fleet.fleet import Fleet

LABELS = ("model_name", "engine")
REASONS = ("prefix", "load")


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
        yield from (up, restarts, migrated)
        if len(self._fleet.members) > 1:
            yield from (routed, predicted)
