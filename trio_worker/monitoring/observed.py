"""What the monitoring pages and the service manager ask of a worker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from trio_worker.monitoring.metrics import CounterMetric, GaugeReading, HistogramMetric
from trio_worker.monitoring.snapshot import (
    InFlightReading,
    MemberReading,
    ResourcesReading,
    Snapshot,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """An answer to a probe."""

    ok: bool
    reason: str
    """One sentence for people; says what is wrong where `ok` is false."""


class Observed(Protocol):
    """What the monitoring endpoints show. Every method is a cheap synchronous read."""

    def liveness(self) -> Health:
        """Not ok while a loop gives no sign of life within its bound; the reason names it."""

    def readiness(self) -> Health:
        """Ok while a request sent now would be taken."""

    def resources(self) -> ResourcesReading:
        """Memory against its limits, and what is done about it."""

    def snapshot(self) -> Snapshot:
        """The statistics snapshot: frozen dataclasses of plain values, ready for JSON."""

    def metrics(self) -> Iterable[CounterMetric | HistogramMetric | GaugeReading]:
        """Every metric with its present values."""

    def in_flight(self, limit: int | None = None) -> list[InFlightReading]:
        """The requests in flight, the oldest first, at most `limit`; no prompts, no answers."""

    def fleet(self) -> list[MemberReading]:
        """The workers on this NATS, by id: this one as it is, others by their last beat."""
