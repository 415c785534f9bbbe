"""Watches memory: reads it, and replaces an engine whose memory does not come back."""

from __future__ import annotations

import trio
from loguru import logger

from trio_worker.core.memory import MB, Pressure, PressureGauge
from trio_worker.core.scheduler import Scheduler
from trio_worker.flow.door import Door
from trio_worker.monitoring.heartbeat import Heartbeat
from trio_worker.ports import Engine, MemoryProbe

WATCHFUL_S = 0.25
"""Between two readings while there is pressure, if that is shorter than what is configured."""


def read_memory(
    probe: MemoryProbe, engine: Engine, gauge: PressureGauge, scheduler: Scheduler
) -> None:
    """Read once, and reconcile the ledger with that while the engine is ready.

    Without a model, what is in use says nothing about the room beside it.
    """
    gauge.read(probe.read(engine.statistics().pid))
    if engine.ready.value:
        scheduler.ledger.reconcile(used=gauge.used, cached_tokens=scheduler.cached_tokens)


async def run_monitor(
    *,
    probe: MemoryProbe,
    engine: Engine,
    gauge: PressureGauge,
    scheduler: Scheduler,
    door: Door,
    heartbeat: Heartbeat,
    check_interval_s: float,
    relief_timeout_s: float,
) -> None:
    """Read now, and then every `check_interval_s`, under pressure more often, until cancelled.

    Those who wait at the door hear of each reading. Memory that stays critical for
    `relief_timeout_s` gets the engine recycled: the running requests resume in the fresh one.
    Cancelled: the last reading stands.
    """
    logger.debug("Resource monitoring started")
    critical_since: float | None = None
    while True:
        heartbeat.beat(trio.current_time())
        before = gauge.level
        read_memory(probe, engine, gauge, scheduler)
        door.pressure_changed()
        if gauge.level is not before:
            _log_change(gauge, before)
        if gauge.level is not Pressure.CRITICAL:
            critical_since = None
        elif critical_since is None:
            critical_since = trio.current_time()
        elif trio.current_time() - critical_since >= relief_timeout_s and engine.ready.value:
            logger.warning("Memory stays critical: replacing the engine by a fresh one")
            engine.recycle()
            critical_since = None
        is_calm = gauge.level is Pressure.NORMAL
        await trio.sleep(check_interval_s if is_calm else min(check_interval_s, WATCHFUL_S))


def _log_change(gauge: PressureGauge, before: Pressure) -> None:
    logger.warning(
        "Memory pressure is {} (was {}): {} MB in use, limits {} and {} MB",
        gauge.level,
        before,
        round(gauge.used / MB),
        round(gauge.soft_bytes / MB),
        round(gauge.critical_bytes / MB),
    )
