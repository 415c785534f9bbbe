"""Reads every gauge off the state that it describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trio_worker import __version__
from trio_worker.core.memory import Pressure
from trio_worker.monitoring import metrics
from trio_worker.monitoring.metrics import Description, GaugeReading, Labels
from trio_worker.monitoring.readings import depth_by_priority
from trio_worker.monitoring.worker_parts import WorkerParts


def gauges_of(parts: WorkerParts, *, is_ready: bool) -> Iterator[GaugeReading]:
    """Every metric that is not written down where things happen, with its present values."""
    gauge, engine = parts.admission.gauge, parts.engine.statistics()
    broker, memory = parts.broker.statistics(), parts.batches.engine_memory
    depths: dict[Labels, float] = {
        (priority,): depth for priority, depth in depth_by_priority(parts).items()
    }
    build = (__version__, parts.config.id, parts.config.model_name)
    restarts: dict[Labels, float] = dict.fromkeys(metrics.ENGINE_RESTARTS.starts, 0)
    restarts |= {(reason,): count for reason, count in engine.restarts_by_reason.items()}
    values: dict[Description, Mapping[Labels, float]] = {
        metrics.IN_FLIGHT: {(): len(parts.admission.in_flight)},
        metrics.QUEUE_DEPTH: depths,
        metrics.PROMOTIONS: {(): parts.queue.promotions},
        metrics.MEMORY: {
            ("used",): gauge.used,
            ("engine_active",): memory.active,
            ("engine_cache",): memory.cache,
            ("available",): gauge.available,
            ("soft",): gauge.soft_bytes,
            ("hard",): gauge.critical_bytes,
        },
        metrics.RESERVED: {(): parts.scheduler.ledger.reserved_bytes},
        metrics.PRESSURE: {(): list(Pressure).index(gauge.level)},
        metrics.ENGINE_RESTARTS: restarts,
        metrics.CONNECTED: {(): int(broker.connected)},
        metrics.RECONNECTS: {(): broker.reconnects},
        metrics.SLOW_CONSUMER: {(): broker.slow_consumers},
        metrics.READY: {(): int(is_ready)},
        metrics.BUILD_INFO: {build: 1},
    }
    for description, readings in values.items():
        yield GaugeReading(description=description, values=readings)
