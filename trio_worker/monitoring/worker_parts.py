"""The parts of a worker that are looked at, to say how it is."""

from __future__ import annotations

from dataclasses import dataclass

from trio_worker.config import WorkerConfig
from trio_worker.core.admission import Admission
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.scheduler import Scheduler
from trio_worker.flow.door import Door
from trio_worker.flow.job import JobsHeld
from trio_worker.flow.live_set import LiveSet
from trio_worker.flow.troubles import Troubles
from trio_worker.monitoring.counters import BatchCounters, RequestCounters
from trio_worker.monitoring.heartbeat import Heartbeats
from trio_worker.ports import Broker, Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerParts:
    """Read, never changed, by whoever is given them."""

    config: WorkerConfig
    admission: Admission
    door: Door
    queue: RequestQueue
    scheduler: Scheduler
    batches: BatchCounters
    counters: RequestCounters
    engine: Engine
    broker: Broker
    heartbeats: Heartbeats
    live: LiveSet
    jobs_held: JobsHeld | None = None
    """With the next, where durable jobs are taken."""
    jobs_troubles: Troubles | None = None
