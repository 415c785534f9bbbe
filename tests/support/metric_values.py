"""The metrics of a worker, looked up by what describes them, and as Prometheus reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from trio_worker.monitoring.metrics import PREFIX, CounterMetric, Description, HistogramMetric
from trio_worker.monitoring.observed import Observed


def counter_of(observed: Observed, description: Description) -> CounterMetric:
    (found,) = (
        each
        for each in observed.metrics()
        if isinstance(each, CounterMetric) and each.description is description
    )
    return found


def histogram_of(observed: Observed, description: Description) -> HistogramMetric:
    (found,) = (
        each
        for each in observed.metrics()
        if isinstance(each, HistogramMetric) and each.description is description
    )
    return found


def samples_in(exposition: str) -> dict[str, float]:
    """Every sample, named as in a query without prefix and quotes: `requests_total{outcome=ok}`."""
    found = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix(PREFIX)
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found
