"""What a gateway counts of itself, in the form in which workers' metrics are exposed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trio_worker.monitoring.metrics import (
    CounterMetric,
    Description,
    GaugeReading,
    HistogramMetric,
)

_FIRST_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_RETRIES_MAX = 5

ANSWERS = Description(
    name="gateway_answers_total",
    kind="counter",
    meaning="Answers to requests for a model, by HTTP status; what fails after 200 is `broken`.",
    labels=("status",),
    worry="The share of 5xx, 429 and `broken` grows.",
)
RETRIED = Description(
    name="gateway_retried_total",
    kind="counter",
    meaning="Requests that a client library had sent before, by how often.",
    labels=("retries",),
)
FIRST_BYTE = Description(
    name="gateway_first_byte_seconds",
    kind="histogram",
    meaning="From a request's headers to the first byte of its answer.",
    buckets=_FIRST_BUCKETS,
)
LEFT = Description(
    name="gateway_callers_left_total",
    kind="counter",
    meaning="Requests whose caller left before the end.",
)
RUNNING = Description(
    name="gateway_requests_running",
    kind="gauge",
    meaning="Requests that are being answered.",
)


DESCRIPTIONS = (ANSWERS, RETRIED, FIRST_BYTE, LEFT, RUNNING)
"""Every metric of a gateway."""


class GatewayCounts:
    """Written where things happen; never awaited."""

    def __init__(self) -> None:
        self.answers = CounterMetric(ANSWERS)
        self.retried = CounterMetric(RETRIED)
        self.first_byte = HistogramMetric(FIRST_BYTE)
        self.left = CounterMetric(LEFT)
        self.running = 0

    @contextmanager
    def running_request(self, retry_count: str | None) -> Iterator[None]:
        """While a request is being answered; `retry_count` is its header of that name."""
        if retry_count is not None and retry_count.isdecimal() and retry_count.strip("0"):
            self.retried.add(labels=(str(min(int(retry_count[:4]), _RETRIES_MAX)),))
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def metrics(self) -> Iterator[CounterMetric | HistogramMetric | GaugeReading]:
        yield from (self.answers, self.retried, self.first_byte, self.left)
        yield GaugeReading(description=RUNNING, values={(): float(self.running)})
