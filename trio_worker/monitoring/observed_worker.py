"""The whole worker, as endpoints, reports and the service manager see it: never changed."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from trio_worker.monitoring.gauges import gauges_of
from trio_worker.monitoring.health import liveness_of, readiness_of
from trio_worker.monitoring.metrics import CounterMetric, GaugeReading, HistogramMetric
from trio_worker.monitoring.observed import Health
from trio_worker.monitoring.readings import fleet_of, in_flight_of, resources_of, snapshot_of
from trio_worker.monitoring.snapshot import (
    InFlightReading,
    MemberReading,
    ResourcesReading,
    Snapshot,
)
from trio_worker.monitoring.worker_parts import WorkerParts


class ObservedWorker:
    """Implements `Observed`, by the loop's clock."""

    def __init__(self, parts: WorkerParts) -> None:
        self.parts = parts
        self.is_subscribed = False
        """Set by the worker once requests reach it."""
        self._started_at = trio.current_time()

    def liveness(self) -> Health:
        return liveness_of(self.parts.heartbeats, now=trio.current_time())

    def readiness(self) -> Health:
        return readiness_of(self.parts, is_subscribed=self.is_subscribed)

    def resources(self) -> ResourcesReading:
        return resources_of(self.parts)

    def snapshot(self) -> Snapshot:
        return snapshot_of(self.parts, now=trio.current_time(), started_at=self._started_at)

    def metrics(self) -> Iterator[CounterMetric | HistogramMetric | GaugeReading]:
        yield from self.parts.counters.metrics.written()
        yield from gauges_of(self.parts, is_ready=self.readiness().ok)

    def in_flight(self, limit: int | None = None) -> list[InFlightReading]:
        return in_flight_of(self.parts, now=trio.current_time(), limit=limit)

    def fleet(self) -> list[MemberReading]:
        return fleet_of(self.parts, now=trio.current_time())
