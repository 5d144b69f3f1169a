"""What is counted, as values: the metrics that a server shows at /metrics, by vLLM's names and classes."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric as Family

from octavo.outputs import Counter, Gauge, Histogram, Metric

PREFIXES = ("vllm:", "octavo:")


def metrics_of(families: Iterable[Family]) -> list[Metric]:
    """One value for each series."""
    found: list[Metric] = []
    for family in families:
        if not family.name.startswith(PREFIXES):
            continue
        match family.type:
            case "gauge":
                found += [Gauge(family.name, one.labels, one.value) for one in family.samples]
            case "counter":
                totals = [one for one in family.samples if one.name.endswith("_total")]
                found += [Counter(family.name, one.labels, int(one.value)) for one in totals]
            case "histogram":
                found += _histograms(family)
            case _:
                pass
    return found


def _histograms(family: Family) -> list[Histogram]:
    found: dict[tuple[tuple[str, str], ...], Histogram] = {}
    for sample in family.samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        histogram = found.setdefault(tuple(sorted(labels.items())), Histogram(family.name, labels, 0, 0.0))
        if sample.name.endswith("_bucket"):
            histogram.buckets[sample.labels["le"]] = int(sample.value)
        elif sample.name.endswith("_count"):
            histogram.count = int(sample.value)
        elif sample.name.endswith("_sum"):
            histogram.sum = sample.value
    return list(found.values())
