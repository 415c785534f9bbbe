"""The metrics in Prometheus' and OpenMetrics' words: plain values in, text out.

No registry and no state: every exposition reads the values of the moment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from trio_worker.monitoring.metrics import CounterMetric, Description, GaugeReading, HistogramMetric


class Measured(Protocol):
    """Whose metrics are exposed: a worker, or a gateway."""

    def metrics(self) -> Iterable[CounterMetric | HistogramMetric | GaugeReading]: ...


def exposition(observed: Measured, accept: str = "") -> tuple[bytes, str]:
    """Every metric as text, and its content type: OpenMetrics if `accept` asks for that."""
    encode, content_type = choose_encoder(accept)
    return encode(_Values(observed)), content_type


class _Values(Collector):
    def __init__(self, observed: Measured) -> None:
        self._observed = observed

    def collect(self) -> Iterator[Metric]:
        for metric in self._observed.metrics():
            yield _histogram(metric) if isinstance(metric, HistogramMetric) else _plain(metric)


def _plain(metric: CounterMetric | GaugeReading) -> Metric:
    about = metric.description
    kind = CounterMetricFamily if about.kind == "counter" else GaugeMetricFamily
    family = kind(about.full_name, about.meaning, labels=about.labels)
    for labels, value in metric.values.items():
        family.add_metric(labels, value)
    return family


def _histogram(metric: HistogramMetric) -> Metric:
    about = metric.description
    family = HistogramMetricFamily(about.full_name, about.meaning, labels=about.labels)
    bounds = [*map(floatToGoString, about.buckets), "+Inf"]
    for labels, counts in (metric.counts or _nothing_yet(about)).items():
        cumulative = itertools.accumulate(counts)
        buckets = [(bound, float(count)) for bound, count in zip(bounds, cumulative, strict=True)]
        family.add_metric(labels, buckets, metric.sums.get(labels, 0.0))
    return family


def _nothing_yet(about: Description) -> dict[tuple[str, ...], list[int]]:
    """An unlabelled histogram is there from the start, so that its first value is an increase."""
    return {} if about.labels else {(): [0] * (len(about.buckets) + 1)}
