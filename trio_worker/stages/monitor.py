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
"""The time between readings while there is pressure, if that is shorter than the configured."""


def read_memory(
    probe: MemoryProbe, engine: Engine, gauge: PressureGauge, scheduler: Scheduler
) -> None:
    """Read once; the ledger is reconciled if there is a model to speak of."""
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
    """Read now and then every `check_interval_s` until cancelled; under pressure more often.

    Memory that stays critical for `relief_timeout_s` gets the engine recycled: the running
    requests resume in the fresh one.
    """
    logger.debug("Resource monitoring started")
    critical_since: float | None = None
    while True:
        heartbeat.beat(trio.current_time())
        before = gauge.level
        read_memory(probe, engine, gauge, scheduler)
        door.pressure_changed()
        if gauge.level is not before:
            logger.warning(
                "Memory pressure is {} (was {}): {} MB in use, limits {} and {} MB",
                gauge.level,
                before,
                round(gauge.used / MB),
                round(gauge.soft_bytes / MB),
                round(gauge.critical_bytes / MB),
            )
        if gauge.level is not Pressure.CRITICAL:
            critical_since = None
        elif critical_since is None:
            critical_since = trio.current_time()
        elif trio.current_time() - critical_since >= relief_timeout_s and engine.ready.value:
            logger.warning("Memory stays critical: replacing the engine by a fresh one")
            engine.recycle()
            critical_since = None
        calm = gauge.level is Pressure.NORMAL
        await trio.sleep(check_interval_s if calm else min(check_interval_s, WATCHFUL_S))
