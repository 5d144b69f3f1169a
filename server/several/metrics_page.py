"""/metrics of several models as one page: the series of each, with its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from octavo.server.several.slot import Slot

MODEL = "model_name"
OF_PROCESS = ("process_", "python_")  # what is told of the server's process, once


def page_of(slots: Iterable[Slot]) -> bytes:
    """The text that Prometheus scrapes."""
    return generate_latest(_AllOf(list(slots)))


class _AllOf(Collector):
    """What the registries of all models collect. Models that have never been loaded have none."""

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    def collect(self) -> Iterator[Metric]:
        """Each family once, with the series of all models."""
        loaded = GaugeMetricFamily("octavo:model_loaded", "whether a model is loaded", labels=(MODEL,))
        for slot in self._slots:
            loaded.add_metric((slot.name,), float(slot.loaded is not None))
        yield loaded
        families: dict[str, Metric] = {}
        for slot in self._slots:
            if slot.metrics is None:
                continue
            slot.metrics.settle()
            for family in slot.metrics.registry.collect():
                is_new = family.name not in families
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                if is_new or not family.name.startswith(OF_PROCESS):
                    whole.samples += [_named(sample, slot.name) for sample in family.samples]
        yield from families.values()


def _named(sample: Sample, name: str) -> Sample:
    if sample.name.startswith(OF_PROCESS) or MODEL in sample.labels:
        return sample
    return sample._replace(labels={MODEL: name, **sample.labels})
